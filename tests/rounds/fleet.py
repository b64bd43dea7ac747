"""Whole federations in memory: how tests make them, disturb them, and judge them."""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.path import digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.rounds.early_stopping import judgements_of
from meerkat_mq.rounds.memory import Deliver, MemoryFederation, MemoryNode, instantly
from meerkat_mq.rounds.policy import fewest_needed, shares_of, terms_of
from meerkat_mq.rounds.records import Judgement
from meerkat_mq.wire.frames import Frame
from tests.rounds.support import settings

WEIGHTS = 24


class Network:
    """Loses, repeats and delays frames at random until `heal`.

    Attributes:
        sent: (sender, receiver, frame) of everything, lost or not.
    """

    def __init__(self, seed: int, *, loss: float = 0.0, repeat: float = 0.0, slow_s: float = 0.001) -> None:
        self._random = random.Random(seed)
        self._loss, self._repeat, self._slow_s = loss, repeat, slow_s
        self.sent: list[tuple[str, str, Frame]] = []

    def __call__(self, sender: str, receiver: str, frame: Frame) -> Sequence[float]:
        self.sent.append((sender, receiver, frame))
        if self._random.random() < self._loss:
            return ()
        copies = 2 if self._random.random() < self._repeat else 1
        return [0.001 + self._slow_s * self._random.random() for _ in range(copies)]

    def heal(self) -> None:
        self._loss = self._repeat = self._slow_s = 0.0


def fleet(
    size: int = 4,
    *,
    deliver: Deliver = instantly,
    stream: str = "mk1",
    digest_every: int = 1,
    commit_s: float = 0.0,
    **changes: Any,
) -> MemoryFederation:
    """`size` toy nodes n0, n1, … with 4, 5, … rows of their own; `changes` to the settings."""
    mask = toy_mask(WEIGHTS)
    nodes = [
        MemoryNode(f"n{k}", QuadraticEngine(WEIGHTS), [{"seed": 100 * k + row} for row in range(4 + k)], batch_size=2)
        for k in range(size)
    ]
    plain = {"mask_hash": mask.hash, "min_nodes": size, "quorum": 0.5, "deadline_s": 10.0, "grace_s": 2.0, "lr": 0.1}
    return MemoryFederation(
        settings(**plain | changes),
        mask,
        nodes,
        stream=stream,
        digest_every=digest_every,
        deliver=deliver,
        commit_s=commit_s,
    )


def heal(federation: MemoryFederation, network: Network) -> None:
    """Mend the network; every node connects anew."""
    network.heal()
    for name in federation.nodes:
        federation.reconnect(name)


def run(federation: MemoryFederation, seconds: float = 1000.0) -> MemoryFederation:
    """Run to the end, and let the last words arrive."""
    federation.run(federation.now + seconds)
    federation.settle(5.0)
    assert federation.server.finished, f"stands at {len(federation.entries)} after {federation.now} s"
    return federation


def check_ledger(federation: MemoryFederation) -> None:
    """The ledger is a chain of what its records say, and leads from theta_0 to the server's theta."""
    rules, mask = federation.settings, toy_mask(WEIGHTS)
    replica = Replica(mask, run_id=rules.run_id, stream=federation.stream, digest_every=federation.digest_every)
    entries = federation.entries
    assert [entry.previous for entry in entries[:1]] in ([], [rules.mask_hash])
    assert all(later.previous == entry.hash(rules.run_id) for entry, later in pairwise(entries))
    for version, (entry, records) in enumerate(zip(entries, federation.records, strict=True)):
        assert entry.version == version
        assert entry.terms == terms_of(records, rules, version)
        assert entry.digest == replica.apply(entry.terms, federation.displacements.of(entry))
        assert (entry.displacement is None) == (shares_of(records, rules, version) == ())
        assert all(0 <= version - record.version <= rules.max_staleness for record in records)
        assert len(records) >= (1 if rules.buffered else fewest_needed(rules, version))
    for what in ("node", "slot"):
        places = [(record.version, getattr(record, what)) for records in federation.records for record in records]
        assert len(set(places)) == len(places)
    check_judgements(federation)
    if federation.replica.version == replica.version:  # not so while an entry is being committed
        assert digest(federation.replica.theta) == digest(replica.theta)


def check_judgements(federation: MemoryFederation) -> None:
    """The ledger's products are those of the seeds, and its judgements those of products and updates."""
    rules, mask, judged = federation.settings, toy_mask(WEIGHTS), list[Judgement]()
    for version, (records, products) in enumerate(zip(federation.records, federation.products, strict=True)):
        steps = rules.perturbations * rules.steps_of(version)
        expected = inner_products(
            mask.g_p, rules.run_id, version, lanes=rules.directions, steps=steps, stream=federation.stream
        )
        assert products == (expected if rules.measured else ())
        judged += judgements_of(version, records, products, rules)
    assert federation.judgements == judged


def check_nodes(federation: MemoryFederation) -> None:
    """Every living node stands bit for bit where the ledger ends, and nobody ended in an error."""
    assert federation.errors == []
    for node in federation.nodes.values():
        if node.alive:
            assert node.machine.version == len(federation.entries), node.name
            np.testing.assert_array_equal(
                node.replica.theta.view(np.uint32), federation.replica.theta.view(np.uint32), node.name
            )


def check(federation: MemoryFederation) -> None:
    check_ledger(federation)
    check_nodes(federation)


def heard(federation: MemoryFederation) -> list[str]:
    """Who contributed to each entry, as in "023"."""
    return ["".join(sorted(record.node[1:] for record in records)) for records in federation.records]
