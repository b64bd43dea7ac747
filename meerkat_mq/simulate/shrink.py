"""From a schedule that fails to the least that fails in the same way."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.simulate.schedule import Schedule

FEWEST_NODES = 2
_PLAIN = {
    "slow": False, "leftovers": False, "fickle": False, "commit_s": 0.0, "judge_s": 0.0, "spread": 1.0, "values": 0,
    "sleepers": 0, "keeps": False, "reluctant": False, "packet_bytes": 2**28, "earlier": "",
}  # fmt: skip
_PLAIN_RULES: tuple[dict[str, Any], ...] = (
    {"weigh_by_rows": False}, {"fraction": 1.0}, {"local_steps": 1}, {"directions": 1}, {"digest_every": 1},
    {"aggregate": "mean"}, {"early_stopping": EarlyStoppingConfig()}, {"perturbations": 1},
    {"mode": "synchronous", "max_staleness": 0}, {"max_staleness": 0}, {"staleness": "constant"},
)  # fmt: skip


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Take away, greedily, what is not needed to fail: faults, then peculiarities, nodes and rounds; no quorum."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(schedule):
            if candidate.has_quorum >= schedule.has_quorum and fails(candidate):
                schedule, smaller = candidate, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    faults = schedule.faults
    if len(faults) > 2:
        yield replace(schedule, faults=faults[: len(faults) // 2])
        yield replace(schedule, faults=faults[len(faults) // 2 :])
    for number in range(len(faults)):
        yield replace(schedule, faults=faults[:number] + faults[number + 1 :])
    for name, value in _PLAIN.items():
        if getattr(schedule, name) != value:
            yield replace(schedule, **{name: value})  # type: ignore[arg-type]
    for rules in _PLAIN_RULES:
        if any(getattr(schedule.settings, name) != value for name, value in rules.items()):
            yield _with(schedule, **rules)
    yield from _fewer(schedule)


def _fewer(schedule: Schedule) -> Iterator[Schedule]:
    last, size, rules = f"n{schedule.nodes - 1}", schedule.nodes - 1, schedule.settings
    if size >= FEWEST_NODES and all(fault.target != last for fault in schedule.faults):
        lanes = 1 if size < rules.min_nodes else rules.directions
        yield replace(_with(schedule, min_nodes=min(rules.min_nodes, size), directions=lanes), nodes=size)
    for rounds in (rules.count // 2, rules.count - 2):
        if rounds >= 2:
            yield _with(schedule, count=rounds - rounds % 2)


def _with(schedule: Schedule, **rules: Any) -> Schedule:
    return replace(schedule, settings=schedule.settings.model_copy(update=rules))
