"""Duty-cycled nodes, as the server sees them: asked while they sleep, and dead only when they do not come back."""

from meerkat_mq.rounds import events as e
from tests.rounds.support import AnsweredServer, answered_server, reasons


def asleep(server: AnsweredServer, now: float, node: str, wakes_in_s: int, link: int = 1) -> list[e.ServerEffect]:
    return server.born(now, node, word="asleep", wakes_in_s=wakes_in_s, link=link)


def test_a_node_asleep_is_asked_and_awaited_until_it_should_be_back_and_then_dead() -> None:
    server = answered_server(quorum=0.5, deadline_s=1000.0)
    server.born(0, "a", "b")
    asleep(server, 1, "b", 50)
    server.update(2, "a")
    server.tick(60.9)
    assert server.machine.version == 0
    assert server.machine.wake_at == 61.0  # 1 + 50 and 10 s of grace
    server.tick(61)
    assert server.machine.version == 1
    assert not server.round.is_open  # two nodes are needed, and one is dead


def test_a_round_opens_with_a_node_that_is_asleep_and_hears_it_when_it_wakes() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    asleep(server, 1, "b", 50)
    server.update(2, "a")
    server.born(40, "b", link=2)
    server.update(41, "b")
    assert server.round.header.version == 1
    asleep(server, 42, "b", 50, link=2)
    server.update(43, "a")
    assert server.round.asked == {0, 1}
    assert server.machine.online == 1


def test_in_a_buffered_run_nobody_waits_for_who_is_asleep() -> None:
    server = answered_server(mode="buffered", buffer_size=2, min_nodes=1)
    server.born(0, "a", "b", "c")
    asleep(server, 1, "c", 1000)
    server.update(2, "a")
    server.update(2, "b")
    assert server.machine.version == 1
    assert server.round.asked == {0, 1, 2}


def test_that_a_node_was_asleep_before_its_present_connection_counts_for_nothing() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    asleep(server, 1, "b", 50)
    server.born(2, "b", link=2)
    assert reasons(asleep(server, 3, "b", 50)) == ["late death"]
    assert server.machine.online == 2


def test_an_unknown_node_that_is_asleep_is_nobody() -> None:
    server = answered_server()
    assert asleep(server, 1, "z", 50) == []
