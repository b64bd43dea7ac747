"""A node dies, or hangs, in mid-round: DESIGN section 6, on a real broker."""

import signal
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest

from tests.server.federation import PATIENCE_S, Federation, Service
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)
DEADLINE_S = 3.0
GRACE_S = 0.5
ROUNDS = {"count": 1_000_000, "min_nodes": 3, "quorum": 0.6, "deadline_s": DEADLINE_S, "grace_s": GRACE_S}


def moment(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()


async def rounds_of(heard: int, server: Service, times: int = 2) -> None:
    """Wait for so many more rounds with this many updates."""
    await server.says("round closed", heard=heard, times=len(server.said("round closed", heard=heard)) + times)


async def hangs(federation: Federation, node: Service) -> None:
    """Freeze a node, and wait until a round has heard all but it."""
    node.signal(signal.SIGSTOP)
    eye = federation.eye
    await until(lambda: [len(r.asked - r.heard) for r in eye.rounds if r.heard][-1:] == [1], within_s=PATIENCE_S)


async def test_a_frozen_node_delays_a_round_to_its_deadline_and_comes_back(federation: Federation) -> None:
    nodes = [federation.node(f"node-{i}") for i in range(3)]
    server = federation.server(rounds=ROUNDS)
    await rounds_of(3, server)
    await hangs(federation, nodes[0])
    await rounds_of(2, server)
    nodes[0].signal(signal.SIGCONT)
    await rounds_of(3, server)

    closed = server.said("round closed")
    late = [moment(line) - moment(before) for before, line in pairwise(closed) if line["heard"] == 2]
    assert len(late) >= 2
    assert all(abs(seconds - DEADLINE_S) < 1 for seconds in late), late


async def test_a_killed_node_is_waited_for_no_longer_than_its_grace(federation: Federation) -> None:
    nodes = [federation.node(f"node-{i}") for i in range(3)]
    server = federation.server(rounds=ROUNDS)
    await rounds_of(3, server)
    await hangs(federation, nodes[0])
    nodes[0].kill()
    died = await server.says("died", node="node-0")
    last = await server.says("round closed", round=died["round"])
    assert last["heard"] == 2
    assert moment(last) - moment(died) < GRACE_S + 1
    assert server.said("round closed")[-1] == last  # no round opens with less than min_nodes

    federation.node("node-0")
    await rounds_of(3, server)


async def test_below_quorum_nothing_is_written_until_the_node_is_back(federation: Federation) -> None:
    nodes = [federation.node(f"node-{i}") for i in range(2)]
    server = federation.server(rounds=ROUNDS | {"min_nodes": 2, "quorum": 1.0, "deadline_s": 0.5})
    await rounds_of(2, server)
    nodes[0].signal(signal.SIGSTOP)
    await server.says("round extended", times=2)
    before = len(server.said("round closed"))
    await server.says("round extended", times=3)
    assert len(server.said("round closed")) == before
    nodes[0].signal(signal.SIGCONT)
    await rounds_of(2, server)
    assert not server.said("round closed", heard=1)
