import pytest

from meerkat_mq.errors import printable
from meerkat_mq.observe.figures import (
    Smoother,
    duration,
    human_bytes,
    human_factor,
    named,
    percent,
    points,
    small_percent,
    smoothed,
)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (27_300, "27.3 kB"),
        (99_949, "99.9 kB"),
        (99_951, "100 kB"),
        (999_600, "1.00 MB"),
        (1_275_648_000, "1.28 GB"),
        (7e18, "7000 PB"),
    ],
)
def test_a_size_has_three_digits(size: float, shown: str) -> None:
    assert human_bytes(size) == shown


@pytest.mark.parametrize(
    ("factor", "shown"), [(0.04, "0.0"), (1.26, "1.3"), (9.96, "10"), (32.6, "33"), (995, "1,000"), (46_727, "47,000")]
)
def test_a_factor_has_two_digits(factor: float, shown: str) -> None:
    assert human_factor(factor) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (112.3, "1 min 52 s"), (7_380, "2 h 03 min")],
)
def test_a_duration_has_two_units_at_most(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_shares() -> None:
    assert percent(0.581) == "58.1 %"
    assert [small_percent(share) for share in (0, 7e-4, 0.00998, 0.5)] == ["0.0 %", "0.070 %", "1.00 %", "50.0 %"]
    assert [points(gain) for gain in (0.3031, 0, -0.02)] == ["+30.3 points", "+0.0 points", "−2.0 points"]


def test_nothing_printed_can_steer_a_terminal() -> None:
    assert printable("a\x1b[2Jb\r\u202e") == "a�[2Jb��"


def test_the_moving_average_begins_at_the_first_value_and_forgets() -> None:
    assert smoothed([5.0] * 4, 10) == pytest.approx([5.0] * 4)
    assert smoothed([1.0, 2.0, 3.0], 1) == [1.0, 2.0, 3.0]
    average = Smoother(10)
    average.add(100.0)
    assert [average.add(0.0) for _ in range(50)][-1] < 0.01


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], "none"),
        (["a", "b"], "a, b"),
        (list("abcde"), "a, b, c, d, e"),
        (list("abcdefg"), "a, b, c, d, e and 2 more"),
        (["\x1b[2J"], "�[2J"),
    ],
)
def test_a_few_names_are_named(names: list[str], shown: str) -> None:
    assert named(names) == shown
