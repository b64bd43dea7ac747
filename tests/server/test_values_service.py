"""Buffered runs and values nodes over MQTT: all end with one theta, the ledger verifies, a killed server goes on."""

import signal
from typing import Any

import pytest

from meerkat_mq.ledger.inspect import run_shown
from tests.server.federation import Federation, Service, all_end
from tests.server.replay import verified

pytestmark = pytest.mark.timeout(150)

ROUNDS = {"min_nodes": 7, "quorum": 1.0, "deadline_s": 600.0, "local_steps": 3, "directions": 2, "count": 8}
BUFFERED = ROUNDS | {"mode": "buffered", "buffer_size": 4, "max_staleness": 4, "deadline_s": 5.0}
ACCEPT = {"accept": True}
UPLINKS: list[dict[str, Any]] = [
    *[{}] * 4,
    *[{"uplink": "values", "values": {"codec": "int8", "lr": 0.05}}] * 2,
    {"uplink": "values", "values": {"codec": "float32", "lr": 0.05}},
]
WEIGHTS = 50_000  # float32 displacements of several chunks


def start(federation: Federation, *flags: str, rounds: dict[str, Any], **settings: Any) -> Service:
    return federation.server(*flags, rounds=rounds, toy_weights=WEIGHTS, values=ACCEPT, **settings)


def start_nodes(federation: Federation, *uplinks: dict[str, Any]) -> list[Service]:
    return [
        federation.node(f"node-{index}", seed=11 + index, exit_when_finished=True, **settings)
        for index, settings in enumerate(uplinks)
    ]


async def check_the_end(federation: Federation, server: Service, nodes: list[Service]) -> None:
    """All came to the end that the ledger gives."""
    assert await all_end(server, *nodes) == [0] * (1 + len(nodes)), [service.plain for service in (server, *nodes)]
    with federation.ledger() as ledger:
        expected = verified(ledger).hex()
    assert server.said("run finished")[0]["digest"] == expected
    assert {node.said("finished")[0]["digest"] for node in nodes} == {expected}


@pytest.mark.parametrize("rounds", [ROUNDS, BUFFERED], ids=["synchronous", "buffered"])
async def test_path_nodes_and_values_nodes_of_two_codecs_end_with_one_theta(
    federation: Federation, rounds: dict[str, Any]
) -> None:
    nodes, server = start_nodes(federation, *UPLINKS), start(federation, "--once", rounds=rounds)
    await check_the_end(federation, server, nodes)
    with federation.ledger() as ledger:
        entries = ledger.entries(0, 99)
        records = [record for version in range(8) for record in ledger.records(version)]
        assert {record.values is not None for record in records if record.node in ("node-4", "node-6")} == {True}
        assert {record.values is not None for record in records if record.node == "node-0"} == {False}
        if rounds is ROUNDS:
            assert all(entry.displacement for entry in entries)
            assert len(records) == 7 * 8
            closed = server.said("round closed")
            assert closed[-1]["loss"] < closed[0]["loss"]


async def test_a_buffered_run_does_not_wait_for_its_slow_node_and_still_takes_what_it_sends(
    federation: Federation,
) -> None:
    rounds = BUFFERED | {"count": 60, "buffer_size": 2, "min_nodes": 3, "local_steps": 20, "max_staleness": 30}
    server = start(federation, "--once", rounds=rounds)
    slow: dict[str, Any] = {"limits": {"cpu_share": 0.15}}
    nodes = [
        federation.node(f"node-{index}", seed=11 + index, exit_when_finished=True, **settings)
        for index, settings in enumerate(({}, {}, slow))
    ]
    await server.says("mode")
    assert server.said("mode")[0]["how"].startswith("buffered: 2 updates close a version")
    await check_the_end(federation, server, nodes)
    with federation.ledger() as ledger:
        ages = {
            node: [entry - record.version for entry, record in ledger.updates(0, 99, node) if entry is not None]
            for node in ("node-0", "node-1", "node-2")
        }
        shown = run_shown(ledger)
    assert all(ages.values())
    assert max(ages["node-2"]) > 0
    assert len(ages["node-2"]) < max(len(ages["node-0"]), len(ages["node-1"]))
    assert shown.staleness is not None
    assert shown.staleness > 0


@pytest.mark.parametrize(
    ("rounds", "life"),
    [
        (ROUNDS, "blob before 5"),
        (ROUNDS, "entry after 3"),
        (BUFFERED, "updates before 6"),
        (BUFFERED, "entry before 2"),
    ],
)
async def test_a_server_killed_around_a_displacement_goes_on(
    federation: Federation, rounds: dict[str, Any], life: str
) -> None:
    rounds = rounds | {"min_nodes": 3}
    nodes = start_nodes(federation, UPLINKS[0], UPLINKS[4], UPLINKS[6])
    first = start(
        federation, "--once", rounds=rounds, module="tests.server.killed", environment={"MEERKAT_KILL": life}
    )  # fmt: skip
    assert await first.ended() == -signal.SIGKILL, first.plain
    await check_the_end(federation, start(federation, "--once", rounds=rounds), nodes)


async def test_who_comes_late_gets_the_displacements_of_entries_and_snapshots(federation: Federation) -> None:
    rounds = ROUNDS | {"count": 12, "snapshot_every": 5, "min_nodes": 2}
    nodes, server = start_nodes(federation, UPLINKS[0], UPLINKS[4]), start(federation, rounds=rounds)
    await server.says("run finished")
    late = federation.node("late", exit_when_finished=True)
    assert await all_end(late, *nodes) == [0] * 3, late.plain
    assert late.said("finished")[0]["digest"] == server.said("run finished")[0]["digest"]
