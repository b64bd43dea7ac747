import random

import pytest

from meerkat_mq.observe.paths import MOST_SPANS, Magnitudes, Paths
from tests.observe.made_up import a_judgement, a_round


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


def test_paths_go_on_over_rounds_at_each_nodes_own_steps() -> None:
    paths = Paths()
    paths.take(a_round(0, gradip={"b": (0.5, -0.25), "a": (1.0, 2.0)}))
    paths.take(a_round(1, gradip={"b": (0.125,)}))
    assert paths.magnitudes == {"a": [(1, 1.0), (2, 2.0)], "b": [(1, 0.5), (2, 0.25), (3, 0.125)]}
    assert list(paths.magnitudes) == ["a", "b"]


def test_the_newest_judgement_of_a_node_stands() -> None:
    paths = Paths()
    first, second = a_judgement("a", early_stopped=True), a_judgement("a", early_stopped=False, version=5)
    other = a_judgement("b", early_stopped=True)
    paths.take(a_round(0, judgements=(first, other)))
    paths.take(a_round(5, judgements=(second,)))
    assert paths.judgements == {"a": second, "b": other}
