"""Whole federations: learning, faults one at a time, and what each may cost."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.directions import direction
from meerkat_mq.engines.toy import QuadraticEngine
from meerkat_mq.rounds.memory import MemoryFederation
from meerkat_mq.wire.frames import Round, Update, Want
from tests.rounds.fleet import WEIGHTS, Network, check, fleet, heal, heard, run


def miss(federation: MemoryFederation) -> float:
    """How far theta is from the middle of the nodes' targets, squared."""
    targets = [direction("mk1", node.rows[0]["seed"], 0, WEIGHTS) for node in federation.nodes.values()]
    return float(np.square(federation.replica.theta - np.mean(targets, axis=0)).sum())


@pytest.mark.parametrize("stream", ["mk1", "rademacher"])
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_federation_learns_and_all_arrive_at_the_same_bits(lanes: int, steps: int, stream: str) -> None:
    federation = fleet(lanes=lanes, steps=steps, stream=stream, count=200 // steps, lr=0.3)
    for node in federation.nodes.values():
        node.rows = node.rows[:1]
    before = miss(federation)
    federation.start()
    run(federation)
    check(federation)
    assert miss(federation) < 0.5 * before
    assert {(term.lane, term.step) for entry in federation.entries for term in entry.terms} == {
        (lane, step) for lane in range(lanes) for step in range(steps)
    }


def test_in_good_weather_a_round_costs_one_update_a_node_and_nothing_is_remarkable() -> None:
    network = Network(0)
    federation = fleet(deliver=network, count=20)
    federation.start()
    federation.run(1.0)
    run(federation, 0.0)
    kinds = Counter((sender, type(frame)) for sender, _, frame in network.sent)
    assert all(kinds[f"n{k}", Update] == 20 and kinds[f"n{k}", Want] == 0 for k in range(4))
    assert kinds["server", Round] <= 4 * (20 + 2 + 4)  # one a version and birth, to each node
    assert federation.counts == Counter()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"digest_every": 3},
        {"weigh_by_rows": True, "lanes": 2},
        {"fraction": 0.5},
        {"commit_s": 0.05},
        {"steps": 100, "lanes": 2},  # an entry longer than a round frame takes
    ],
    ids=str,
)
def test_through_a_bad_network(changes: dict[str, Any]) -> None:
    network = Network(7, loss=0.3, repeat=0.3, slow_s=4.0)
    federation = fleet(deliver=network, **changes)
    federation.start()
    federation.run(5000)
    heal(federation, network)
    run(federation)
    check(federation)
    assert federation.counts["n0", "duplicate"] > 0


def test_a_killed_node_holds_a_round_up_for_its_grace_and_takes_part_when_it_is_back() -> None:
    federation = fleet(count=200)
    federation.start()
    federation.at(0.105, partial(federation.crash, "n2"))
    federation.at(2.5, partial(federation.start_node, "n2"))
    run(federation)
    check(federation)
    assert [r for r in heard(federation) if r != "0123"] == ["013"] * heard(federation).count("013")
    assert heard(federation)[0] == heard(federation)[-1] == "0123"
    assert 2.1 < federation.now < 2.1 + 200 * 0.02 + 5


def test_a_frozen_node_holds_a_round_up_until_the_deadline_and_takes_part_in_the_next() -> None:
    federation = fleet(count=6)
    federation.start()
    federation.at(0.02, partial(federation.freeze, "n1"))
    federation.settle(1.0)
    stuck = len(federation.entries)
    federation.settle(8.9)
    assert len(federation.entries) == stuck
    federation.settle(0.2)
    assert heard(federation) == ["0123"] * stuck + ["023"]
    federation.thaw("n1")
    federation.settle(1.0)
    check(federation)
    assert heard(federation) == ["0123"] * stuck + ["023"] + ["0123"] * (5 - stuck)


def test_nodes_join_and_leave_as_they_like() -> None:
    federation = fleet(6, min_nodes=2, count=100, quorum=1.0)
    federation.start_server()
    for number, name in enumerate(federation.nodes):
        federation.at(0.05 * number, partial(federation.start_node, name))
    federation.at(0.404, partial(federation.leave, "n0"))
    federation.at(0.509, partial(federation.leave, "n4"))
    federation.at(0.8, partial(federation.start_node, "n0"))
    run(federation)
    check(federation)
    assert heard(federation)[0] == "01"
    assert {"012345", "12345", "1235", "01235"} <= set(heard(federation))
    assert heard(federation)[-1] == "01235"
    assert federation.now < 10  # nobody waited for those who left


def test_without_a_quorum_nothing_is_written_until_it_is_back() -> None:
    federation = fleet(quorum=0.75, count=5, min_nodes=3)
    federation.start()
    for name in ("n0", "n1"):
        federation.at(0.005, partial(federation.crash, name))
    federation.settle(1190)
    assert federation.entries == []
    assert federation.counts["server", "round extended"] == 14  # 10 + 20 + 40 + 80, then 100 s each
    federation.start_node("n0")
    back = federation.now
    run(federation)
    check(federation)
    assert heard(federation) == ["023"] * 5
    assert federation.now < back + 10


def test_a_node_with_another_theta_is_refused_and_comes_back_to_the_right_one() -> None:
    federation = fleet(count=20)
    federation.start()

    def corrupt() -> None:
        federation.nodes["n3"].replica.theta = direction("mk1", 1, 0, WEIGHTS)

    federation.at(0.1, corrupt)
    run(federation)
    check(federation)
    assert federation.counts["n3", "digest differs"] + federation.counts["n3", "refused: resynchronise"] >= 1
    assert federation.counts["n3", "resynchronised"] == 1
    assert heard(federation)[-1] == "0123"


def test_an_update_heard_survives_its_node_and_its_server() -> None:
    federation = fleet(count=2, quorum=1.0)
    federation.nodes["n3"].step_s = 1.0
    federation.start()
    federation.at(0.5, partial(federation.crash, "n0"))
    federation.at(0.6, federation.crash_server)
    federation.at(0.7, federation.start_server)
    federation.settle(0.65)
    first = {record.node: record for record in federation.updates}
    assert set(first) == {"n0", "n1", "n2"}
    federation.nodes["n0"].engine = QuadraticEngine(WEIGHTS)
    federation.nodes["n0"].rows = [{"seed": 9999}]  # started again, it would answer something else
    federation.at(1.0, partial(federation.start_node, "n0"))
    run(federation)
    check(federation)
    assert {r.node: r for r in federation.records[0] if r.node in first} == first
    assert heard(federation) == ["0123", "0123"]
    assert federation.nodes["n1"].steps_done == 2  # sent again under the new term, not computed again


def test_a_server_killed_again_and_again_resumes() -> None:
    federation = fleet(count=30, commit_s=0.003)
    federation.start()
    for number in range(1, 20):
        federation.at(0.097 * number, federation.crash_server)
        federation.at(0.097 * number + 0.02, federation.start_server)
    run(federation)
    check(federation)
    assert federation.term == 20
    assert set(heard(federation)) == {"0123"}


@pytest.mark.parametrize("keep", [0, 3])
def test_nodes_ahead_of_a_ledger_from_a_backup_start_over_loudly(keep: int) -> None:
    federation = fleet(count=15)
    federation.start()
    federation.at(0.1, federation.crash_server)
    federation.at(0.2, partial(federation.start_server, keep))
    federation.run(0.15)
    assert len(federation.entries) > keep
    run(federation)
    check(federation)
    assert [federation.counts[name, "resynchronised"] for name in federation.nodes] == [1] * 4


def test_many_nodes_and_a_fraction_of_them_a_round() -> None:
    federation = fleet(40, fraction=0.25, count=30, lanes=4)
    federation.start()
    run(federation)
    check(federation)
    assert {len(records) for records in federation.records} == {10}
    assert len({record.node for records in federation.records for record in records}) == 40
    assert np.std(list(Counter(r.node for records in federation.records for r in records).values())) < 4
