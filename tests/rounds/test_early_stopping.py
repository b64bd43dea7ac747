"""Calibration rounds: what they ask, whom they flag, and what becomes of who is flagged."""

import math
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.path import Coefficient
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.early_stopping import EarlyStopping, judgements_of
from meerkat_mq.rounds.records import Judgement, UpdateRecord, Verdict
from meerkat_mq.wire.frames import Reason, Refusal
from tests.rounds.support import AnsweredServer, answered_server, chain, only, reasons
from tests.rounds.support import settings as rules_of

VPCS = EarlyStoppingConfig(by="vpcs", calibration_steps=10, rho_later=3.0, quiet=0.1)
DECAYING = (8.0, -8.0, 2.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
STEADY = (8.0, -8.0, 7.0, 6.0, -8.0, 8.0, -7.0, 8.0, 6.0, -8.0)
CALIBRATING: dict[str, Any] = {"steps": 3, "lr": 1.0, "measured": True, "early_stopping": VPCS}


def ready(
    *slow: type[object], nodes: str = "ab", resume: dict[str, Any] | None = None, **changes: Any
) -> AnsweredServer:
    """A calibration of ten steps is open; other rounds have three, and one for early-stopped nodes."""
    server = answered_server(*slow, resume=resume, **CALIBRATING | {"min_nodes": len(nodes)} | changes)
    server.born(0, *nodes)
    return server


def refusals(effects: list[e.ServerEffect]) -> list[Reason]:
    return [reply.frame.reason for reply in only(e.Reply, effects) if isinstance(reply.frame, Refusal)]


def short(server: AnsweredServer) -> dict[int, int]:
    """Which slots the round asks for fewer steps, and how many."""
    return dict(server.round.short)


# --- calibration rounds -----------------------------------------------------------------------------------------------


def test_a_calibration_asks_for_its_own_steps_and_measures_all_directions() -> None:
    server = ready(lanes=2, perturbations=2)
    assert only(e.MeasureDirections, server.seen) == [e.MeasureDirections(0, 2, 20)]
    assert (server.round.steps, short(server)) == (10, {})
    assert server.round.deadline_ms == 1000 * 100 * 10 / 3 // 1
    server.update(1, "a", *[1.0] * 20)
    server.update(1, "b", *[1.0] * 20)
    assert only(e.MeasureDirections, server.seen)[1:] == [e.MeasureDirections(1, 2, 6)]
    assert (server.round.steps, server.round.deadline_ms) == (3, 100_000)


def test_who_is_flagged_counts_with_its_first_steps_alone_and_does_fewer_from_then_on() -> None:
    server = ready()
    server.update(1, "a", *STEADY)
    effects = server.update(2, "b", *DECAYING)
    (closed,) = server.entries
    assert closed.products == ((1.0,) * 10,)
    assert [(found.node, found.early_stopped) for found in closed.judgements] == [("a", False), ("b", True)]
    assert closed.judgements[1] == Judgement(0, "b", math.inf, 1.0, early_stopped=True)
    assert [(r.verdict, r.scalars) for r in closed.records] == [
        (Verdict.ACCEPTED, STEADY),
        (Verdict.EARLY_STOPPED, DECAYING),
    ]
    means = [8.0, *(g / 2 for g in STEADY[1:3])]  # of the calibration's ten steps, a round's three count
    assert closed.entry.terms == tuple(Coefficient(0, step, c) for step, c in enumerate(means))
    assert not any(reason.startswith(("refused", "flagged")) for reason in reasons(effects))
    assert (server.round.steps, short(server)) == (3, {1: 1})
    server.update(3, "a", 1.0, 1.0, 1.0)
    server.update(3, "b", 3.0)
    assert server.entries[1].entry.terms == (Coefficient(0, 0, 2.0), Coefficient(0, 1, 0.5), Coefficient(0, 2, 0.5))
    assert (server.entries[1].products, server.entries[1].judgements) == (((1.0,) * 3,), ())
    assert [r.verdict for r in server.entries[1].records] == [Verdict.ACCEPTED] * 2


def test_a_wrong_number_of_steps_is_refused_in_any_round() -> None:
    server = ready()
    assert refusals(server.update(1, "a", 1.0, 1.0, 1.0)) == [Reason.WRONG_STEPS]
    assert refusals(server.update(1, "a", 1.0)) == [Reason.WRONG_STEPS]
    server.update(1, "a", *STEADY)
    server.update(1, "b", *DECAYING)
    assert refusals(server.update(2, "a", 1.0)) == [Reason.WRONG_STEPS]
    assert refusals(server.update(2, "b", 1.0, 1.0, 1.0)) == [Reason.WRONG_STEPS]
    assert refusals(server.update(2, "b", *DECAYING)) == [Reason.WRONG_STEPS]
    assert refusals(server.update(2, "b", 1.0)) == []


def test_with_perturbations_each_step_has_that_many_scalars() -> None:
    server = ready(perturbations=2)
    assert refusals(server.update(1, "a", *STEADY)) == [Reason.WRONG_STEPS]
    server.update(1, "a", *STEADY, *STEADY)
    server.update(1, "b", *DECAYING, *[0.0] * 10)
    assert [found.early_stopped for found in server.entries[0].judgements] == [False, True]
    assert [term.coefficient for term in server.entries[0].entry.terms[:4]] == [4.0, -4.0, 1.75, 1.5]
    assert refusals(server.update(2, "b", 1.0)) == [Reason.WRONG_STEPS]
    assert refusals(server.update(2, "b", 1.0, 2.0)) == []


def test_at_few_local_steps_early_stopping_is_off() -> None:
    server = ready(steps=1)
    assert (server.round.steps, server.round.deadline_ms) == (1, 100_000)
    server.update(1, "a", 1.0)
    server.update(1, "b", 0.0)
    assert server.entries[0].judgements == ()
    assert server.entries[0].products == ((1.0,),)  # GradIP is kept all the same
    assert short(server) == {}


def test_whoever_comes_later_or_was_not_heard_is_not_judged() -> None:
    server = ready(nodes="abc", quorum=0.6)
    server.update(1, "a", *STEADY)
    server.update(1, "b", *DECAYING)
    server.tick(2000)
    server.born(2001, "d")
    assert [found.node for found in server.entries[0].judgements] == ["a", "b"]
    assert short(server) == {1: 1}
    for node, steps in {"a": 3, "b": 1, "c": 3}.items():
        server.update(2002, node, *[1.0] * steps)
    assert server.round.asked == {0, 1, 2, 3}
    assert short(server) == {1: 1}
    assert refusals(server.update(2003, "d", 1.0, 1.0, 1.0)) == []


def test_a_refused_update_is_not_judged() -> None:
    server = ready(nodes="abcd")
    for node in "abc":
        server.update(1, node, *STEADY)
    server.update(1, "d", *[1e9] * 2, *[0.0] * 8)
    assert [found.node for found in server.entries[0].judgements] == ["a", "b", "c"]
    assert server.entries[0].records[3].verdict is Verdict.OUTLIER
    assert short(server) == {}


def test_verdicts_are_re_examined_as_often_as_asked() -> None:
    server = ready(early_stopping=VPCS.model_copy(update={"every": 2}))
    server.update(1, "a", *DECAYING)
    server.update(1, "b", *DECAYING)
    assert short(server) == {0: 1, 1: 1}
    server.update(2, "a", 1.0)
    server.update(2, "b", 1.0)
    assert (server.round.steps, short(server)) == (10, {})
    server.update(3, "a", *STEADY)
    server.update(3, "b", *DECAYING)
    assert (server.round.steps, short(server)) == (3, {1: 1})
    server.update(4, "a", 1.0, 1.0, 1.0)
    server.update(4, "b", 1.0)
    server.update(5, "a", *DECAYING)
    server.gone(5, "b")
    server.tick(10_000)
    server.born(10_001, "b", boot=2, link=2)
    server.update(10_002, "b", *STEADY, boot=2)
    assert short(server) == {0: 1}


@pytest.mark.parametrize("every", [0, 2, 3])
def test_which_rounds_calibrate(every: int) -> None:
    rules = rules_of(**CALIBRATING | {"early_stopping": VPCS.model_copy(update={"every": every})})
    expected = {0: [0], 2: [0, 2, 4, 6], 3: [0, 3, 6]}[every]
    assert [version for version in range(7) if rules.calibrates(version)] == expected


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_calibration_asks_every_node_whatever_the_fraction(fraction: float) -> None:
    every = VPCS.model_copy(update={"every": 2})
    server = ready(nodes="abcdefgh", fraction=fraction, quorum=0.5, early_stopping=every)
    counts = []
    for version in range(3):
        asked = server.round.asked
        counts.append(len(asked))
        for slot in sorted(asked):
            server.update(version, "abcdefgh"[slot], *STEADY[: server.round.steps])
    assert counts == [8, 8 * fraction, 8]
    assert [len(closed.judgements) for closed in server.entries] == [8, 0, 8]


def test_a_calibrations_quorum_is_of_all_nodes() -> None:
    server = ready(nodes="abcdefgh", fraction=0.25, quorum=0.75)
    for node in "abcde":
        server.update(1, node, *STEADY)
    server.gone(2, "f", "stopped")
    server.gone(2, "g", "stopped")
    assert reasons(server.tick(2000)) == ["round extended"]
    assert server.entries == []
    server.update(2001, "h", *STEADY)
    assert len(server.entries[0].judgements) == 6


# --- the directions are measured off the loop -------------------------------------------------------------------------


def test_a_round_closes_no_sooner_than_its_directions_are_measured() -> None:
    server = ready(e.MeasureDirections)
    server.update(1, "a", *STEADY)
    server.update(2, "b", *DECAYING)
    assert (server.entries, server.machine.version) == ([], 0)
    server.answer(3)
    assert server.machine.version == 1
    assert not server.entries[0].overdue


def test_directions_measured_after_the_deadline_close_the_round_at_once_and_extend_nothing() -> None:
    server = ready(e.MeasureDirections, quorum=0.5, deadline_s=3.0)
    server.update(1, "a", *STEADY)
    assert reasons(server.tick(10)) == []
    assert server.round.attempt == 0
    assert server.machine.wake_at is None
    server.update(10.5, "b", *DECAYING)
    server.answer(11)
    assert [record.node for record in server.entries[0].records] == ["a", "b"]
    assert server.entries[0].overdue


def test_below_quorum_late_directions_change_nothing() -> None:
    server = ready(e.MeasureDirections, deadline_s=3.0)
    server.update(1, "a", *STEADY)
    assert reasons(server.tick(10)) == ["round extended"]
    server.answer(11)
    assert server.entries == []
    server.update(12, "b", *DECAYING)
    assert server.machine.version == 1


def test_measurements_that_nobody_waits_for_are_counted() -> None:
    server = ready(e.MeasureDirections)
    products = ((1.0,) * 10,)
    assert reasons(server.give(e.DirectionsMeasured(1, 1, products))) == ["unexpected answer"]
    assert reasons(server.give(e.DirectionsMeasured(1, 0, products))) == []
    assert reasons(server.give(e.DirectionsMeasured(1, 0, ((9.0,) * 10,)))) == ["unexpected answer"]
    server.update(1, "a", *STEADY)
    server.update(2, "b", *DECAYING)
    assert server.entries[0].products == products
    assert reasons(answered_server().give(e.DirectionsMeasured(1, 0, products))) == ["unexpected answer"]
    plain = ready(measured=False, early_stopping=EarlyStoppingConfig())
    assert not only(e.MeasureDirections, plain.seen)
    assert reasons(plain.give(e.DirectionsMeasured(1, 0, products))) == ["unexpected answer"]


# --- a new term -------------------------------------------------------------------------------------------------------


def taken(server: AnsweredServer) -> list[UpdateRecord]:
    return [commit.record for commit in only(e.CommitUpdate, server.seen)]


def test_a_server_resumed_in_mid_calibration_closes_it_alike() -> None:
    steady, stopped = ready(nodes="abc"), ready(nodes="abc")
    for server in (steady, stopped):
        server.update(1, "a", *STEADY)
        server.update(1, "b", *DECAYING)
    slots = {"a": 0, "b": 1, "c": 2}
    resumed = ready(nodes="abc", resume={"term": 2, "slots": slots, "updates": taken(stopped)})
    assert (resumed.round.steps, set(resumed.round.heard)) == (10, {0, 1})
    steady.update(2, "c", *STEADY)
    resumed.update(2, "c", *STEADY, term=2)
    assert resumed.entries == steady.entries
    assert short(resumed) == short(steady) == {1: 1}


def test_the_newest_judgement_of_each_node_outlives_the_server() -> None:
    entries = chain(3)
    past = [Judgement(0, "a", 9.0, 1.0, True), Judgement(0, "b", 1.0, 0.0, False), Judgement(2, "a", 1.0, 0.0, False)]
    past += [Judgement(2, "b", 9.0, 1.0, True), Judgement(2, "z", 9.0, 1.0, True)]
    ledger = {"version": 3, "entries": entries, "slots": {"a": 0, "b": 1}, "judgements": past}
    server = ready(resume=ledger)
    assert (server.round.steps, short(server)) == (3, {1: 1})


def test_a_flagged_node_is_asked_for_fewer_steps_except_in_a_calibration() -> None:
    early = EarlyStopping(rules_of(**CALIBRATING), [Judgement(0, "a", 9.0, 1.0, early_stopped=True)])
    assert [early.steps_of(version, "a") for version in (0, 1, 2)] == [10, 1, 1]
    assert [early.steps_of(version, "b") for version in (0, 1, 2)] == [10, 3, 3]


@pytest.mark.parametrize("changes", [{"early_stopping": EarlyStoppingConfig()}, {"steps": 1}], ids=["off", "T = 1"])
def test_where_early_stopping_is_off_the_flagged_do_as_many_steps_as_everybody(changes: dict[str, Any]) -> None:
    rules = rules_of(**CALIBRATING | changes)
    early = EarlyStopping(rules, [Judgement(0, "a", 9.0, 1.0, early_stopped=True)])
    assert [early.steps_of(version, "a") for version in (0, 1)] == [rules.local_steps] * 2


# --- the control ------------------------------------------------------------------------------------------------------


def records_of(paths: dict[int, tuple[float, ...]], version: int = 0) -> list[UpdateRecord]:
    return [UpdateRecord(version, f"n{slot}", slot, 1, 1, path, 1.0) for slot, path in sorted(paths.items())]


@pytest.mark.parametrize(("part", "count", "drawn"), [(0.25, 8, 2), (0.25, 9, 3), (1.0, 5, 5), (0.01, 3, 1)])
def test_the_control_draws_its_share_of_the_nodes_whatever_their_paths(part: float, count: int, drawn: int) -> None:
    config = EarlyStoppingConfig(by="random", calibration_steps=10, random_share=part)
    rules = rules_of(**CALIBRATING | {"early_stopping": config, "measured": False})
    found = judgements_of(0, records_of(dict.fromkeys(range(count), STEADY)), (), rules)
    assert sum(judgement.early_stopped for judgement in found) == drawn
    assert {(judgement.rho_later, judgement.rho_quiet) for judgement in found} == {(0.0, 0.0)}
    again = judgements_of(0, records_of(dict.fromkeys(range(count), DECAYING)), (), rules)
    assert again == found
    measured = judgements_of(0, records_of(dict.fromkeys(range(count), DECAYING)), ((1.0,) * 10,), rules)
    assert [found.early_stopped for found in measured] == [found.early_stopped for found in again]
    assert {judgement.rho_quiet for judgement in measured} == {1.0}


def test_each_calibration_of_the_control_draws_others_and_every_slot_about_equally_often() -> None:
    config = EarlyStoppingConfig(by="random", calibration_steps=4, every=2)
    rules = rules_of(**CALIBRATING | {"early_stopping": config})
    counts = [0] * 8
    for version in range(0, 800, 2):
        for judgement in judgements_of(version, records_of(dict.fromkeys(range(8), (1.0,) * 4), version), (), rules):
            counts[int(judgement.node[1:])] += judgement.early_stopped
    assert sum(counts) == 800
    assert all(60 < count < 140 for count in counts)


def test_a_resumed_control_draws_the_same_nodes() -> None:
    config = EarlyStoppingConfig(by="random", calibration_steps=10)
    changes: dict[str, Any] = {"early_stopping": config, "nodes": "abcd"}
    steady, stopped = ready(**changes), ready(**changes)
    for server in (steady, stopped):
        server.update(1, "c", *STEADY)
        server.update(1, "a", *STEADY)
    slots = {"a": 0, "b": 1, "c": 2, "d": 3}
    resumed = ready(resume={"term": 2, "slots": slots, "updates": taken(stopped)}, **changes)
    for node in "db":
        steady.update(2, node, *STEADY)
        resumed.update(2, node, *STEADY, term=2)
    assert resumed.entries == steady.entries
    assert len(short(resumed)) == 1


# --- order ------------------------------------------------------------------------------------------------------------

paths = st.lists(
    st.sampled_from([DECAYING, STEADY, (0.0,) * 10, (1e9,) * 10])
    | st.lists(st.floats(-10, 10, width=32), min_size=10, max_size=10).map(tuple),
    min_size=2,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(paths, st.sampled_from(["vpcs", "random"]), st.integers(1, 2), st.randoms(use_true_random=False))
def test_judgements_do_not_depend_on_the_order_of_arrival(
    found: list[tuple[float, ...]], by: Any, lanes: int, rng: Random
) -> None:
    config = VPCS.model_copy(update={"by": by})
    names = [f"n{number}" for number in range(len(found))]
    closed = []
    for order in (names, rng.sample(names, len(names))):
        server = answered_server(**CALIBRATING | {"min_nodes": len(found), "lanes": lanes, "early_stopping": config})
        server.born(0, *names)
        for node in order:
            server.update(1, node, *found[int(node[1:])])
        closed.append(server.entries)
    assert closed[0] == closed[1] != []
