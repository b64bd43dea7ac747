"""Two servers on one federation: fenced, in words."""

import signal
import socket

import pytest

from meerkat_mq.wire.descriptor import ServerState
from tests.server.federation import PACE, PATIENCE_S, Federation
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)

ROUNDS = PACE | {"min_nodes": 3}  # two nodes and a ghost


async def test_a_second_server_ends_in_words_and_a_replacing_one_fences_the_first(federation: Federation) -> None:
    eye = federation.eye
    await federation.ghost()
    nodes = [federation.node(f"node-{i}") for i in range(2)]
    first = federation.server(name="first", rounds=ROUNDS)
    await eye.reaches(3)
    old = (await eye.follows(1)).run

    second = federation.server(name="second", rounds=ROUNDS)
    await second.failed(6, f"a server on host {socket.gethostname()} says that it is online", "--replace")
    before = eye.version
    await eye.reaches(before + 3)
    assert {run.run for run in eye.runs} == {old}

    third = federation.server("--replace", name="third", rounds=ROUNDS)
    await first.failed(6, f"a server of term 2 on host {socket.gethostname()} has taken over")
    await third.says("round closed", heard=2, times=3)
    assert (await eye.follows(2)).run != old
    assert {(await eye.status(node, "online")).run for node in ("node-0", "node-1")} == {eye.runs[-1].run}
    assert federation.difference("first").version > 3
    assert not any(node.over for node in nodes)


async def test_a_server_that_slept_through_its_replacement_ends_when_it_wakes(federation: Federation) -> None:
    eye = federation.eye
    await federation.ghost()
    federation.node("node-0")
    first = federation.server(name="first", rounds=ROUNDS | {"min_nodes": 2})
    await eye.reaches(3)
    first.signal(signal.SIGSTOP)
    second = federation.server("--replace", name="second", rounds=ROUNDS | {"min_nodes": 2})
    await second.says("round closed", times=3)
    first.signal(signal.SIGCONT)
    await first.failed(6, "has taken over")
    await second.says("round closed", times=len(second.said("round closed")) + 3)
    await eye.follows(2)


async def test_what_a_power_cut_left_on_the_broker_is_no_rival(federation: Federation) -> None:
    """The broker calls a predecessor online: the last one, or one before, where the last had said nothing yet."""
    eye = federation.eye
    first = federation.server(rounds=PACE)
    state = await eye.follows(1)
    for term in (2, 3):
        first.kill()
        await eye.state("lost")
        await federation.retain("server", state.encode())
        first = federation.server(rounds=PACE)
        await first.says("asking whether the server before this one lives", term=1)
        await first.says("in charge", term=term)
        assert (await eye.follows(term)).run == state.run


async def test_a_lost_run_stays_on_the_broker_until_somebody_says_otherwise(federation: Federation) -> None:
    eye, pace = federation.eye, PACE | {"min_nodes": 5}
    lost = ServerState(status="lost", run="1" * 32, term=3, server_id="0" * 16, link=1, host="burned", round=7, nodes=0)
    await federation.retain("server", lost.encode())
    for name in ("empty", "as empty"):
        await federation.server(name=name, rounds=pace).failed(6, "holds no run", "11111111")
        assert eye.states == []
    federation.server("--replace", name="new", rounds=pace)
    assert (await eye.state("online")).term == 4


async def test_a_server_puts_right_what_stands_on_its_topics(federation: Federation) -> None:
    eye = federation.eye
    await federation.ghost()
    server = federation.server(rounds=ROUNDS)
    state = await eye.follows(1)
    run = eye.runs[-1]
    for payload in (b"", b"nonsense", state.model_copy(update={"status": "lost"}).encode()):
        before = len(eye.states)
        await federation.retain("server", payload)
        await eye.sees_states(before + 1)
        assert (eye.states[-1].status, eye.states[-1].server_id) == ("online", state.server_id)
    await federation.retain("run", b"")
    await federation.node("node-0").says("ready")  # told by the server, for it said that it knows no run

    stranger = run.model_copy(update={"run": "0" * 32})
    await federation.retain("run", stranger.encode())
    await until(lambda: stranger.run in {status.run for status in eye.statuses["node-0"]}, within_s=PATIENCE_S)
    federation.node("node-1")
    await server.says("round closed", heard=2)


async def test_a_server_that_cannot_have_a_higher_term_says_so(federation: Federation) -> None:
    last = ServerState(status="stopped", run="0" * 32, term=2**32 - 1, server_id="0" * 16, link=0, host="x", round=0)
    await federation.retain("server", last.encode())
    await federation.server(rounds=ROUNDS).failed(6, "f/server: the last possible term", "clear this retained message")
