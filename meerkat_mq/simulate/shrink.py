"""From a schedule that fails to the least that fails in the same way."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from meerkat_mq.simulate.schedule import Schedule

FEWEST_NODES = 2


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Take away, greedily, what is not needed to fail: faults, then peculiarities, nodes and rounds."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(schedule):
            if fails(candidate):
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
    plain = {
        "wire": False, "slow": False, "leftovers": False, "fickle": False, "weigh_by_rows": False, "fraction": 1.0,
        "steps": 1, "lanes": 1, "digest_every": 1, "aggregate": "mean", "commit_s": 0.0,
        "early_stopping": "off", "every": 0, "perturbations": 1, "mode": "synchronous", "max_staleness": 1,
        "staleness": "constant", "spread": 1.0, "values": 0, "sleepers": 0, "keeps": False, "reluctant": False,
        "packet_bytes": 2**28,
    }  # fmt: skip
    for name, value in plain.items():
        if getattr(schedule, name) != value:
            yield replace(schedule, **{name: value})  # type: ignore[arg-type]
    yield from _fewer(schedule)


def _fewer(schedule: Schedule) -> Iterator[Schedule]:
    last, size = f"n{schedule.nodes - 1}", schedule.nodes - 1
    if size >= FEWEST_NODES and all(fault.target != last for fault in schedule.faults):
        min_nodes = min(schedule.min_nodes, size)
        yield replace(
            schedule, nodes=size, min_nodes=min_nodes, lanes=1 if size < schedule.min_nodes else schedule.lanes
        )
    for rounds in (schedule.rounds // 2, schedule.rounds - 2):
        if rounds >= 2:
            yield replace(schedule, rounds=rounds - rounds % 2)
