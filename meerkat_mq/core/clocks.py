"""Durations between readings of wall clocks, which are set now and then: at 1970 after a start without a battery."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

WAS_SET = 1_704_067_200.0  # 2024-01-01: a clock that reads less was not set yet
SKEW_S = 60.0  # by so much, clocks of different machines and readings in another order may differ


def elapsed(since: float, until: float) -> float | None:
    """Seconds from one reading (seconds since 1970) to a later one, never negative.

    None where the clock was set in between: it went back, or only the later one is of a clock that was set.
    """
    if until < since - SKEW_S or since < WAS_SET <= until:
        return None
    return max(0.0, until - since)


def typical(readings: Sequence[float]) -> float | None:
    """The median of the seconds from each reading to the next: what a clock's step in between cannot move.

    None where nothing is known.
    """
    spans = [elapsed(since, until) for since, until in pairwise(readings) if until >= since]
    found = [seconds for seconds in spans if seconds is not None]
    return median(found) if found else None
