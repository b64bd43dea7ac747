"""Who is silent is not waited for, however it goes about it; whoever makes up ids leaves no slot behind."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.roster import NEWCOMERS
from tests.rounds.support import AnsweredServer, answered_server, only, reasons, status

DEADLINE_S, ROUND_S, LONG_S = 100.0, 4.0, 2000.0
HONEST = ("a", "b", "c")
WEEK_S = 7 * 86_400

Attack = Callable[[AnsweredServer, float, int], object]  # a server, the time, how many rounds have closed


def in_a_round(*others: str, **changes: Any) -> AnsweredServer:
    """Three honest nodes, and one or more that were until now; all have answered a round."""
    nodes = (*HONEST, "d", *others)
    server = answered_server(**{"count": 10_000, "quorum": 0.5, "deadline_s": DEADLINE_S} | changes)
    server.born(0.0, *nodes)
    for _ in range(2):
        for node in nodes:
            server.update(0.0, node)
    return server


def rounds_in(server: AnsweredServer, attack: Attack) -> int:
    """How many rounds close in a long time; the honest nodes answer at once, and no more often than every 4 s."""
    now, first = 1.0, server.machine.version
    server.gone(now, "d")
    while now < LONG_S:
        before = server.machine.version
        attack(server, now, before - first)
        for node in HONEST:
            server.update(now, node)
        now = now + ROUND_S if server.machine.version > before else server.machine.wake_at or LONG_S
        server.tick(now)
    return server.machine.version - first


def ghost(server: AnsweredServer, now: float, closed: int) -> None:
    if closed == 0:
        server.born(now, "ghost")


def asleep(server: AnsweredServer, now: float, closed: int) -> None:
    ghost(server, now, closed)
    server.give(e.StatusCame(now, "ghost", status("asleep", wakes_in_s=WEEK_S)))


def flapping() -> Attack:
    """It is there whenever a round opens, and dies."""
    links = count(2)

    def flap(server: AnsweredServer, now: float, closed: int) -> None:
        server.gone(now, "ghost", link=(link := next(links)) - 1)
        server.born(now, "ghost", link=link)

    return flap


def mute(server: AnsweredServer, now: float, closed: int) -> None:
    if closed == 0:
        server.born(now, "d", link=2)


def sly(server: AnsweredServer, now: float, closed: int) -> None:
    """It answers only while nobody waits for it, so that somebody does."""
    mute(server, now, closed)
    if server.machine.is_silent("d"):
        server.update(now, "d")


def take_turns(*nodes: str) -> Attack:
    """One is silent until it is not waited for, while the others answer; then the next one."""

    def attack(server: AnsweredServer, now: float, closed: int) -> None:
        mute(server, now, closed)
        for number, node in enumerate(nodes):
            if number != closed // 3 % len(nodes) or server.machine.is_silent(node):
                server.update(now, node)

    return attack


def many(server: AnsweredServer, now: float, closed: int) -> None:
    server.born(now, f"ghost-{closed}")


ATTACKS = {"ghost": ghost, "asleep": asleep, "flapping": flapping(), "mute": mute, "sly": sly, "many": many}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_silence_costs_the_rounds_a_bounded_part_of_the_time(attack: Attack) -> None:
    undisturbed = rounds_in(in_a_round(), lambda server, now, closed: None)
    assert undisturbed > LONG_S / ROUND_S - 5
    server = in_a_round()
    assert rounds_in(server, attack) >= 0.6 * undisturbed
    assert "flagged: silent" in reasons(server.seen)


@pytest.mark.parametrize(("nodes", "part"), [("d", 0.75), ("de", 0.55), ("def", 0.4)])
def test_each_of_some_that_take_turns_costs_a_part_of_the_time(nodes: str, part: float) -> None:
    undisturbed = rounds_in(in_a_round(), lambda server, now, closed: None)
    server = in_a_round(*nodes[1:])
    assert rounds_in(server, take_turns(*nodes)) >= part * undisturbed
    flagged = {found.node for found in only(e.Count, server.seen) if found.reason == "flagged: silent"}
    assert flagged == set(nodes)


@pytest.mark.parametrize("attack", [ghost, mute])
def test_one_that_goes_silent_is_flagged_within_two_deadlines(attack: Attack) -> None:
    server = in_a_round()
    rounds_in(server, attack)
    flagged = [found for found in only(e.Count, server.seen) if found.reason == "flagged: silent"]
    assert [found.node for found in flagged] == ["ghost" if attack is ghost else "d"]
    assert flagged[0].round is not None
    assert flagged[0].round <= 4


def test_one_that_was_silent_counts_where_it_is_in_time_and_is_waited_for_again_in_the_end() -> None:
    server = in_a_round()
    rounds_in(server, mute)
    for now in (LONG_S, LONG_S + 1, LONG_S + 2):
        for node in (*HONEST[:2], "d"):
            server.update(now, node)
        server.update(now, "c")
    assert {record.node for record in server.entries[-1].records} == {*HONEST, "d"}
    before = server.machine.version
    for node in HONEST:
        server.update(LONG_S + 3, node)
    assert server.machine.version == before  # waits for d
    server.update(LONG_S + 4, "d")
    assert server.machine.version == before + 1


def test_a_silent_node_still_counts_in_the_quorum() -> None:
    """Below it, nothing is written: an operator who wants everybody, gets everybody."""
    server = in_a_round(quorum=1.0)
    assert rounds_in(server, mute) <= 2
    assert "flagged: silent" not in reasons(server.seen)


def test_one_that_never_answered_holds_up_no_quorum() -> None:
    server = in_a_round(quorum=1.0, min_nodes=3)
    for number in range(50):
        server.born(1.0, f"ghost-{number}")
    assert rounds_in(server, lambda server, now, closed: None) > 250


def test_a_sample_of_invented_ids_is_extended_to_those_that_answer() -> None:
    server = in_a_round(quorum=1.0, min_nodes=3, fraction=0.6, deadline_s=10.0)
    for number in range(50):
        server.born(1.0, f"ghost-{number}")
    assert rounds_in(server, lambda server, now, closed: None) > 250


def test_invented_ids_that_came_first_hold_up_no_round_for_ever() -> None:
    server = answered_server(count=10_000, quorum=0.5, min_nodes=3, deadline_s=10.0)
    server.born(0.0, *(f"ghost-{number}" for number in range(50)))
    server.born(1.0, *HONEST)
    server.update(2.0, "a")
    assert rounds_in(server, lambda server, now, closed: None) > 250
    assert {commit.node for commit in only(e.CommitSlot, server.seen)} == set(HONEST)


def test_of_those_that_never_answered_a_bounded_number_gets_a_slot() -> None:
    server = in_a_round()
    said = server.born(1.0, *(f"ghost-{number}" for number in range(NEWCOMERS + 10)))
    assert reasons(said).count("no slot left") == 10
    assert {commit.node for commit in only(e.CommitSlot, server.seen)} == {*HONEST, "d"}
    server.gone(2.0, "ghost-7")
    assert reasons(server.born(3.0, "late")) == []
    assert reasons(server.born(4.0, "ghost-7", link=2)) == ["no slot left"]  # its place is taken
