"""A node dies, or hangs, in mid-round: DESIGN section 6, on a real broker."""

import signal
from datetime import datetime
from itertools import pairwise
from typing import Any

from tests.server.federation import Federation, Service

DEADLINE_S = 3.0
GRACE_S = 0.5
ROUNDS = {"count": 1_000_000, "min_nodes": 2, "quorum": 0.6, "deadline_s": DEADLINE_S, "grace_s": GRACE_S}


def moment(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()


def durations(server: Service) -> list[float]:
    """Seconds of each round by the server's own clock, from the end of the one before it."""
    ends = [moment(line) for line in server.said("round closed")]
    return [end - start for start, end in pairwise(ends)]


async def rounds_of(heard: int, server: Service, times: int = 3) -> None:
    """Wait for so many more rounds with this many updates."""
    before = len(server.said("round closed", heard=heard))
    await server.says("round closed", heard=heard, times=before + times)


async def test_a_frozen_node_delays_a_round_to_its_deadline_and_comes_back(federation: Federation) -> None:
    nodes = [federation.node(f"node-{i}") for i in range(3)]
    server = federation.server(rounds=ROUNDS | {"min_nodes": 3})
    await rounds_of(3, server)
    nodes[0].signal(signal.SIGSTOP)
    await rounds_of(2, server, times=2)
    nodes[0].signal(signal.SIGCONT)
    await rounds_of(3, server)

    closed = zip(durations(server), server.said("round closed")[1:], strict=False)
    late = [seconds for seconds, line in closed if line["heard"] == 2]
    assert len(late) >= 2
    assert all(abs(seconds - DEADLINE_S) < 1 for seconds in late), late


async def test_a_killed_node_is_waited_for_no_longer_than_its_grace(federation: Federation) -> None:
    nodes = [federation.node(f"node-{i}") for i in range(3)]
    server = federation.server(rounds=ROUNDS)
    await rounds_of(3, server)
    nodes[0].kill()
    died = await server.says("died", node="node-0")
    await rounds_of(2, server, times=20)
    after = [line for line in server.said("round closed", heard=2) if line["round"] > died["round"]]
    assert moment(after[0]) - moment(died) < GRACE_S + 1

    federation.node("node-0")
    await rounds_of(3, server)
    assert max(durations(server)) < DEADLINE_S + 1


async def test_below_quorum_nothing_is_written_until_the_node_is_back(federation: Federation) -> None:
    nodes = [federation.node(f"node-{i}") for i in range(2)]
    server = federation.server(rounds=ROUNDS | {"quorum": 1.0, "deadline_s": 0.5})
    await rounds_of(2, server)
    nodes[0].signal(signal.SIGSTOP)
    await server.says("round extended", times=2)
    before = len(server.said("round closed"))
    await server.says("round extended", times=3)
    assert len(server.said("round closed")) == before
    nodes[0].signal(signal.SIGCONT)
    await rounds_of(2, server)
    assert not server.said("round closed", heard=1)
