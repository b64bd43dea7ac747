"""Faults that never heal: with a live quorum and a live server the run still comes to its end."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from meerkat_mq.rounds.policy import deadline_length
from meerkat_mq.simulate.command import tally
from meerkat_mq.simulate.reached import LIVENESS, missing
from meerkat_mq.simulate.run import judge, patience
from meerkat_mq.simulate.schedule import LOSSES, Schedule, ScheduledFault, make_schedule
from meerkat_mq.simulate.shrink import shrink

CHUNK = 20


def lasting(schedule: Schedule) -> list[ScheduledFault]:
    """Its faults that never heal."""
    return [fault for fault in schedule.faults if fault.lasts == math.inf]


def with_loss(name: str) -> Schedule:
    """A schedule of one fault: a node that rounds need is lost."""
    schedule = make_schedule(0, (name,), liveness=True)
    fault = ScheduledFault(name, "n1", 2.0, math.inf, 0.0)
    rules = {"min_nodes": 2, "directions": 1, "quorum": 1.0, "mode": "synchronous", "max_staleness": 0, "fraction": 1.0}
    settings = schedule.settings.model_copy(update=rules)
    return replace(schedule, nodes=3, settings=settings, faults=(fault,), values=0, sleepers=0, slow=False)


@pytest.mark.parametrize("first", range(0, 60, CHUNK))
def test_no_fault_that_never_heals_keeps_a_run_from_its_end(first: int) -> None:
    total = tally(range(first, first + CHUNK), liveness=True)
    assert total.failed == {}, f"meerkat simulate --liveness --repeat {min(total.failed)}"
    assert total.rounds >= 50 * CHUNK


def test_schedules_leave_a_live_quorum() -> None:
    schedules = [make_schedule(seed, liveness=True) for seed in range(1000)]
    assert all(lasting(schedule) and schedule.has_quorum for schedule in schedules)
    for schedule in schedules:
        assert all(fault in lasting(schedule) for fault in schedule.faults if fault.target in schedule.lost)
    drawn = {(fault.name, fault.target in schedule.lost) for schedule in schedules for fault in lasting(schedule)}
    assert drawn == {*((name, True) for name in LOSSES), ("disk full", False), ("poison", False)}
    assert {len(schedule.lost) for schedule in schedules} == {0, 1, 2}


def test_without_liveness_every_fault_heals() -> None:
    assert all(make_schedule(seed).heals_at < math.inf and not lasting(make_schedule(seed)) for seed in range(200))


@pytest.mark.parametrize(("name", "state"), [("crash", "not alive"), ("partition up", "idle"), ("disk full", None)])
def test_a_run_that_stands_still_says_what_it_waits_for(name: str, state: str | None) -> None:
    history, found = judge(with_loss(name))
    assert history.finished is (state is None)
    if state is not None:
        (violation,) = found
        assert violation.checker == "a live quorum finishes"
        assert "the server is open, and waits for n1 (" in violation.problem
        assert f"{name} for good)" in violation.problem


def test_a_federation_has_at_least_the_time_of_all_deadlines() -> None:
    for seed in range(200):
        schedule = make_schedule(seed, liveness=True)
        rules = schedule.settings
        deadlines = sum(deadline_length(rules, version, 0) for version in range(rules.count))
        assert deadlines < patience(schedule) < math.inf


def test_a_sample_with_too_many_lost_has_the_time_of_its_extension() -> None:
    schedule = make_schedule(1766, liveness=True)  # three of four are asked, three are needed, and one never answers
    settings = schedule.settings.model_copy(update={"fraction": 1.0})
    assert (schedule.settings.fraction, len(schedule.lost)) == (0.6, 1)
    assert judge(schedule)[1] == []
    assert patience(schedule) > patience(replace(schedule, settings=settings))


def test_what_is_shrunk_keeps_its_quorum() -> None:
    schedule = make_schedule(
        next(seed for seed in range(100) if make_schedule(seed, liveness=True).lost), liveness=True
    )
    least = shrink(schedule, lambda smaller: bool(smaller.lost))
    assert len(least.faults) == 1
    assert least.has_quorum


def test_a_campaign_must_meet_each_fault_that_never_heals() -> None:
    assert {f"fault: {kind} for good" for kind in LOSSES} < set(LIVENESS)
    assert missing(Counter(LIVENESS), LIVENESS) == []
    assert missing(Counter(LIVENESS[1:]), LIVENESS) == ["fault: crash for good"]
