"""The clipped mean: what one node can do to a step is bounded by the other nodes of its lane, before any guard.

Each scalar of a lane and step is moved into centre ± width before the weighted mean: centre = median, width = 1.4826 ·
MAD, the standard deviation of normally distributed scalars. This is the mean to which Huber's estimator takes its first
step from the median (Huber 1964; centred clipping, Karimireddy et al., arXiv 2012.10333). As long as less than half of
the lane is hostile, median and width are within the range of the honest scalars and their distances.

With one or two scalars, that moves nothing. There the entry's other lanes say what is normal, in size alone.

A displacement has n numbers, so its size is bounded as a whole: it is scaled down to the size that the others of its
entry have, by local step. That bounds how far a displacement goes, not where (`rounds.cumulative`), and it wants three.

Where there are fewer, nothing tells what a good one is, and one in the worst direction does √n times the harm of a path
of its length: of that, only 1 ÷ √n lies along the gradient. So there a displacement goes no farther than the useful
part of a path. Then one hostile node can undo what one honest node does, and no more.

Where rows weigh, a node says itself how many it has, and nobody can count them. So its weight is bounded by the median,
too: else one that says 16 million would be the mean.
"""

import math
from collections.abc import Iterable, Sequence

SIGMAS = 1.4826  # of a normal distribution, in median absolute deviations
FEWEST = 3  # of which two can outvote one
ALONE = 3.0  # a lane with fewer has scalars up to so many times the median magnitude of all lanes
HEAVIER = 4  # a node weighs up to so many times the median weight
FARTHER = 4.0  # in older runs, a displacement that is alone in its entry goes up to so many times as far as a path


def median(ordered: Sequence[float]) -> float:
    """The median of sorted values; not empty."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def median_magnitude(values: Iterable[float]) -> float:
    """The median of |value|; not empty."""
    return median(sorted(map(abs, values)))


def heaviest(weights: Iterable[int], most: int) -> int:
    """The largest weight that counts among these, where there are three; of two medians the smaller one counts."""
    ordered = sorted(weights)
    return HEAVIER * ordered[(len(ordered) - 1) // 2] if len(ordered) >= FEWEST else most


def clipped(lane: Sequence[float], entry: Sequence[float]) -> list[float]:
    """The scalars of one lane and step, in their order, each moved to where the mean may have it.

    Args:
        lane: of its nodes, not empty; finite.
        entry: all scalars of this step, of all lanes.
    """
    if len(lane) >= FEWEST:
        centre = median(sorted(lane))
        width = SIGMAS * median_magnitude([value - centre for value in lane])
    elif len(entry) >= FEWEST:
        centre, width = 0.0, ALONE * median_magnitude(entry)
    else:
        return list(lane)
    return [min(max(value, centre - width), centre + width) for value in lane]


def longest(
    displacements: Sequence[tuple[float, int]], paths: Sequence[float], reach: float | None, compared: int
) -> float:
    """The root mean square that displacements of an entry may have, for each of their local steps.

    Args:
        displacements: (root mean square, local steps) of each.
        paths: root mean square of each path, by local step.
        reach: of fewer than three displacements, in lengths of a path; None: as runs had it that are older than this.
        compared: how many displacements the entry has with those that are refused for where they go.
    """
    sizes, ordered = sorted([size / steps for size, steps in displacements]), sorted(paths)
    of_others = sizes[(len(sizes) - 1) // 2] if len(sizes) > 1 else math.inf
    if reach is None:
        return of_others if len(sizes) > 1 or len(paths) < FEWEST else FARTHER * median(ordered)
    if compared >= FEWEST or not paths:
        return of_others
    return min(of_others, reach * ordered[(len(paths) - 1) // 2])
