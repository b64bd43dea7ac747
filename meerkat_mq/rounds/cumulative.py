"""The cumulative test: does a node, over the rounds of a window, push against what the others of its lane measure?

    p = (x ÷ s) · (y ÷ s)        x: the node's scalar, y: the median of the others, s: the lane's median magnitude
    evidence = Σ p ÷ √(Σ p²)     x ÷ s and y ÷ s are first cut to ±2
    slope = Σ p ÷ Σ (y ÷ s)²

The evidence is about normal for a node whose scalars have nothing to do with the others' (a self-normalised sum, Efron
1969), and positive for one that moves as they do. No one node or round decides it, since each scalar is cut first. It
says nothing of how much. A node with rows of one label, which its model knows, has small scalars that all pull against
the others. The slope says what part of the others' steps a node takes back. A small part does no harm, but to refuse
such a node does. The correlation of the older test, in runs without the clipped mean, is kept here too: all are sums
over the same pairs.

Where trusted nodes are in the lane, y is their median: then a majority that pushes against them is found too.

A displacement is compared with what the paths of its round say, along the directions of each lane: x ÷ s is what it
says of a direction (`Moved.along`). One round has many directions, so its node's sum counts the present round too.
Who knows the directions can push elsewhere. The other displacements, where an entry has three, leave no such room: of n
weights chance makes cosines of 1 ÷ √n, and honest displacements from one theta agree far more than that.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, mul

from meerkat_mq.rounds.clipping import FEWEST, median, median_magnitude
from meerkat_mq.rounds.records import NOT_REFUSED, Moved, UpdateRecord, Verdict

EVIDENCE = -2.75  # standard deviations: the sum over the window that no node without a bias is likely to reach
OPPOSED = -0.5  # cosine of a displacement with the entry's others; −0.33 was measured of an honest one
STRONG = 2.0  # a scalar counts as at most so many times the lane's median magnitude


@dataclass(slots=True)
class StepColumn:
    """Some nodes' projected gradients of one step.

    Attributes:
        low, high: the greatest of which the others have the medians `below` and `between`.
    """

    size: int  # how many
    largest: float  # magnitude
    median: float  # of all
    low: float
    high: float
    typical: float  # median magnitude
    below: float  # the median of the others, without a value up to `low`
    between: float  # without one above it, up to `high`
    above: float  # without one above that

    @classmethod
    def of(cls, ordered: Sequence[float]) -> "StepColumn":
        """Of sorted values; not empty."""
        size, largest, middle = len(ordered), max(-ordered[0], ordered[-1]), median(ordered)
        if size == 1:
            return cls(size, largest, middle, middle, middle, largest, middle, middle, middle)
        low, high = (size - 2) // 2, (size - 1) // 2
        below, between = (ordered[low + 1] + ordered[high + 1]) / 2, (ordered[low] + ordered[high + 1]) / 2
        above = (ordered[low] + ordered[high]) / 2
        typical = median_magnitude(ordered)
        return cls(size, largest, middle, ordered[low], ordered[high], typical, below, between, above)

    def without(self, value: float) -> float:
        """The median of the others, without one of these values."""
        return self.above if value > self.high else self.below if value <= self.low else self.between


@dataclass(slots=True)
class Comparison:
    """One update's projected gradients x with the medians y of the lane's others: sums over steps, and their signs."""

    xy: float
    xx: float
    yy: float
    agreed: int
    opposed: int
    evidence: float  # the sum of products, each scalar in units of its lane's size
    doubt: float  # the sum of their squares
    step: float  # the sum of the others' squares, in these units


def compare(record: UpdateRecord, columns: Sequence[StepColumn], trusted: Sequence[float] = ()) -> Comparison | None:
    """With the trusted nodes of its lane, by their medians of each step; without any, with the lane's others, in the
    steps where there are three. What is far out is cut to the lane's size."""
    if record.verdict == Verdict.NOT_FINITE:
        return None
    among = record.verdict in NOT_REFUSED
    if trusted:
        used: Sequence[StepColumn] = columns[: len(trusted)]
    else:
        used = [column for column in columns if column.size - among >= FEWEST]  # the first steps, all of them
    own = list(zip(record.scalars, used, strict=False))
    xs: Sequence[float] = record.scalars[: len(own)]  # of an accepted update none is larger than the columns' largest
    if not among:
        xs = [max(-column.largest, min(scalar, column.largest)) for scalar, column in own]
    if trusted:
        ys = list(trusted[: len(own)])
    else:
        ys = [column.without(scalar) if among else column.median for scalar, column in own]
    products = list(map(mul, xs, ys))
    agreed, opposed = sum(map((0.0).__lt__, products)), sum(map((0.0).__gt__, products))
    if not agreed + opposed:
        return None
    sizes = [column.typical for _, column in own]
    steps = [_cut(y, size) for y, size in zip(ys, sizes, strict=True) if size > 0]
    weighed = list(map(mul, [_cut(x, size) for x, size in zip(xs, sizes, strict=True) if size > 0], steps))
    return Comparison(
        _sum(products), _sum(map(mul, xs, xs)), _sum(map(mul, ys, ys)), agreed, opposed,
        _sum(weighed), _sum(map(mul, weighed, weighed)), _sum(map(mul, steps, steps)),
    )  # fmt: skip


def lane_says(columns: Sequence[StepColumn], trusted: Sequence[float]) -> list[float]:
    """What paths say of the first steps of their lane, in units of its size: trusted nodes, or the median of three."""
    medians = trusted or [column.median for column in columns if column.size >= FEWEST]
    return [_cut(y, column.typical) if column.typical > 0 else 0.0 for y, column in zip(medians, columns, strict=False)]


def compare_displacement(moved: Moved, lanes: Sequence[Sequence[float]]) -> Comparison | None:
    """With the paths of its round.

    Args:
        moved: the displacement.
        lanes: what each lane says, of all those along which it is measured.
    """
    steps = len(moved.along) // len(lanes)
    weighed = [
        _cut(x, 1.0) * y
        for lane, says in enumerate(lanes)
        for x, y in zip(moved.along[lane * steps : (lane + 1) * steps], says, strict=False)
    ]
    agreed, opposed = sum(map((0.0).__lt__, weighed)), sum(map((0.0).__gt__, weighed))
    if not agreed + opposed:
        return None
    return Comparison(0.0, 0.0, 0.0, agreed, opposed, _sum(weighed), _sum(map(mul, weighed, weighed)), 0.0)


def correlation(comparisons: Iterable[Comparison | None]) -> float:
    """Of the node's projected gradients with the medians of the lane's others, about zero; 0.0 of nothing."""
    known = [comparison for comparison in comparisons if comparison is not None]
    xx, yy = math.fsum([found.xx for found in known]), math.fsum([found.yy for found in known])
    scale = math.sqrt(xx * yy)
    return math.fsum([found.xy for found in known]) / scale if scale > 0 else 0.0


def evidence(comparisons: Iterable[Comparison | None]) -> float:
    """The cumulative test: Σp ÷ √Σp² over the window; 0.0 of nothing."""
    known = [comparison for comparison in comparisons if comparison is not None]
    doubt = math.fsum([found.doubt for found in known])
    return math.fsum([found.evidence for found in known]) / math.sqrt(doubt) if doubt > 0 else 0.0


def slope(comparisons: Iterable[Comparison | None]) -> float:
    """What part of the others' steps the node makes, below 0 what it takes back, over the window; 0.0 of nothing."""
    known = [comparison for comparison in comparisons if comparison is not None]
    step = math.fsum([found.step for found in known])
    return math.fsum([found.evidence for found in known]) / step if step > 0 else 0.0


def _cut(value: float, size: float) -> float:
    """In units of a size, at most STRONG of them."""
    return max(-STRONG, min(value / size, STRONG))


def _sum(values: Iterable[float]) -> float:
    """One after the other, as a loop adds: `sum` adds otherwise from Python 3.12 on."""
    return reduce(add, values, 0.0)
