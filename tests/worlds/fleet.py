"""Whole federations in memory: how tests make them, disturb them, and judge them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.path import digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.rounds.early_stopping import judgements_of
from meerkat_mq.rounds.policy import fewest_needed, shares_of, terms_of
from meerkat_mq.rounds.records import Judgement
from meerkat_mq.worlds.broker import LinkConditions, VirtualMessage
from meerkat_mq.worlds.federation import Federation, NodePart
from tests.rounds.support import settings

WEIGHTS = 24
BATCH = 2


def fleet(
    size: int = 4,
    *,
    values: Mapping[str, NodeValuesConfig] | None = None,
    commit_s: float = 0.0,
    routed: Callable[[VirtualMessage], None] = lambda message: None,
    **changes: Any,
) -> Federation:
    """`size` toy nodes n0, n1, … with 4, 5, … rows of their own; `changes` to the settings."""
    mask = toy_mask(WEIGHTS)
    parts = [
        NodePart(
            f"n{k}",
            QuadraticEngine(WEIGHTS),
            [{"seed": 100 * k + row} for row in range(4 + k)],
            values=(values or {}).get(f"n{k}"),
        )
        for k in range(size)
    ]
    plain = {
        "mask_hash": mask.hash, "min_nodes": size, "quorum": 0.5, "deadline_s": 10.0, "grace_s": 2.0, "lr": 0.1,
        "batch_size": BATCH,
    }  # fmt: skip
    return Federation(settings(**plain | changes), mask, parts, commit_s=commit_s, routed=routed)


def change(federation: Federation, name: str, **changes: Any) -> None:
    """Give a node other data or times from its next start on."""
    federation.parts[name] = replace(federation.parts[name], **changes)


def worsen(federation: Federation, *, lose: float = 0.0, duplicate: float = 0.0, delay: float = 0.0) -> None:
    """Let every node's link lose, duplicate, delay and reorder messages."""
    for node in federation.nodes.values():
        node.client.conditions = LinkConditions(lose, duplicate, delay, reorder=1.0)


def heal(federation: Federation) -> None:
    """Mend the links; every node connects anew."""
    for name, node in federation.nodes.items():
        node.client.conditions = None
        federation.reconnect(name)


def settle(federation: Federation, seconds: float) -> None:
    """Let virtual time pass, also after the run is finished."""
    federation.clock.run(federation.clock.now() + seconds)


def run(federation: Federation, seconds: float = 1000.0) -> Federation:
    """Run to the end, and let the last words arrive."""
    federation.run(federation.clock.now() + seconds)
    settle(federation, 5.0)
    assert federation.finished, f"stands at {federation.version} after {federation.clock.now()} s"
    return federation


def theta_of(federation: Federation, name: str) -> Float32Array:
    """A node's theta, float32 (n,)."""
    model = federation.nodes[name].model
    assert model is not None
    return model.place[0]


def counted(federation: Federation, name: str, reason: str) -> int:
    """How often a node counted something in its present life."""
    driver = federation.nodes[name].driver
    assert driver is not None
    return driver.counts[reason]


def check_ledger(federation: Federation) -> None:
    """The ledger is a chain of what its records say, and leads from theta_0 to the server's theta."""
    rules, mask, entries = federation.settings, toy_mask(WEIGHTS), federation.entries
    replica = Replica(mask, run_id=rules.run_id, stream=rules.stream, digest_every=rules.digest_every)
    digests = replica.replay(federation.store.changes(entries, mask.size))
    assert [entry.previous for entry in entries[:1]] in ([], [rules.mask_hash])
    assert all(later.previous == entry.hash(rules.run_id) for entry, later in pairwise(entries))
    for version, (entry, records) in enumerate(zip(entries, federation.records, strict=True)):
        assert entry.version == version
        assert entry.terms == terms_of(records, rules, version)
        assert entry.digest == digests[version]
        assert (entry.displacement is None) == (shares_of(records, rules, version) == ())
        assert all(0 <= version - record.version <= rules.max_staleness for record in records)
        assert len(records) >= (1 if rules.buffered else fewest_needed(rules, version))
    for what in ("node", "slot"):
        places = [(record.version, getattr(record, what)) for records in federation.records for record in records]
        assert len(set(places)) == len(places)
    check_judgements(federation)
    assert digest(federation.theta) == digest(replica.theta)


def check_judgements(federation: Federation) -> None:
    """The ledger's products are those of the seeds, and its judgements those of products and updates."""
    rules, mask, judged = federation.settings, toy_mask(WEIGHTS), list[Judgement]()
    for version, (records, products) in enumerate(zip(federation.records, federation.products, strict=True)):
        steps = rules.perturbations * rules.steps_of(version)
        expected = inner_products(
            mask.g_p, rules.run_id, version, lanes=rules.directions, steps=steps, stream=rules.stream
        )
        assert products == (expected if rules.measured else ())
        judged += judgements_of(version, records, products, rules)
    assert federation.judgements == judged


def check_nodes(federation: Federation) -> None:
    """Every living node stands bit for bit where the ledger ends, and nobody ended in an error."""
    assert federation.errors == []
    for name, node in federation.nodes.items():
        if node.alive:
            assert node.driver is not None
            assert node.driver.machine is not None
            assert node.driver.machine.version == federation.version, name
            theta = theta_of(federation, name)
            np.testing.assert_array_equal(theta.view(np.uint32), federation.theta.view(np.uint32), name)


def check(federation: Federation) -> None:
    check_ledger(federation)
    check_nodes(federation)


def taken(federation: Federation) -> list[str]:
    """Who contributed to each entry, as in "023"."""
    return ["".join(sorted(record.node[1:] for record in records)) for records in federation.records]
