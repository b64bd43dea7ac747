"""A node's virtual path of one round, rebuilt from the mask and the ledger alone."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import seeds_of, virtual_path
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import RunMismatch
from meerkat_mq.ledger.inspect import gradip_of
from meerkat_mq.ledger.run import settings_of
from meerkat_mq.ledger.shown import RebuiltShown
from meerkat_mq.ledger.store import Store
from meerkat_mq.ledger.verify import check_mask, run_of
from meerkat_mq.rounds.policy import lane_of

AT_ONCE = 100


def rebuilt_path(
    ledger: Store, mask: Mask, version: int, node: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[RebuiltShown]:
    """A node's projected gradients from theta of a closed round, and how far from there each local step led it.

    Raises:
        RunMismatch: it is another run's mask, the round did not close, or the node gave nothing from its theta, or a
            displacement.
        LedgerError: what is kept of the round has not the size that it must have.
        BadValue: the node sent a projected gradient that leads nowhere: it was refused.
    """
    run = run_of(ledger)
    check_mask(mask, run)
    if version >= ledger.version:
        raise RunMismatch(f"round {version}", f"did not close; {ledger.version} rounds have", "name an earlier one")
    record = next((record for _, record in ledger.updates(version, version + 1, node)), None)
    if record is None:
        raise RunMismatch(
            f"node {node}", f"gave nothing from theta of version {version}", _where(ledger, version, node)
        )
    if record.values is not None:
        problem = f"gave a displacement from theta of version {version}: how it came to that cannot be rebuilt"
        raise RunMismatch(f"node {node}", problem, "name a node that sends projected gradients")
    theta, lane = theta_of(ledger, mask, version, progress), lane_of(record.slot, run.directions)
    seeds, perturbations = seeds_of(run.run_id, version, lane, len(record.scalars)), run.perturbations
    products = ledger.products(version, settings_of(run, ledger.rules))
    measured = gradip_of(ledger, record, products) if products else (None,) * len(seeds)
    walk = virtual_path(
        theta, record.scalars, seeds, perturbations=perturbations, stream=run.stream, lr=run.lr
    )  # fmt: skip
    for step, walker in enumerate(walk):
        away = distance(walker, theta)
        for index in range(step * perturbations, (step + 1) * perturbations):
            seed, scalar = f"{seeds[index]:016x}", record.scalars[index]
            yield RebuiltShown(version, node, lane, index, seed, scalar, measured[index], away)


def _where(ledger: Store, version: int, node: str) -> str:
    """Which path of the node closed with the entry, from an older theta; else how to find one."""
    for record in ledger.records(version):
        if record.node == node:
            base = record.version
            return f"its update from theta of version {base} is in entry {version}: --round {base}"
    return "`meerkat ledger --node` says from which versions it gave something"


def theta_of(ledger: Store, mask: Mask, version: int, progress: Callable[[int, int], None]) -> Float32Array:
    """theta of a version, float32 (n,): theta_0 and the entries up to there; digests are left to verification."""
    run = run_of(ledger)
    replica = Replica(mask, run_id=run.run_id, stream=run.stream, digest_every=run.count + 1)
    while replica.version < version:
        progress(replica.version, version)
        entries = ledger.entries(replica.version, min(AT_ONCE, version - replica.version))
        if [entry.version for entry in entries] != list(range(replica.version, replica.version + len(entries))):
            raise RunMismatch(f"entry {replica.version}", "is missing, or one after it", "`meerkat verify` says more")
        replica.replay(ledger.changes(entries, mask.size))
    progress(version, version)
    return replica.theta


def distance(walker: Float32Array, theta: Float32Array) -> float:
    """‖walker − theta‖; float32 (n,) each."""
    return math.sqrt(float(np.square(np.subtract(walker, theta, dtype=np.float64)).sum()))
