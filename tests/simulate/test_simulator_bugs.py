"""The checkers bite: each planted bug is seen within a few seeds, all of which are clean without it."""

from collections.abc import Callable

import pytest

from meerkat_mq.simulate.run import judge
from meerkat_mq.simulate.schedule import make_schedule
from tests.simulate.bugs import BUGS
from tests.simulate.driver_bugs import DRIVER_BUGS, LASTING

SEEDS = 100
HEALED = 5  # schedules without which nothing lasting is seen

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(("plant", "names"), (BUGS | DRIVER_BUGS).items(), ids=lambda of: getattr(of, "__name__", ""))
def test_a_planted_bug_is_seen(plant: Plant, names: tuple[str, ...]) -> None:
    check_seen(plant, names, liveness=False)


@pytest.mark.parametrize(("plant", "names"), LASTING.items(), ids=lambda of: getattr(of, "__name__", ""))
def test_a_planted_bug_is_seen_only_where_faults_never_heal(plant: Plant, names: tuple[str, ...]) -> None:
    check_seen(plant, names, liveness=True)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        assert [judge(make_schedule(seed, names))[1] for seed in range(HEALED)] == [[]] * HEALED


def check_seen(plant: Plant, names: tuple[str, ...], *, liveness: bool) -> None:
    """The bug is seen, and it alone."""
    schedules = [make_schedule(seed, names, liveness=liveness) for seed in range(SEEDS)]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        caught = next(number for number, schedule in enumerate(schedules) if judge(schedule)[1])
    for schedule in schedules[: caught + 1]:
        assert judge(schedule)[1] == []
