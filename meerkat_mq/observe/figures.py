"""Figures as people read them, and curves as people see them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from meerkat_mq.errors import printable

DASH = "–"
MOST_NAMED = 5
MOST_SPANS: Final = 512  # of a path; even
UNITS = ("kB", "MB", "GB", "TB", "PB")


def human_bytes(count: float) -> str:
    """A size in three digits, decimal units: "780 B", "27.3 kB", "1.28 GB"."""
    if count < 999.5:
        return f"{count:.0f} B"
    thousands = next(power for power in range(1, len(UNITS) + 1) if count < 999.5 * 1000**power or power == len(UNITS))
    count /= 1000**thousands
    return f"{count:.{_decimals(count)}f} {UNITS[thousands - 1]}"


def human_factor(factor: float) -> str:
    """A ratio in two digits: "1.3", "33", "47,000"."""
    if factor < 9.95:
        return f"{factor:.1f}"
    digits = max(0, math.floor(math.log10(factor)) - 1)
    return f"{round(factor, -digits):,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """A share as "58.1 %"."""
    return f"{100 * share:.{digits}f} %"


def small_percent(share: float) -> str:
    """A small share in two digits at least: "0.070 %", "1.2 %"."""
    if not 0 < share < 0.1:
        return percent(share)
    return percent(share, 1 - math.floor(math.log10(100 * share)))


def points(gain: float) -> str:
    """A difference of two shares as "+30.3 points"."""
    return f"{100 * gain:+.1f} points".replace("-", "−")


def duration(seconds: float) -> str:
    """A time span in at most two units: "4.2 s", "1 min 52 s", "2 h 03 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, whole = divmod(whole, 60)
    return f"{minutes} min {whole:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def named(names: Sequence[str]) -> str:
    """A few names, or how many more there are: "none", "a, b", "a, b, c, d, e and 7 more"."""
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(printable, names[:MOST_NAMED])) + more or "none"


def rounded(value: float, digits: int) -> float | None:
    """A figure for a log line; None where it is not finite, which JSON cannot say."""
    return round(value, digits) if math.isfinite(value) else None


def log_keys(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by reason as keys of a log line: "refused: wrong seeds" is `counted_refused_wrong_seeds`."""
    return {
        f"counted_{re.sub(r'[^a-z0-9]+', '_', reason.lower()).strip('_')}": count for reason, count in counts.items()
    }


class Smoother:
    """Exponential moving average, free of the start's bias.

    Args:
        window: values that it averages over, about; 1 smooths nothing.
    """

    def __init__(self, window: float) -> None:
        self._keep = 1 - 2 / (max(1.0, window) + 1)
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """Take a value; returns the average now."""
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight


def smoothed(values: Iterable[float], window: float) -> list[float]:
    """The moving average after each value."""
    average = Smoother(window)
    return [average.add(value) for value in values]


class Magnitudes:
    """|GradIP| of a node: means over spans of as many steps each; when there are too many, two become one."""

    def __init__(self) -> None:
        self._span = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Take the GradIP of the node's next local step."""
        self._sum, self._count = self._sum + abs(value), self._count + 1
        if self._count < self._span:
            return
        self._means.append(self._sum / self._span)
        self._sum, self._count = 0.0, 0
        if len(self._means) == MOST_SPANS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._span *= 2

    @property
    def points(self) -> list[tuple[float, float]]:
        """(local step of the node, mean up to it from the point before)."""
        return [(self._span * number, mean) for number, mean in enumerate(self._means, start=1)]


def _decimals(value: float) -> int:
    return 2 if value < 9.995 else 1 if value < 99.95 else 0
