"""A federation of real processes, from its start to its end."""

import pytest

from meerkat_mq.core.path import digest
from tests.server.federation import PACE, Federation, all_end
from tests.support import waiting

pytestmark = pytest.mark.timeout(150)


async def test_a_federation_runs_to_its_end_and_all_hold_the_same_weights(federation: Federation) -> None:
    nodes = [federation.node(f"node-{i}", exit_when_finished=True) for i in range(3)]
    rounds = {"count": 25, "directions": 3, "local_steps": 2, "lr": 0.5, "min_nodes": 3}
    server = federation.server("--once", rounds=rounds, toy_weights=50)
    assert await all_end(server, *nodes) == [0, 0, 0, 0]

    difference = federation.difference()
    assert difference.version == 25
    (last,) = server.said("run finished")
    digests = [node.said("finished")[0]["digest"] for node in nodes]
    assert set(digests) == {last["digest"]} == {(await federation.eye.digest(25)).hex()}
    assert (await federation.eye.state("finished")).round == 25
    statuses = [await federation.eye.status(f"node-{i}", "stopped") for i in range(3)]
    assert {status.digest for status in statuses} == {last["digest"]}

    with federation.ledger() as ledger:
        seen = {row.node: row for row in ledger.nodes()}
    assert seen.keys() == {f"node-{i}" for i in range(3)}
    for row in seen.values():
        assert row.status in ("online", "stopped")
        assert row.rows == 8
        assert row.updates >= 25
        assert row.packet_bytes > 25 * 60
        assert 0 < (row.first_seen or 0) <= (row.last_seen or 0)

    closed = server.said("round closed")
    assert [line["heard"] for line in closed] == [3] * 25
    assert closed[-1]["loss"] < 0.9 * closed[0]["loss"]


async def test_processes_end_in_order_on_sigterm(federation: Federation) -> None:
    eye = federation.eye
    await federation.ghost()
    first = federation.node("node-0")
    server = federation.server(rounds=PACE | {"min_nodes": 3})
    await server.says("waiting for nodes", online=2, min_nodes=3)
    assert eye.version == 0
    second, third = federation.node("node-1"), federation.node("node-2")
    await server.says("round closed", heard=3)

    first.stop()
    assert await first.ended() == 0
    assert (await eye.status("node-0", "stopped")).boot == eye.statuses["node-0"][0].boot
    before = eye.version
    await eye.reaches(before + 5)  # the round goes on without the node that left

    server.stop()
    assert await server.ended() == 0
    difference = federation.difference()
    state = await eye.state("stopped")
    assert state.round == difference.version
    assert await eye.digest(difference.version) == server_digest(federation)

    second.stop()
    third.stop()
    assert await all_end(second, third) == [0, 0]
    for node in ("node-1", "node-2"):
        last = await eye.status(node, "stopped")
        assert last.version > before
        assert last.digest == (await eye.digest(last.version)).hex()
    assert [service.plain for service in (first, second, third, server)] == [[], [], [], []]


def server_digest(federation: Federation) -> bytes:
    return digest(federation.difference().theta)


async def test_once_ends_in_words_when_too_few_nodes_come(federation: Federation) -> None:
    wait_s = int(2 * waiting.patience)  # it is to be in charge by then
    server = federation.server("--once", rounds={"min_nodes": 2}, wait_for_nodes_s=wait_s)
    await server.failed(6, "federation f", f"0 of 2 nodes came within {wait_s} s", "rounds.min_nodes")
    await federation.eye.state("stopped")
    assert not (federation.folder / "server" / "difference.mkd").exists()


async def test_a_server_stays_for_later_nodes_after_its_run(federation: Federation) -> None:
    server = federation.server(rounds={"count": 60})
    await federation.node("node-0", exit_when_finished=True).says("finished")
    await server.says("run finished")
    late = federation.node("node-1", exit_when_finished=True)
    assert await late.ended() == 0
    await server.says("model saved")
    assert late.said("finished")[0]["digest"] == server_digest(federation).hex()
    assert not server.over
