"""A node greets until a server answers, and tells the servers of a federation apart by their terms."""

from dataclasses import replace

import pytest

from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import SILENT_S
from meerkat_mq.rounds.node_state import RETRY_S
from meerkat_mq.wire.frames import Update, Want
from tests.rounds.support import (
    AnsweredNode,
    announced,
    answered_node,
    chain,
    header,
    only,
    reasons,
    sent,
    state,
    welcome,
)


def test_a_node_greets_until_it_has_a_slot_and_a_round() -> None:
    node = AnsweredNode()
    assert node.give(e.Connected(0.0)) == [e.PublishStatus()]
    for number in range(1, 4):
        assert node.machine.wake_at == number * RETRY_S
        effects = node.give(e.Tick(number * RETRY_S))
        assert only(e.PublishStatus, effects)
        assert sent(effects, Want) == [Want(header(term=0), 1, welcome=True)]
    node.frames(7.0, welcome())
    assert node.machine.wake_at is not None
    node.frames(7.0, announced())
    assert node.machine.wake_at is None


def test_on_a_new_connection_a_node_works_on_and_asks_when_no_round_comes() -> None:
    node = answered_node(announced())
    assert node.give(e.Connected(10.0)) == [e.PublishStatus()]
    assert sent(node.step(11.0), Update)
    assert node.machine.wake_at == 12.0
    assert sent(node.give(e.Tick(12.0)), Want)
    node.frames(12.1, announced())
    assert node.machine.wake_at is None


def test_a_welcome_for_another_process_is_not_taken() -> None:
    node = answered_node()
    node.frames(1.0, welcome(slot=5, boot=2))
    assert node.machine.slot == 0


def test_a_new_server_is_told_that_the_node_is_there_and_gives_slots_anew() -> None:
    node = answered_node(announced())
    assert only(e.PublishStatus, node.give(e.ServerCame(1.0, state(term=2))))
    assert node.machine.slot is None
    node.frames(1.0, welcome(3, term=2))
    assert node.machine.slot == 3


def test_the_first_frame_of_a_new_term_counts_as_its_server() -> None:
    node = answered_node(announced())
    assert only(e.PublishStatus, node.frames(1.0, welcome(3, term=2)))
    assert node.machine.slot == 3
    assert not only(e.PublishStatus, node.give(e.ServerCame(2.0, state(term=2))))
    assert node.machine.slot == 3


def test_a_server_that_connects_anew_is_told_again() -> None:
    node = answered_node(announced())
    assert node.give(e.ServerCame(1.0, state(round=4))) == []
    assert node.give(e.ServerCame(1.0, state(status="lost"))) == []
    assert node.give(e.ServerCame(2.0, state(link=2))) == [e.PublishStatus()]
    assert node.machine.slot == 0


@pytest.mark.parametrize("server_id", ["4" * 16, "6" * 16])
def test_two_servers_in_one_term_are_asked_for_a_higher_one(server_id: str) -> None:
    node = answered_node(announced(3, entries=tuple(chain(3))))
    effects = node.give(e.ServerCame(1.0, state(server_id=server_id)))
    assert "two servers in a term" in reasons(effects)
    assert [want.header.term for want in sent(effects, Want)] == [2]
    assert sent(node.give(e.ServerCame(3.0, state(term=1, status="lost", server_id=server_id))), Want) != []


def test_of_two_servers_in_one_term_the_slots_are_not_mixed_up() -> None:
    """The steps along one server's lane are no answer to the other, which gives this node another one."""
    node = answered_node(announced(lanes=2))
    node.give(e.ServerCame(1.0, state(server_id="4" * 16)))
    assert node.machine.slot is None
    assert not sent(node.step(2.0), Update)
    assert not sent(node.frames(3.0, welcome(slot=1), announced(lanes=2, asked=(1,))), Update)
    (update,) = sent(node.step(4.0), Update)
    assert update.scalars


def test_it_asks_for_a_higher_term_until_there_is_one() -> None:
    node = answered_node(announced())
    assert sent(node.give(e.ServerCame(1.0, state(server_id="4" * 16))), Want)  # lost: no connection stood
    assert not sent(node.give(e.ServerCame(1.1, state(server_id="4" * 16))), Want)
    (want,) = sent(node.give(e.Connected(1.5)), Want)
    assert (want.header.term, want.welcome, want.entries_from) == (2, True, None)
    node.frames(1.6, welcome(), announced())
    assert sent(node.step(2.0), Update)
    assert want in sent(node.give(e.Tick(1.6 + RETRY_S)), Want)
    node.give(e.ServerCame(4.0, state(term=3)))
    node.frames(4.0, welcome(term=3), announced(term=3))
    assert node.machine.wake_at is None


def test_a_server_of_a_lower_term_that_lives_is_told_of_the_higher_one_now_and_then_until_a_round_comes() -> None:
    node = answered_node(announced(3, term=5, entries=tuple(chain(3))), welcome(term=5))
    for status in ("lost", "stopped"):
        node.give(e.ServerCame(9.0, state(term=0, status=status)))
        assert node.machine.wake_at is None
    (want,) = sent(node.give(e.ServerCame(10.0, state(term=2))), Want)
    assert (want.header.term, want.welcome) == (5, True)
    assert not sent(node.give(e.ServerCame(10.1, state(term=2, link=2))), Want)
    assert sent(node.give(e.Tick(10.0 + RETRY_S)), Want) == [want]
    node.give(e.ServerCame(13.0, state(term=6)))
    node.frames(13.0, welcome(term=6), announced(term=6))
    assert node.machine.wake_at is None


def test_stale_and_foreign_servers_and_frames_are_counted_only() -> None:
    node = answered_node(announced(3, term=2, entries=tuple(chain(3))))
    assert reasons(node.give(e.ServerCame(1.0, state(term=1)))) == ["stale server"]
    assert reasons(node.give(e.ServerCame(1.0, state(term=9, run="f" * 32)))) == ["of another run"]
    assert reasons(node.frames(1.0, announced(4, term=1))) == ["stale term"]
    assert reasons(node.frames(1.0, announced(2, term=2))) == ["old round"]
    assert reasons(node.frames(1.0, replace(announced(4, term=2), header=replace(header(4, 2), run=1)))) == [
        "of another run"
    ]
    assert node.machine.version == 3


HIGHEST = 2**32 - 1


@pytest.mark.parametrize("says", ["state", "round"])
def test_a_server_of_a_forged_term_is_followed_for_ten_minutes_after_its_last_word(says: str) -> None:
    """No server can take a term above that one: until this, a node was lost to its run until somebody started it."""
    node = answered_node(announced(3, term=5, entries=tuple(chain(3))), welcome(term=5))
    node.give(e.ServerCame(100.0, state(term=HIGHEST, server_id="e" * 16)))

    def of_ours(now: float) -> list[str]:
        if says == "state":
            return reasons(node.give(e.ServerCame(now, state(term=6))))
        return reasons(node.frames(now, announced(3, term=6, entries=tuple(chain(3)))))

    stale = f"stale {'server' if says == 'state' else 'term'}"
    assert of_ours(101.0) == [stale]
    node.give(e.ServerCame(150.0, state(term=HIGHEST, server_id="e" * 16)))  # it is still there
    assert of_ours(149.0 + SILENT_S) == [stale]
    assert of_ours(150.0 + SILENT_S) == [stale, "the newest server is silent"]
    assert node.machine.term == 6
    node.frames(151.0 + SILENT_S, welcome(term=6), announced(3, term=6, entries=tuple(chain(3))))
    assert node.machine.slot == 0
    assert node.machine.version == 3  # what it had is kept, since it is the ledger's
    assert sent(node.step(152.0 + SILENT_S), Update)


def test_a_server_that_is_no_more_is_not_followed_instead_nor_one_whose_past_is_another() -> None:
    node = answered_node(announced(3, term=5, asked=(), entries=tuple(chain(3))), welcome(term=5))
    for status in ("lost", "stopped"):
        assert reasons(node.give(e.ServerCame(9 * SILENT_S, state(term=4, status=status)))) == ["stale server"]
    node.give(e.Connected(9 * SILENT_S))  # the newest server may speak now
    assert reasons(node.give(e.ServerCame(9.5 * SILENT_S, state(term=4)))) == ["stale server"]
    other = tuple(chain(3, seed=1))
    found = reasons(node.frames(11 * SILENT_S, announced(3, term=4, entries=other)))
    assert found == ["stale term", "the newest server is silent", "resynchronised"]
