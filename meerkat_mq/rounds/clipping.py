"""The clipped mean: what one node can do to a step is bounded by the other nodes of its lane, before any guard.

Each scalar of a lane and step is moved into centre ± width before the weighted mean: centre = median, width = 1.4826 ·
MAD, the standard deviation of normally distributed scalars. This is the mean to which Huber's estimator takes its first
step from the median (Huber 1964; centred clipping, Karimireddy et al., arXiv 2012.10333). As long as less than half of
the lane is hostile, median and width are within the range of the honest scalars and their distances.

With one or two scalars, that moves nothing. There the entry's other lanes say what is normal, in size alone.
"""

from collections.abc import Iterable, Sequence

SIGMAS = 1.4826  # of a normal distribution, in median absolute deviations
FEWEST = 3  # of which two can outvote one
ALONE = 3.0  # a lane with fewer has scalars up to so many times the median magnitude of all lanes


def median(ordered: Sequence[float]) -> float:
    """The median of sorted values; not empty."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def median_magnitude(values: Iterable[float]) -> float:
    """The median of |value|; not empty."""
    return median(sorted(map(abs, values)))


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
