"""Whole federations that take what comes: slow nodes, values nodes, bad networks, and servers that are killed."""

from typing import Any

import numpy as np
import pytest

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import direction
from meerkat_mq.core.path import seeds_of
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import local_steps
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.rounds.policy import lane_of
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.worlds.federation import Federation
from tests.rounds.support import RUN
from tests.worlds.fleet import BATCH, WEIGHTS, change, check, fleet, heal, run, worsen

BUFFERED: dict[str, Any] = {"mode": "buffered", "buffer_size": 2, "max_staleness": 4, "min_nodes": 2}


def spread(federation: Federation, factor: float) -> Federation:
    """The last node's steps take `factor` times as long as the first one's."""
    for number, name in enumerate(federation.nodes):
        change(federation, name, steps_s=0.05 * factor ** (number / (len(federation.nodes) - 1)))
    return federation


def ages(federation: Federation) -> set[int]:
    return {
        version - record.version for version, records in enumerate(federation.records) for record in records
    }  # fmt: skip


def values(**codecs: Any) -> dict[str, NodeValuesConfig]:
    return {name: NodeValuesConfig(optimiser="sgd", lr=2.0, codec=codec) for name, codec in codecs.items()}


def distance(federation: Federation) -> float:
    """How far theta is from the target of all nodes, squared."""
    return float(np.square(federation.theta - direction("mk1", 0, 0, WEIGHTS)).sum())


@pytest.mark.parametrize(
    "changes", [{}, {"lanes": 2, "steps": 5}, {"staleness": "constant", "digest_every": 3}], ids=str
)
def test_slow_nodes_take_part_with_older_versions_and_all_arrive_at_the_same_bits(changes: dict[str, Any]) -> None:
    federation = spread(fleet(6, **BUFFERED | {"count": 60, "max_staleness": 15} | changes), 8.0)
    federation.start()
    run(federation)
    check(federation)
    assert ages(federation) > {0, 1}
    slow = {record.node for records in federation.records for record in records}
    assert slow == set(federation.nodes)


def test_nobody_waits_for_the_slowest() -> None:
    both = [spread(fleet(6, **{"count": 30, "quorum": 1.0} | changes), 20.0) for changes in ({}, BUFFERED)]
    for federation in both:
        federation.start()
        federation.run(1000.0)
        assert federation.finished
    waiting, taking = (federation.clock.now() for federation in both)
    assert taking < 0.2 * waiting


def test_a_partial_path_is_the_beginning_of_the_whole_one() -> None:
    federation = fleet(3, **BUFFERED | {"count": 12, "steps": 10, "max_staleness": 3, "perturbations": 2})
    rows = federation.parts["n2"].rows[:1]
    change(federation, "n2", steps_s=0.3, rows=rows)
    federation.start()
    run(federation)
    check(federation)
    paths = [record for records in federation.records for record in records if record.node == "n2"]
    (first, *_) = [record for record in paths if len(record.scalars) < 20]
    replica, rules = Replica(toy_mask(WEIGHTS), run_id=RUN, stream="mk1", digest_every=1), federation.settings
    replica.replay([(entry.terms, None) for entry in federation.entries[: first.version]])
    scalars, loss = local_steps(
        QuadraticEngine(WEIGHTS),
        replica.theta,
        seeds_of(RUN, first.version, lane_of(first.slot, rules.directions), 20),
        [[rows[row] for row in batch_rows(RUN, "n2", len(rows), BATCH, step)] for step in range(10)],
        stream="mk1",
        eps=rules.eps,
        lr=rules.lr,
    )
    assert len(first.scalars) % 2 == 0
    assert scalars[: len(first.scalars)] == first.scalars
    assert loss != first.loss  # which is of the steps that were made


@pytest.mark.parametrize("changes", [{}, {"commit_s": 0.05}, {"steps": 5, "lanes": 2}], ids=str)
def test_through_a_bad_network(changes: dict[str, Any]) -> None:
    federation = spread(fleet(6, **BUFFERED | {"count": 40} | changes), 5.0)
    federation.start()
    worsen(federation, lose=0.3, duplicate=0.3, delay=2.0)
    federation.run(500)
    heal(federation)
    run(federation)
    check(federation)
    assert federation.counts["server", "duplicate"] > 0


def test_a_server_killed_again_and_again_resumes_in_the_middle_of_the_window() -> None:
    federation = spread(fleet(6, **BUFFERED | {"count": 60, "commit_s": 0.003, "steps": 3}), 8.0)
    federation.start()
    for number in range(1, 20):
        federation.clock.at(0.197 * number, federation.kill_server)
        federation.clock.at(0.197 * number + 0.02, federation.start_server)
    run(federation)
    check(federation)
    assert federation.store.term == 20
    assert ages(federation) > {0, 1}


def test_nodes_ahead_of_a_ledger_from_a_backup_start_over() -> None:
    federation = spread(fleet(4, **BUFFERED | {"count": 30}), 4.0)
    federation.start()
    federation.run(0.6, lambda: federation.version == 3)
    backup = federation.ledger.backup()
    federation.run(0.6)
    federation.kill_server()
    assert federation.version > 3
    federation.ledger.restore(backup)
    federation.clock.at(0.7, federation.start_server)
    run(federation)
    check(federation)


@pytest.mark.parametrize("changes", [{}, BUFFERED], ids=["synchronous", "buffered"])
def test_path_nodes_and_values_nodes_in_one_federation(changes: dict[str, Any]) -> None:
    rules = {"count": 40, "steps": 3, "values_accepted": True, "lr": 0.3, "commit_s": 0.002} | changes
    federation = spread(fleet(6, values=values(n0="int8", n3="float32", n5="bfloat16"), **rules), 3.0)
    for name in federation.nodes:
        change(federation, name, rows=[{"seed": 0}])
    before = float(np.square(direction("mk1", 0, 0, WEIGHTS)).sum())
    federation.start()
    federation.clock.at(0.4, federation.kill_server)
    federation.clock.at(0.5, federation.start_server)
    federation.clock.at(0.8, federation.nodes["n3"].kill)
    federation.clock.at(0.9, federation.nodes["n3"].start)
    run(federation)
    check(federation)
    assert distance(federation) < 0.5 * before
    made = [record for records in federation.records for record in records]
    assert {record.node for record in made if record.values} == {"n0", "n3", "n5"}
    assert all(record.scalars == () for record in made if record.values)
    assert sum(entry.displacement is not None for entry in federation.entries) > 10


def test_a_displacement_that_is_lost_is_announced_again() -> None:
    federation = fleet(3, values=values(n1="int8"), count=10, values_accepted=True, min_nodes=3)
    federation.start()
    worsen(federation, lose=0.6)  # of a fetch, each of four questions or its answer
    federation.run(500)
    heal(federation)
    run(federation)
    check(federation)
    assert federation.counts["server", "values missed"] > 0


def test_a_displacement_that_is_too_large_is_refused_as_on_a_service() -> None:
    enormous = {"n1": NodeValuesConfig(optimiser="sgd", lr=1e9)}
    federation = fleet(3, values=enormous, count=4, values_accepted=True, min_nodes=3)
    federation.start()
    run(federation)
    check(federation)
    verdicts = {record.node: record.verdict for records in federation.records for record in records}
    assert verdicts == {"n0": Verdict.ACCEPTED, "n1": Verdict.TOO_LARGE, "n2": Verdict.ACCEPTED}
    assert all(entry.displacement is None for entry in federation.entries)
