"""Schedules by the hundred: nothing that must hold is violated, and a schedule can be repeated to the bit."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from meerkat_mq.core import metrics as m
from meerkat_mq.simulate.command import tally
from meerkat_mq.simulate.reached import OFFERED, REACHED, missing, struck
from meerkat_mq.simulate.run import judge
from meerkat_mq.simulate.schedule import KINDS, Schedule, ScheduledFault, make_schedule
from meerkat_mq.simulate.shrink import shrink

CHUNK = 50


def changed(schedule: Schedule, *, min_nodes: int, directions: int = 1, **changes: Any) -> Schedule:
    """Another schedule, with another number of nodes that a round needs."""
    rules = {"min_nodes": min_nodes, "directions": directions}
    return replace(schedule, settings=schedule.settings.model_copy(update=rules), **changes)


@pytest.mark.parametrize("first", range(0, 500, CHUNK))
def test_no_schedule_of_faults_breaks_what_must_hold(first: int) -> None:
    total = tally(range(first, first + CHUNK))
    assert total.failed == {}, f"meerkat simulate --repeat {min(total.failed)}"
    assert total.rounds >= 50 * CHUNK
    assert len(total.faults) > 10


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_nodes_that_know_a_higher_term_than_a_restored_ledger_say_so_without_a_new_connection(seed: int) -> None:
    history, found = judge(make_schedule(seed, ("restore",)))
    assert found == []
    assert history.reached[m.STALE_SERVER] > 0


def test_a_second_restore_to_before_the_first_undoes_all_in_between() -> None:
    assert judge(make_schedule(50094))[1] == []  # another node's update had led to an entry that is equal to a kept one


def test_each_seed_draws_its_own_kinds_of_faults() -> None:
    schedules = [make_schedule(seed) for seed in range(500)]
    assert all({fault.name for fault in schedule.faults} <= set(schedule.kinds) for schedule in schedules)
    assert {kind for schedule in schedules for kind in schedule.kinds} == set(KINDS)
    assert len({schedule.kinds for schedule in schedules}) > 450


def test_a_campaign_that_never_met_something_says_what() -> None:
    reached = Counter(dict.fromkeys(REACHED, 1))
    assert len(REACHED) >= 40
    assert missing(reached, REACHED) == []
    assert missing(reached - Counter([OFFERED, struck(KINDS[0])]), REACHED) == [OFFERED, f"fault: {KINDS[0]}"]


def test_schedules_span_what_they_should() -> None:
    schedules = [make_schedule(seed) for seed in range(2000)]
    assert {schedule.nodes for schedule in schedules} >= {3, 4, 20}
    assert all(3 <= schedule.nodes <= 20 and schedule.settings.count >= 50 for schedule in schedules)
    assert {fault.name for schedule in schedules for fault in schedule.faults} == set(KINDS)
    assert {schedule.settings.early_stopping.by for schedule in schedules} == {"off", "vpcs", "random"}
    assert {schedule.settings.perturbations for schedule in schedules} == {1, 2}
    assert 0.45 < sum(schedule.settings.buffered for schedule in schedules) / len(schedules) < 0.55
    assert {schedule.settings.max_staleness for schedule in schedules} == set(range(6))
    assert {schedule.values > 0 for schedule in schedules} == {schedule.sleepers > 0 for schedule in schedules}


@pytest.mark.parametrize("by", ["vpcs", "random"])
def test_schedules_flag_some_nodes_and_not_others(by: str) -> None:
    flagged = Counter[bool]()
    for schedule in [
        schedule for seed in range(30) if (schedule := make_schedule(seed)).settings.early_stopping.by == by
    ]:
        history, _ = judge(schedule)
        flagged.update(judgement.early_stopped for found in history.judgements for judgement in found)
    assert min(flagged[True], flagged[False]) > 10


def test_buffered_schedules_have_stale_updates_partial_paths_and_displacements() -> None:
    ages, partial, displaced = Counter[int](), 0, 0
    buffered = [found for seed in range(400) if (found := make_schedule(seed)).settings.buffered]
    for schedule in sorted(buffered, key=lambda found: -found.spread * found.settings.max_staleness)[:20]:
        history, _ = judge(schedule)
        whole = schedule.settings.perturbations * schedule.settings.local_steps
        records = [(entry, record) for entry, found in enumerate(history.records) for record in found]
        ages.update(entry - record.version for entry, record in records)
        partial += sum(0 < len(record.scalars) < whole for _, record in records)
        displaced += sum(entry.displacement is not None for entry in history.entries)
    assert set(ages) == set(range(6))
    assert min(partial, displaced) > 20


def test_the_same_seed_gives_the_same_history() -> None:
    first, second = (judge(make_schedule(11))[0] for _ in range(2))
    assert first.entries == second.entries
    assert first.updates == second.updates
    assert first.states == second.states


def test_a_schedule_is_data() -> None:
    schedule = make_schedule(8)
    assert schedule.faults
    assert Schedule.decode(schedule.encode()) == schedule


def test_without_quorum_a_run_does_not_finish_and_the_checker_says_so() -> None:
    schedule = changed(make_schedule(4), nodes=3, min_nodes=4, faults=())
    history, found = judge(schedule)
    assert history.entries == []
    assert [violation.checker for violation in found] == ["a live quorum finishes"]


def test_a_schedule_shrinks_to_what_makes_it_fail() -> None:
    faults = tuple(
        ScheduledFault(name, "server", float(at), 1.0, 0.5) for at, name in enumerate(["crash", "lose", "freeze"])
    )
    schedule = changed(make_schedule(0), faults=faults, nodes=5, slow=True, min_nodes=3)
    least = shrink(schedule, lambda smaller: any(fault.name == "lose" for fault in smaller.faults))
    assert [fault.name for fault in least.faults] == ["lose"]
    assert (least.nodes, least.settings.count, least.slow) == (2, 2, False)
