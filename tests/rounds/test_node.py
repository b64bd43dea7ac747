"""A node: follows the ledger, steps when asked, and sends until it is acknowledged."""

from dataclasses import replace

import pytest

from meerkat_mq.core.path import NO_DIGEST
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node_state import RETRY_S
from meerkat_mq.wire.frames import Entries, Offer, Reason, Update, Want
from tests.rounds.support import (
    RUN,
    THETA_0,
    AnsweredNode,
    announced,
    answered_node,
    base_after,
    chain,
    header,
    node_machine,
    only,
    reasons,
    refusal,
    sent,
    state,
    welcome,
)

# --- following the ledger -------------------------------------------------------------------------------------------


def test_a_short_absence_needs_no_request() -> None:
    node = answered_node()
    effects = node.frames(1.0, announced(3, entries=tuple(chain(3))))
    assert node.machine.version == 3
    assert not sent(effects, Want)
    assert node.task == e.StartSteps(3, 0, 1, 2.0**-10)


def test_a_long_absence_is_made_up_for_by_asking() -> None:
    node, ledger = answered_node(), tuple(chain(9))
    (want,) = sent(node.frames(1.0, announced(9, entries=ledger[6:])), Want)
    assert want.entries_from == 0
    node.frames(1.1, Entries(header(9), ledger[:4]))
    assert node.machine.version == 4
    assert [w.entries_from for w in sent(node.seen, Want)] == [0, 4]
    node.frames(1.2, Entries(header(9), ledger[4:6]))
    assert node.machine.version == 9  # the rest came with the round
    assert node.task is not None


def test_on_a_new_connection_a_node_asks_at_once_for_what_it_lacks() -> None:
    node, ledger = answered_node(), tuple(chain(9))
    node.frames(1.0, announced(9, entries=ledger[6:]))
    (want,) = sent(node.give(e.Connected(1.1)), Want)
    assert want.entries_from == 0


def test_a_node_asks_again_when_no_answer_comes() -> None:
    node = answered_node(announced(3))
    assert node.machine.wake_at == RETRY_S
    assert sent(node.give(e.Tick(RETRY_S)), Want)
    assert node.machine.wake_at == 2 * RETRY_S


def offer(version: int, term: int = 1) -> Offer:
    return Offer(header(version, term), version, b"b" * 16, 1000)


def test_a_snapshot_that_is_offered_stands_in_for_the_entries_before_it() -> None:
    node, ledger = answered_node(announced(9)), tuple(chain(9))
    assert only(e.FetchSnapshot, node.frames(1.0, offer(7))) == [e.FetchSnapshot(offer(7))]
    assert node.frames(1.5, offer(8), Entries(header(9), ledger)) == []
    assert node.machine.wake_at is None
    loaded = e.SnapshotLoaded(2.0, 7, ledger[6].hash(RUN), ledger[6].digest)
    (want,) = sent(node.give(loaded), Want)
    assert (node.machine.version, want.entries_from) == (7, 7)
    node.frames(3.0, Entries(header(9), ledger[7:]))
    (update,) = sent(node.step(4.0), Update)
    assert (update.header.version, update.base) == (9, base_after(8)[:8])


def test_a_snapshot_that_does_not_come_is_asked_for_again_later() -> None:
    node = answered_node(announced(9))
    node.frames(1.0, offer(7))
    effects = node.give(e.JobFailed(5.0, e.FetchSnapshot(offer(7))))
    assert reasons(effects) == ["snapshot missed"]
    assert not sent(effects, Want)
    assert node.machine.wake_at == 5.0 + RETRY_S
    (want,) = sent(node.give(e.Tick(5.0 + RETRY_S)), Want)
    assert want.entries_from == 0


def test_an_offer_of_what_the_node_has_and_an_answer_that_nobody_waits_for_do_nothing() -> None:
    node = answered_node(announced(2, entries=tuple(chain(2))))
    node.step(1.0)
    assert node.frames(2.0, offer(2)) == []
    assert reasons(node.give(e.SnapshotLoaded(3.0, 2, RUN, THETA_0))) == ["unexpected answer"]
    assert reasons(node.give(e.JobFailed(3.0, e.FetchSnapshot(offer(2))))) == ["unexpected answer"]
    assert node.machine.version == 2


def test_a_snapshot_of_another_past_is_left_when_the_server_shows_its_own() -> None:
    node, ledger = answered_node(announced(9)), tuple(chain(9))
    node.frames(1.0, offer(7))
    node.give(e.ServerCame(1.5, state(term=2)))
    node.give(e.SnapshotLoaded(2.0, 7, b"another" * 2 + b"..", ledger[6].digest))
    effects = node.frames(3.0, welcome(term=2), announced(9, term=2, entries=ledger[7:]))
    assert "resynchronised" in reasons(effects)
    assert node.machine.version == 0


def test_entries_are_applied_from_the_head_on_only() -> None:
    ledger = tuple(chain(5))
    node = answered_node(announced(2, entries=ledger[:2]))
    node.step(1.0)
    assert only(e.ApplyEntries, node.frames(2.0, Entries(header(5), ledger[3:]))) == []
    assert only(e.ApplyEntries, node.frames(2.0, Entries(header(5), ledger))) == [e.ApplyEntries(ledger[2:])]


def test_entries_that_come_while_the_node_is_busy_wait_for_the_next_answer() -> None:
    node, ledger = answered_node(announced()), tuple(chain(2))
    assert node.frames(1.0, Entries(header(2), ledger), announced(2)) == [e.StopSteps()]
    assert reasons(node.step(2.0)) == ["late step"]
    (want,) = sent(node.seen, Want)
    assert want.entries_from == 0


def test_the_base_is_the_newest_due_digest() -> None:
    ledger = chain(3)
    ledger[1] = replace(ledger[1], digest=NO_DIGEST)
    ledger[2] = replace(ledger[2], digest=NO_DIGEST, previous=ledger[1].hash(RUN))
    node = answered_node(announced(3, entries=tuple(ledger)))
    (update,) = sent(node.step(1.0), Update)
    assert update.base == base_after(0)[:8]


def test_another_past_is_refused_under_a_term_that_was_followed() -> None:
    node = answered_node(announced(3, is_open=False, entries=tuple(chain(3))))
    other = chain(5, seed=1)
    effects = node.frames(1.0, announced(5, entries=tuple(other[3:])))
    assert reasons(effects) == ["entry refused"]
    assert node.machine.version == 3
    assert reasons(node.give(e.Tick(1.5))) == []  # counted once


def test_another_past_under_a_higher_term_starts_the_node_over() -> None:
    node = answered_node(announced(3, is_open=False, entries=tuple(chain(3))))
    effects = node.frames(1.0, announced(5, term=2, entries=tuple(chain(5, seed=1)[3:])))
    assert reasons(effects) == ["resynchronised"]
    assert only(e.ResetTheta, effects)
    assert [want.entries_from for want in sent(effects, Want)] == [0]
    node.frames(1.0, Entries(header(5, 2), tuple(chain(5, seed=1))))
    assert node.machine.version == 5
    assert reasons(node.frames(2.0, announced(6, term=2, entries=(chain(1, start=5)[0],)))) == ["entry refused"]


@pytest.mark.parametrize("version", [0, 2])
def test_a_node_ahead_of_a_restored_ledger_starts_over(version: int) -> None:
    node, ledger = answered_node(announced(3, entries=tuple(chain(3)))), tuple(chain(version))
    node.step(0.5)
    effects = node.frames(1.0, welcome(0, term=2), announced(version, term=2, entries=ledger))
    assert reasons(effects) == ["resynchronised"]
    node.frames(1.0, Entries(header(version, 2), ledger))
    assert node.machine.version == version
    assert node.task is not None
    assert node.task.version == version


def test_a_ledger_of_a_higher_term_that_extends_the_head_is_followed_quietly() -> None:
    node = answered_node(announced(3, entries=tuple(chain(3))))
    node.step(0.5)
    assert reasons(node.frames(1.0, announced(3, term=2, entries=tuple(chain(3))))) == []
    effects = node.frames(1.0, announced(4, term=2, entries=tuple(chain(4))))
    assert reasons(effects) == []
    assert node.machine.version == 4


def test_a_term_is_followed_once_its_round_shows_the_same_past() -> None:
    node = answered_node(announced(3, is_open=False, entries=tuple(chain(3))))
    node.frames(1.0, announced(3, term=2, entries=tuple(chain(3))))
    other = chain(4, seed=1)
    assert reasons(node.frames(2.0, announced(4, term=2, entries=(other[3],)))) == ["entry refused"]
    assert node.machine.version == 3


def test_entries_that_overtake_the_round_do_no_harm() -> None:
    node = answered_node(announced(2))
    effects = node.frames(1.0, Entries(header(3), tuple(chain(3))), announced(2, entries=tuple(chain(2))))
    assert reasons(effects) == []
    assert node.machine.version == 3


# --- digests --------------------------------------------------------------------------------------------------------


def test_a_refused_digest_starts_the_node_over() -> None:
    node = answered_node(announced(2, entries=tuple(chain(2))))
    node.step(1.0)
    effects = node.frames(2.0, refusal(Reason.RESYNCHRONISE, 2))
    assert reasons(effects) == ["refused: resynchronise", "resynchronised"]
    node.frames(2.1, Entries(header(2), tuple(chain(2))))
    assert node.machine.version == 2
    assert node.task is not None


def test_a_refusal_told_twice_or_to_another_process_does_nothing() -> None:
    node = answered_node(announced(2, entries=tuple(chain(2))))
    node.step(1.0)
    assert node.frames(2.0, refusal(Reason.RESYNCHRONISE, 2, boot=2), refusal(Reason.RESYNCHRONISE, 1)) == []
    node.frames(2.0, refusal(Reason.RESYNCHRONISE, 2), Entries(header(2), tuple(chain(2))))
    assert node.frames(2.1, refusal(Reason.RESYNCHRONISE, 2)) == []  # about the update before
    assert node.machine.version == 2


def test_a_node_that_never_arrives_at_the_digest_ends_in_words() -> None:
    machine, entry = node_machine(), chain(1)[0]
    effects = machine.handle(e.FrameCame(0.0, announced(1, entries=(entry,))))
    for attempt in range(4):
        assert effects[-1] == e.ApplyEntries((entry,))
        effects = machine.handle(e.EntriesApplied(float(attempt), (entry,), (THETA_0,)))
        assert reasons(effects) == ["digest differs", "resynchronised"]
        assert bool(only(e.End, effects)) == (attempt == 3)


def test_being_heard_clears_the_count_of_refused_digests() -> None:
    node = answered_node(announced(1, entries=tuple(chain(1))))
    for number in range(8):
        node.step(1.0)
        effects = node.frames(2.0, refusal(Reason.RESYNCHRONISE, 1))
        assert only(e.End, effects) == []
        node.frames(3.0, announced(1, entries=tuple(chain(1))))
        if number % 2:
            node.frames(3.0, announced(1, heard=frozenset({0}), entries=tuple(chain(1))), announced(1))


# --- stepping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        announced(is_open=False),
        announced(asked=(1,)),
        announced(heard=frozenset({0})),
        announced(1),
    ],
)
def test_a_node_steps_only_in_an_open_round_at_its_version_that_asks_it_and_has_not_heard_it(frame: object) -> None:
    assert answered_node(frame).task is None
    assert answered_node(announced()).task is not None


def test_without_a_slot_there_is_no_step() -> None:
    node = AnsweredNode()
    node.frames(1.0, announced())
    assert node.task is None
    node.frames(2.0, welcome())
    assert node.task is not None


def test_an_update_is_sent_at_each_announcement_until_it_is_heard() -> None:
    node = answered_node(announced())
    (update,) = sent(node.step(1.0, 0.25), Update)
    assert update == Update(header(), 1, THETA_0[:8], 1.0, (0.25,))
    assert sent(node.give(e.Tick(2.0)), Update) == []
    assert sent(node.frames(3.0, announced(attempt=1)), Update) == [update]
    assert sent(node.frames(4.0, announced(heard=frozenset({0}))), Update) == []


def test_an_update_is_sent_again_under_a_new_term_without_stepping_again() -> None:
    node = answered_node(announced())
    (update,) = sent(node.step(1.0, 0.25), Update)
    effects = node.frames(2.0, announced(term=2), welcome(term=2))
    assert sent(effects, Update) == [replace(update, header=header(term=2))]
    assert node.task is None


def test_in_another_slot_the_steps_are_done_again_on_its_lane() -> None:
    node = answered_node(announced(lanes=2))
    node.step(1.0)
    effects = node.frames(2.0, announced(term=2, lanes=2, asked=(3,)), welcome(3, term=2))
    assert sent(effects, Update) == []
    assert node.task == e.StartSteps(0, 1, 1, 2.0**-10)


def test_a_node_on_the_short_list_does_fewer_steps() -> None:
    node = answered_node(announced(steps=10, short=((0, 3), (1, 4))))
    assert node.task == e.StartSteps(0, 0, 3, 2.0**-10)


def test_a_slow_node_goes_on_with_the_round_that_is_open_when_it_is_done() -> None:
    node = answered_node(announced())
    node.frames(1.0, announced(1, entries=tuple(chain(1))))
    effects = node.step(2.0)
    assert reasons(effects) == ["late step"]
    assert sent(effects, Update) == []
    assert node.task == e.StartSteps(1, 0, 1, 2.0**-10)


def test_the_head_of_an_empty_ledger_is_the_mask() -> None:
    node = answered_node(announced(1, entries=tuple(chain(1, previous=RUN))))
    assert node.machine.version == 0


def test_a_round_of_a_version_that_nobody_stands_at_is_given_up() -> None:
    node = answered_node(announced())
    node.step(1.0)
    assert reasons(node.frames(2.0, announced(2**32 - 1), announced(0))) == ["old round"]
    for now in range(2, 20, 2):
        node.give(e.Tick(float(now)))
    ledger = tuple(chain(1))
    assert reasons(node.frames(20.0, announced(1, entries=ledger))) == []
    assert node.machine.version == 1
    assert node.task == e.StartSteps(1, 0, 1, 2.0**-10)


# --- a model that fails ---------------------------------------------------------------------------------------------


def test_steps_that_fail_are_tried_again_later_and_later() -> None:
    node = AnsweredNode()
    (task,) = only(e.StartSteps, node.frames(1.0, welcome(), announced()))
    now = 1.0
    for pause_s in (2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        effects = node.give(e.JobFailed(now, task))
        assert reasons(effects) == ["steps failed"]
        assert not only(e.StartSteps, effects)
        now += pause_s
        assert node.machine.wake_at == now
        assert not only(e.StartSteps, node.frames(now - 0.1, announced()))
        assert only(e.StartSteps, node.give(e.Tick(now))) == [task]
    assert sent(node.step(now, 0.5), Update)
    (second,) = only(e.StartSteps, node.frames(now, announced(1, entries=tuple(chain(1)))))
    assert second.version == 1
    node.give(e.JobFailed(now, second))
    assert node.machine.wake_at == now + RETRY_S


def test_a_round_that_closed_meanwhile_is_not_tried_again() -> None:
    node = AnsweredNode()
    (late,) = only(e.StartSteps, node.frames(1.0, welcome(), announced()))
    node.give(e.JobFailed(1.0, late))
    node.frames(1.5, announced(1, entries=tuple(chain(1))))
    (task,) = only(e.StartSteps, node.give(e.Tick(3.0)))
    assert task.version == 1
    assert reasons(node.give(e.JobFailed(3.0, late))) == ["unexpected answer"]
