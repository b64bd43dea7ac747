import random

import pytest

from meerkat_mq.observe.figures import MOST_SPANS, Magnitudes


def test_a_short_path_keeps_every_magnitude() -> None:
    magnitudes = Magnitudes()
    for value in (-0.5, 0.25, 0.0):
        magnitudes.add(value)
    assert magnitudes.points == [(1, 0.5), (2, 0.25), (3, 0.0)]


@pytest.mark.parametrize("steps", [MOST_SPANS - 1, MOST_SPANS, 3 * MOST_SPANS + 5, 100 * MOST_SPANS])
def test_a_long_path_is_thinned_to_means_and_reaches_its_end(steps: int) -> None:
    noise = random.Random(steps)
    values = [noise.gauss(0, 1) for _ in range(steps)]
    magnitudes = Magnitudes()
    for value in values:
        magnitudes.add(value)
    points = magnitudes.points
    span = int(points[0][0])
    assert MOST_SPANS / 2 <= len(points) < MOST_SPANS
    assert steps - span < points[-1][0] <= steps
    for number, (step, mean) in enumerate(points):
        assert step == (number + 1) * span
        assert mean == pytest.approx(sum(map(abs, values[number * span : (number + 1) * span])) / span)
