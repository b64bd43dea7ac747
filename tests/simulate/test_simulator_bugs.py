"""The checkers bite: each planted bug is seen within a few seeds, all of which are clean without it."""

from collections.abc import Callable

import pytest

from meerkat_mq.simulate.run import judge
from meerkat_mq.simulate.schedule import make_schedule
from tests.simulate.bugs import BUGS

SEEDS = 100


@pytest.mark.parametrize(("plant", "names"), BUGS.items(), ids=[bug.__name__ for bug in BUGS])
def test_a_planted_bug_is_seen(plant: Callable[[pytest.MonkeyPatch], None], names: tuple[str, ...]) -> None:
    schedules = [make_schedule(seed, names) for seed in range(SEEDS)]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        caught = next(number for number, schedule in enumerate(schedules) if judge(schedule)[1])
    for schedule in schedules[: caught + 1]:
        assert judge(schedule)[1] == []
