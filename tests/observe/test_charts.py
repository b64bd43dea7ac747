import re

import pytest

from meerkat_mq.observe.charts import (
    HEIGHT,
    MOST_POINTS,
    Bar,
    Line,
    Reference,
    count_scale,
    line_chart,
    log_bars,
    nice_scale,
    stacked_bar,
    thinned,
)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.31, 0.912], (0.2, 0.4, 0.6, 0.8, 1.0)),
        ([0.58, 0.61], (0.58, 0.59, 0.6, 0.61)),
        ([1.0, 1.0], (0.9, 0.925, 0.95, 0.975, 1.0)),
        ([0.0], (0.0, 0.25, 0.5, 0.75, 1.0)),
        ([], (0.0, 0.25, 0.5, 0.75, 1.0)),
        ([-3.0], (-3.3, -3.2, -3.1, -3.0)),
    ],
)
def test_an_axis_has_round_ticks_around_its_values(values: list[float], ticks: tuple[float, ...]) -> None:
    scale = nice_scale(values)
    assert scale.ticks == pytest.approx(ticks)
    assert all(0 <= scale.share(value) <= 1 for value in values)


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(0, (0, 1)), (1, (0, 1)), (7, (0, 2, 4, 6)), (300, (0, 100, 200, 300)), (1234, (0, 250, 500, 750, 1000))],
)
def test_an_axis_of_rounds_ends_at_the_last(last: int, ticks: tuple[int, ...]) -> None:
    scale = count_scale(last)
    assert scale.ticks == ticks
    assert scale.share(max(last, 1)) == 1


def test_a_curve_runs_from_corner_to_corner() -> None:
    chart = line_chart("loss", [Line("loss", "main", [(0, 4.0), (10, 0.0)])], [], count_scale(10), str, axis="rounds")
    assert f'points="0.0,0.0 1000.0,{HEIGHT}.0"' in chart


def test_a_reference_stands_at_its_value() -> None:
    mark = Reference("bound", "bound", 0.5)
    chart = line_chart(
        "accuracy", [Line("a", "main", [(0, 0.0), (1, 1.0)])], [mark], count_scale(1), str, axis="rounds"
    )
    assert f'y1="{HEIGHT // 2}" y2="{HEIGHT // 2}" class="reference bound"' in chart


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    points = [(float(at), 0.0) for at in range(100_003)]
    assert len(thinned(points)) <= MOST_POINTS
    assert thinned(points)[-1] == points[-1]
    assert thinned(points[:5]) == points[:5]


def test_stacked_parts_fill_their_share() -> None:
    bar = stacked_bar("rows", [("a", 10), ("b", 0), ("c", 30)], 80)
    assert re.findall(r'x="([\d.]+)%" y="0" width="([\d.]+)%"', bar) == [("0.000", "12.500"), ("12.500", "37.500")]


def test_log_bars_grow_by_decades() -> None:
    bars = [Bar("a", "main", size, "") for size in (1_000, 10_000, 1_000_000)]
    assert re.findall(r'rect width="([\d.]+)%"', log_bars(bars, str)) == ["0.000", "33.333", "100.000"]


def test_log_bars_of_nothing() -> None:
    assert 'rect width="0.000%"' in log_bars([Bar("a", "main", 0, "0 B")], str)
