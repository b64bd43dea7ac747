"""A node whose versions overtake it: partial paths, updates sent until they are heard, and kept over a restart."""

import math
from dataclasses import replace
from typing import Any

import pytest

from meerkat_mq.core.path import seed_for, short_hash
from meerkat_mq.rounds import events as e
from meerkat_mq.wire.frames import Reason, Round, Update, Values
from tests.rounds.support import (
    RUN,
    THETA_0,
    AnsweredNode,
    announced,
    answered_node,
    base_after,
    chain,
    header,
    only,
    reasons,
    refusal,
    sent,
    state,
    welcome,
)

SEEDS = (seed_for(RUN, 1, 0, 0),)


def ahead(version: int, **changes: Any) -> Round:
    """The round of a version, with all entries that lead to it."""
    return announced(version, entries=tuple(chain(version)), **changes)


# --- StopSteps ------------------------------------------------------------------------------------------------------


def test_a_node_stops_when_the_head_is_as_far_ahead_as_an_update_may_be_late() -> None:
    node = answered_node(announced(), max_staleness=2)
    assert only(e.StopSteps, node.frames(1.0, ahead(1))) == []
    assert only(e.StopSteps, node.frames(2.0, ahead(2))) == [e.StopSteps()]
    assert only(e.StopSteps, node.frames(2.1, ahead(2), ahead(3))) == []  # said once


def test_a_partial_path_is_sent_from_the_version_that_it_began_at_and_then_the_node_goes_on() -> None:
    node = answered_node(announced(steps=5), max_staleness=2)
    node.frames(1.0, ahead(2, steps=5))
    effects = node.step(2.0, 1.0, 2.0)
    (update,) = sent(effects, Update)
    assert (update.header.version, update.base, update.scalars) == (0, THETA_0[:8], (1.0, 2.0))
    assert node.machine.version == 2
    assert node.task == e.StartSteps(2, 0, 5, 2.0**-10)


def test_what_no_entry_takes_any_more_is_forgotten_and_not_sent() -> None:
    node = answered_node(announced(), max_staleness=2)
    node.frames(1.0, ahead(3))
    effects = node.step(2.0)
    assert (sent(effects, Update), only(e.Forget, effects)) == ([], [e.Forget(0, heard=False)])
    assert reasons(effects) == ["late step"]


def test_steps_that_the_limits_forbid_are_asked_for_again() -> None:
    node = answered_node(announced(), max_staleness=2)
    effects = node.give(e.StepsDone(1.0, 0, (), math.nan))
    assert (sent(effects, Update), only(e.StartSteps, effects)) == ([], [e.StartSteps(0, 0, 1, 2.0**-10)])
    assert reasons(effects) == []


# --- until it is heard ----------------------------------------------------------------------------------------------


def test_an_update_is_sent_at_each_announcement_also_of_later_versions_until_it_is_heard() -> None:
    node = answered_node(announced(), max_staleness=2)
    (update,) = sent(node.step(1.0, 0.25), Update)
    assert sent(node.frames(2.0, ahead(1)), Update) == [update]
    effects = node.frames(3.0, ahead(2, heard_before=((0, 2),)))
    assert (sent(effects, Update), only(e.Forget, effects)) == ([], [e.Forget(0, heard=True)])


@pytest.mark.parametrize(
    ("changes", "heard"),
    [
        ({"heard_before": ((0, 1),)}, True),
        ({"heard_before": ((0, 2),)}, False),
        ({"heard_before": ((1, 1),)}, False),
        ({"heard": frozenset({0})}, True),
    ],
)
def test_who_was_heard_from_that_version_or_a_newer_one_is_done(changes: dict[str, Any], heard: bool) -> None:
    node = answered_node(ahead(1), max_staleness=3)
    node.step(1.0)
    effects = node.frames(2.0, ahead(2, **changes))
    assert only(e.Forget, effects) == ([e.Forget(1, heard=True)] if heard else [])
    assert bool(sent(effects, Update)) is not heard


def test_a_newer_update_takes_the_place_of_one_that_was_not_heard() -> None:
    node = answered_node(announced(), max_staleness=3)
    node.step(1.0, 0.25)
    node.frames(2.0, ahead(1))
    effects = node.step(3.0, 0.5)
    assert only(e.Forget, effects) == [e.Forget(0, heard=False)]
    assert [update.scalars for update in sent(effects, Update)] == [(0.5,)]


def test_a_refused_update_of_an_older_version_is_forgotten_and_theta_stays() -> None:
    node = answered_node(announced(), max_staleness=3)
    node.step(1.0)
    node.frames(2.0, ahead(1))
    effects = node.frames(3.0, refusal(Reason.RESYNCHRONISE, 0))
    assert only(e.Forget, effects) == [e.Forget(0, heard=False)]
    assert only(e.ResetTheta, effects) == []


def test_after_a_restart_a_node_that_was_heard_does_not_step_again() -> None:
    node = answered_node(announced(heard=frozenset({0})), max_staleness=2)
    assert node.task is None
    node.frames(1.0, ahead(1, heard_before=((0, 1),)))
    assert node.task is not None


# --- kept over a restart --------------------------------------------------------------------------------------------


def kept() -> Update:
    return Update(header(1), 9, base_after(0)[:8], 1.0, (0.5,), SEEDS)


def restarted() -> AnsweredNode:
    node = AnsweredNode(max_staleness=3, pending=kept())
    node.give(e.ServerCame(0.0, state()))
    node.frames(0.5, welcome())
    return node


def test_an_update_that_an_earlier_process_made_is_sent_first_as_it_was() -> None:
    node = restarted()
    effects = node.frames(1.0, welcome(term=4), ahead(3, term=4))
    assert sent(effects, Update) == [replace(kept(), header=header(1, 4))]
    assert node.machine.version == 3
    assert node.task == e.StartSteps(3, 0, 1, 2.0**-10)


@pytest.mark.parametrize(
    ("frame", "heard"), [(ahead(5), False), (ahead(3, heard_before=((0, 2),)), True), (ahead(4), None)]
)
def test_it_is_kept_until_it_is_heard_or_too_old(frame: Round, heard: bool | None) -> None:
    effects = restarted().frames(1.0, frame)
    assert only(e.Forget, effects) == ([] if heard is None else [e.Forget(1, heard=heard)])


def test_it_stands_for_the_steps_of_its_version() -> None:
    node = restarted()
    assert sent(node.frames(1.0, ahead(1)), Update) == [kept()]
    assert node.task is None


def test_one_that_the_server_refuses_goes_and_theta_stays() -> None:
    node = restarted()
    node.frames(1.0, ahead(1))
    effects = node.frames(2.0, refusal(Reason.RESYNCHRONISE, 1, boot=9))
    assert only(e.Forget, effects) == [e.Forget(1, heard=False)]
    assert only(e.ResetTheta, effects) == []
    assert node.task is not None


# --- displacements --------------------------------------------------------------------------------------------------


def test_a_values_node_announces_its_displacement() -> None:
    node, values = answered_node(announced()), Values(short_hash(b"blob"), 40, 1)
    (update,) = sent(node.give(e.StepsDone(1.0, 0, (), 0.5, values)), Update)
    assert (update.scalars, update.values, update.loss) == ((), values, 0.5)
    assert sent(node.frames(2.0, announced()), Update) == [update]
    assert only(e.Forget, node.frames(3.0, announced(heard=frozenset({0})))) == [e.Forget(0, heard=True)]


def test_in_a_synchronous_run_it_learns_from_the_next_round_that_it_was_heard() -> None:
    node = answered_node(announced())
    node.give(e.StepsDone(1.0, 0, (), 0.5, Values(short_hash(b"blob"), 40, 1)))
    effects = node.frames(2.0, ahead(1, heard_before=((0, 1),)))
    assert only(e.Forget, effects) == [e.Forget(0, heard=True)]
    assert "late step" not in reasons(effects)


def test_entries_whose_displacement_does_not_come_are_asked_for_after_a_while() -> None:
    node, entries = answered_node(), tuple(chain(1))
    node.machine.handle(e.FrameCame(1.0, announced(1, entries=entries)))
    assert reasons(node.machine.handle(e.JobFailed(2.0, e.ApplyEntries(entries)))) == ["entries missed"]
    assert (node.machine.wake_at, node.machine.version) == (4.0, 0)
    (want,) = only(e.Send, node.machine.handle(e.Tick(4.0)))
    assert want.frame.entries_from == 0  # type: ignore[union-attr]
    assert reasons(node.machine.handle(e.JobFailed(5.0, e.ApplyEntries(entries)))) == ["unexpected answer"]
