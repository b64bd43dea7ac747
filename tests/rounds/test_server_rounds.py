"""When a round opens, closes, waits longer, and is announced."""

from typing import Any

import pytest

from meerkat_mq.rounds import events as e
from meerkat_mq.wire.frames import Want
from tests.rounds.support import answered_server, header, only, reasons, state


def published(effects: list[e.ServerEffect]) -> int:
    return len(only(e.PublishRound, effects))


def test_a_round_opens_with_min_nodes_and_closes_when_all_are_heard() -> None:
    server = answered_server()
    assert not server.round.is_open
    server.born(1, "a")
    assert not server.round.is_open
    server.born(2, "b")
    assert server.round.is_open
    assert server.round.asked == {0, 1}
    server.update(3, "a")
    assert (server.machine.version, server.round.heard) == (0, frozenset())  # announced only when planned
    effects = server.update(4, "b")
    assert server.machine.version == 1
    assert server.round.header.version == 1
    assert server.round.entries == (server.entries[0].entry,)
    assert published(effects) == 1


def test_nothing_is_heard_before_it_is_committed() -> None:
    server = answered_server(e.CommitUpdate)
    server.born(0, "a", "b")
    server.update(1, "a")
    server.tick(25)
    assert server.round.heard == frozenset()
    server.answer(26)
    server.tick(50)
    assert server.round.heard == {0}


def test_an_entry_is_published_only_when_it_is_committed() -> None:
    server = answered_server(e.CommitEntry)
    server.born(0, "a", "b")
    server.update(1, "a")
    server.update(1, "b")
    server.born(2, "c")
    assert (server.machine.version, server.round.header.version, server.round.entries) == (0, 0, ())
    server.answer(3)
    assert server.round.header.version == 1
    assert server.round.asked == {0, 1, 2}


def test_an_update_committed_after_closing_is_not_in_the_entry() -> None:
    server = answered_server(e.CommitUpdate, quorum=0.5)
    server.born(0, "a", "b")
    server.update(1, "a")
    server.answer(1)
    server.update(99, "b")
    server.tick(100)
    server.answer(101)
    assert [record.node for record in server.entries[0].records] == ["a"]
    assert server.round.heard == frozenset()


def test_a_dead_node_is_waited_for_during_its_grace_only() -> None:
    server = answered_server(quorum=0.5)
    server.born(0, "a", "b")
    server.update(1, "a")
    server.gone(2, "b")
    server.tick(11.9)
    assert server.machine.version == 0
    assert server.machine.wake_at == 12.0
    server.tick(12)
    assert server.machine.version == 1


@pytest.mark.parametrize("died", [0.1, 0.3, 0.7, 1.1, 16.9, 1e6 + 0.1])
def test_the_tick_at_the_end_of_grace_closes(died: float) -> None:
    server, opened = answered_server(quorum=0.5, grace_s=0.2, deadline_s=604_800.0), max(0.0, died - 100_000.0)
    server.born(opened, "a", "b")
    server.update(opened, "a")
    server.gone(died, "b")
    assert server.machine.wake_at == died + 0.2
    server.tick(died + 0.2)
    assert server.machine.version == 1


def test_a_node_back_within_its_grace_is_waited_for() -> None:
    server = answered_server(quorum=0.5)
    server.born(0, "a", "b")
    server.update(1, "a")
    server.gone(2, "b")
    server.born(5, "b", boot=2, link=2)
    server.tick(12)
    assert server.machine.version == 0
    server.update(13, "b", boot=2)
    assert len(server.entries[0].records) == 2


def test_a_death_of_an_older_connection_counts_for_nothing() -> None:
    server = answered_server(quorum=0.5)
    server.born(0, "a", "b")
    server.born(1, "b", link=2)
    server.update(2, "a")
    assert reasons(server.gone(3, "b", link=1)) == ["late death"]
    server.tick(99)
    assert server.machine.version == 0


def test_nobody_waits_for_a_node_that_left() -> None:
    server = answered_server(min_nodes=1)
    server.born(0, "a")
    server.born(0, "b", "c")
    server.update(1, "a")
    assert server.machine.version == 1
    server.update(2, "a")
    server.update(2, "b")
    server.gone(3, "c", "stopped")
    assert server.machine.version == 2


def test_leaves_do_not_take_the_quorum_below_that_of_min_nodes() -> None:
    server = answered_server(min_nodes=3)
    server.born(0, "a", "b", "c")
    server.gone(1, "c", "stopped")
    server.update(2, "a")
    server.update(2, "b")
    server.tick(100)
    assert server.entries == []
    assert server.round.attempt == 1


def test_a_round_closes_at_the_deadline_with_its_quorum() -> None:
    server = answered_server(min_nodes=3, quorum=0.6)
    server.born(0, "a", "b", "c")
    server.update(1, "a")
    server.update(1, "b")
    server.tick(99.999)
    assert server.machine.version == 0
    server.tick(100)
    assert [record.node for record in server.entries[0].records] == ["a", "b"]


def test_below_quorum_the_deadline_doubles_up_to_ten_times_and_nothing_is_written() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    server.update(1, "a")
    now, waits = 0.0, []
    for _ in range(6):
        waits.append(server.round.deadline_ms / 1000)
        now += waits[-1]
        server.tick(now - 0.001)
        attempt = server.round.attempt
        assert "round extended" in reasons(server.tick(now))
        assert server.round.attempt == attempt + 1
        assert server.round.heard == {0}
    assert waits == [100, 200, 400, 800, 1000, 1000]
    assert server.entries == []
    server.update(now + 1, "b")
    assert server.machine.version == 1


def test_a_round_can_wait_for_ever() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    for number in range(1, 70_000):
        server.machine.handle(e.Tick(1000.0 * number))
    server.tick(1e12)
    assert server.round.deadline_ms == 1_000_000
    assert server.round.attempt == 2**16 - 1


def test_an_extended_round_asks_everybody_at_hand() -> None:
    server = answered_server(min_nodes=2)
    server.born(0, "a", "b")
    server.born(1, "c")
    assert server.round.asked == {0, 1}
    server.tick(100)
    assert server.round.asked == {0, 1, 2}
    server.born(101, "d")  # below quorum: whoever comes is welcome at once
    assert server.round.asked == {0, 1, 2, 3}
    server.update(102, "c")
    server.update(102, "d")
    server.gone(103, "a")
    server.gone(103, "b")
    server.tick(113)
    assert [record.node for record in server.entries[0].records] == ["c", "d"]


def test_a_round_is_announced_at_each_quarter() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    times: list[float] = []
    while server.machine.version == 0 and len(times) < 5:
        wake_at = server.machine.wake_at
        assert wake_at is not None
        assert published(server.tick(wake_at)) == 1
        times.append(wake_at)
    assert times == [25, 50, 75, 100, 150]


def test_announcements_missed_are_made_up_for_once() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    assert published(server.tick(80)) == 1
    assert server.machine.wake_at == 100


def test_a_birth_that_changes_nothing_is_not_announced_and_a_status_said_again_does_nothing() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    assert published(server.born(1, "c")) == 0
    assert published(server.born(2, "c", link=2)) == 0
    assert server.born(3, "c", link=2) == []


def test_a_node_that_is_asked_late_is_announced() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    server.tick(100)
    assert published(server.born(101, "c")) == 1
    assert published(server.born(102, "c", link=2)) == 0
    assert server.round.asked == {0, 1, 2}


def test_who_asks_is_told_how_the_run_stands_also_when_no_round_is_open() -> None:
    server = answered_server(count=1)
    server.born(0, "a", "b")
    server.update(2, "a")
    server.update(2, "b")
    assert server.machine.finished
    server.born(3, "c")
    want = Want(header(), 1, welcome=True)
    assert published(server.give(e.WantCame(4, "c", want))) == 1


def test_a_node_that_joins_is_asked_from_the_next_round_on() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    server.born(1, "c")
    assert reasons(server.update(2, "c")) == ["not asked"]
    server.update(3, "a")
    server.update(3, "b")
    assert server.round.asked == {0, 1, 2}


def test_with_too_few_nodes_the_next_round_waits_for_more() -> None:
    server = answered_server(quorum=0.5)
    server.born(0, "a", "b")
    server.update(1, "a")
    server.gone(1, "b", "stopped")
    assert server.machine.version == 1
    assert not server.round.is_open
    assert server.machine.wake_at is None
    server.born(50, "b", link=2)
    assert server.round.is_open
    assert server.machine.wake_at == 75


def test_a_starting_that_comes_after_its_online_counts_for_nothing() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    assert reasons(server.born(1, "b", word="starting")) == ["late death"]
    server.update(2, "a")
    server.update(2, "b")
    assert server.round.header.version == 1
    assert server.round.asked == {0, 1}


@pytest.mark.parametrize("changes", [{"word": "starting", "link": 2}, {"word": "starting", "boot": 2},
                                     {"run": "f" * 32}])  # fmt: skip
def test_a_node_that_is_not_ready_for_this_run_is_not_at_hand(changes: dict[str, Any]) -> None:
    server = answered_server()
    server.born(0, "a")
    server.born(0, "b", **changes)
    assert server.machine.online == 1
    server.born(1, "b")
    assert server.round.is_open
    server.born(2, "b", **changes)
    assert server.machine.online == 1


def test_the_last_entry_finishes_the_run() -> None:
    server = answered_server(count=1)
    server.born(0, "a", "b")
    server.update(1, "a")
    effects = server.update(1, "b")
    assert only(e.PublishState, effects) == [e.PublishState()]
    assert not server.round.is_open
    assert server.machine.wake_at is None
    assert reasons(server.update(2, "a", version=0)) == ["late"]


def test_a_new_connection_publishes_the_open_round_again_and_leaves_its_deadline() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    assert published(server.start(60)) == 1
    assert server.round.is_open
    server.tick(75)
    assert server.machine.wake_at == 100


def test_a_server_of_higher_rank_ends_this_one() -> None:
    server = answered_server()
    for rival in (state(term=2), state(server_id="6" * 16)):
        error = only(e.End, server.give(e.ServerSeen(1, rival)))[0].error
        assert "taken over" in str(error)


def test_a_late_will_or_a_lesser_server_is_overwritten_and_the_own_word_is_not() -> None:
    server = answered_server()
    assert server.give(e.ServerSeen(1, state(status="lost"))) == [e.PublishState()]
    assert server.give(e.ServerSeen(1, state(term=0))) == [e.PublishState()]
    assert server.give(e.ServerSeen(1, state(server_id="4" * 16))) == [e.PublishState()]
    assert server.give(e.ServerSeen(1, state(round=7))) == []
