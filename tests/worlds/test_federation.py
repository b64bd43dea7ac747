"""Whole federations: learning, faults one at a time, and what each may cost."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.directions import direction
from meerkat_mq.wire.frames import decode
from meerkat_mq.wire.messages import Chunk, Offer
from meerkat_mq.worlds.broker import VirtualMessage
from meerkat_mq.worlds.federation import Federation
from tests.worlds.fleet import WEIGHTS, change, check, counted, fleet, heal, run, settle, taken, worsen


def miss(federation: Federation) -> float:
    """How far theta is from the middle of the nodes' targets, squared."""
    targets = [direction("mk1", part.rows[0]["seed"], 0, WEIGHTS) for part in federation.parts.values()]
    return float(np.square(federation.theta - np.mean(targets, axis=0)).sum())


@pytest.mark.parametrize("stream", ["mk1", "rademacher"])
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_federation_learns_and_all_arrive_at_the_same_bits(lanes: int, steps: int, stream: str) -> None:
    federation = fleet(lanes=lanes, steps=steps, stream=stream, count=200 // steps, lr=0.3)
    for name, part in federation.parts.items():
        change(federation, name, rows=part.rows[:1])
    federation.start()
    before = miss(federation)
    run(federation)
    check(federation)
    assert miss(federation) < 0.5 * before
    assert {(term.lane, term.step) for entry in federation.entries for term in entry.terms} == {
        (lane, step) for lane in range(lanes) for step in range(steps)
    }


def test_in_good_weather_a_round_costs_one_update_a_node_and_nothing_is_remarkable() -> None:
    routed = list[VirtualMessage]()
    federation = fleet(routed=routed.append, count=20)
    federation.start()
    federation.run(1.0)
    run(federation, 0.0)
    topics = Counter(message.topic.removeprefix("meerkat/v1/world/") for message in routed)
    assert all(topics[f"up/n{k}/update"] == 20 and topics[f"up/n{k}/want"] == 0 for k in range(4))
    assert topics["round"] <= 20 + 2 + 4  # one a version and birth
    assert federation.counts == Counter()
    assert all(node.driver is not None and node.driver.counts == Counter() for node in federation.nodes.values())


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
    federation = fleet(**changes)
    federation.start()
    worsen(federation, lose=0.3, duplicate=0.3, delay=4.0)
    federation.run(5000)
    heal(federation)
    run(federation)
    check(federation)
    assert federation.counts["server", "duplicate"] > 0


def test_a_killed_node_holds_a_round_up_for_its_grace_and_takes_part_when_it_is_back() -> None:
    federation = fleet(count=200)
    federation.start()
    federation.clock.at(0.105, federation.nodes["n2"].kill)
    federation.clock.at(2.5, federation.nodes["n2"].start)
    run(federation)
    check(federation)
    assert [r for r in taken(federation) if r != "0123"] == ["013"] * taken(federation).count("013")
    assert taken(federation)[0] == taken(federation)[-1] == "0123"
    assert 2.1 < federation.clock.now() < 2.1 + 200 * 0.02 + 5


def test_a_frozen_node_holds_a_round_up_until_the_deadline_and_takes_part_in_the_next() -> None:
    federation = fleet(count=6)
    federation.start()
    federation.clock.at(0.02, federation.nodes["n1"].freeze)
    settle(federation, 1.0)
    stuck = len(federation.entries)
    settle(federation, 8.9)
    assert len(federation.entries) == stuck
    settle(federation, 0.2)
    assert taken(federation) == ["0123"] * stuck + ["023"]
    federation.nodes["n1"].thaw()
    settle(federation, 1.0)
    check(federation)
    assert taken(federation) == ["0123"] * stuck + ["023"] + ["0123"] * (5 - stuck)


def test_nodes_join_and_leave_as_they_like() -> None:
    federation = fleet(6, min_nodes=2, count=100, quorum=1.0)
    federation.start_server()
    for number, name in enumerate(federation.nodes):
        federation.clock.at(0.05 * number, federation.nodes[name].start)
    federation.clock.at(0.404, federation.nodes["n0"].leave)
    federation.clock.at(0.509, federation.nodes["n4"].leave)
    federation.clock.at(0.8, federation.nodes["n0"].start)
    run(federation)
    check(federation)
    assert taken(federation)[0] == "01"
    assert {"012345", "12345", "1235", "01235"} <= set(taken(federation))
    assert taken(federation)[-1] == "01235"
    assert federation.clock.now() < 10  # nobody waited for those who left


def test_without_a_quorum_nothing_is_written_until_it_is_back() -> None:
    federation = fleet(quorum=0.75, count=5, min_nodes=3)
    federation.start()
    for name in ("n0", "n1"):
        federation.clock.at(0.01, federation.nodes[name].kill)
    settle(federation, 1190)
    assert federation.entries == []
    assert federation.counts["server", "round extended"] == 14  # 10 + 20 + 40 + 80, then 100 s each
    federation.nodes["n0"].start()
    back = federation.clock.now()
    run(federation)
    check(federation)
    assert taken(federation) == ["023"] * 5
    assert federation.clock.now() < back + 10


def test_a_node_with_another_theta_is_refused_and_comes_back_to_the_right_one() -> None:
    federation = fleet(count=20)
    federation.start()

    def corrupt() -> None:
        model = federation.nodes["n3"].model
        assert model is not None
        model.go_to((direction("mk1", 1, 0, WEIGHTS), model.place[1]))

    federation.clock.at(0.1, corrupt)
    run(federation)
    check(federation)
    assert counted(federation, "n3", "digest differs") + counted(federation, "n3", "refused: resynchronise") >= 1
    assert counted(federation, "n3", "resynchronised") == 1
    assert taken(federation)[-1] == "0123"


def test_an_update_heard_survives_its_node_and_its_server() -> None:
    federation = fleet(count=2, quorum=1.0)
    change(federation, "n3", steps_s=1.0)
    federation.start()
    federation.clock.at(0.5, federation.nodes["n0"].kill)
    federation.clock.at(0.6, federation.kill_server)
    federation.clock.at(0.7, federation.start_server)
    settle(federation, 0.65)
    first = {record.node: record for record in federation.store.open_updates()}
    assert set(first) == {"n0", "n1", "n2"}
    change(federation, "n0", rows=[{"seed": 9999}])  # started again, it would answer something else
    federation.clock.at(1.0, federation.nodes["n0"].start)
    run(federation)
    check(federation)
    assert {r.node: r for r in federation.records[0] if r.node in first} == first
    assert taken(federation) == ["0123", "0123"]
    assert federation.nodes["n1"].store.steps == {
        federation.settings.run_id.hex(): 2
    }  # sent again under the new term, not computed again


def test_a_server_killed_again_and_again_resumes() -> None:
    federation = fleet(count=30, commit_s=0.003)
    federation.start()
    for number in range(1, 20):
        federation.clock.at(0.097 * number, federation.kill_server)
        federation.clock.at(0.097 * number + 0.02, federation.start_server)
    run(federation)
    check(federation)
    assert federation.store.term == 20
    assert set(taken(federation)) == {"0123"}


@pytest.mark.parametrize("keep", [0, 3])
def test_nodes_ahead_of_a_ledger_from_a_backup_start_over_loudly(keep: int) -> None:
    federation = fleet(count=15)
    federation.start()
    federation.run(0.1, lambda: len(federation.ledger.slots) == 4 and federation.version == keep)
    backup = federation.ledger.backup()
    federation.run(0.1)
    federation.kill_server()
    assert federation.version > keep
    federation.ledger.restore(backup)
    federation.clock.at(0.2, federation.start_server)
    run(federation)
    check(federation)
    assert [counted(federation, name, "resynchronised") for name in federation.nodes] == [1] * 4


def test_many_nodes_and_a_fraction_of_them_a_round() -> None:
    federation = fleet(40, fraction=0.25, count=30, lanes=4)
    federation.start()
    run(federation)
    check(federation)
    assert {len(records) for records in federation.records} == {10}
    assert len({record.node for records in federation.records for record in records}) == 40
    assert np.std(list(Counter(r.node for records in federation.records for r in records).values())) < 4


def test_a_node_that_comes_late_takes_a_snapshot() -> None:
    routed = list[VirtualMessage]()
    federation = fleet(routed=routed.append, count=100, min_nodes=3, steps=50, snapshot_every=20)
    federation.start_server()
    for name in ("n0", "n1", "n2"):
        federation.nodes[name].start()
    federation.run(1000.0, lambda: federation.version == 70)
    federation.nodes["n3"].start()
    run(federation)
    check(federation)
    assert set(federation.ledger.snapshots) == {80, 100}
    answers = [decode(message.payload) for message in routed if message.topic == "meerkat/v1/world/down/n3/reply"]
    assert [answer.version for answer in answers if isinstance(answer, Offer)] == [60]
    assert any(isinstance(answer, Chunk) for answer in answers)
    assert taken(federation)[-1] == "0123"
