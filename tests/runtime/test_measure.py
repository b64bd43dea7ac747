"""Measuring directions: the right products, the newest order, and nothing waits for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.ledger.run import Run
from meerkat_mq.rounds import events as e
from meerkat_mq.runtime import measure
from meerkat_mq.runtime.measure import Measurer
from meerkat_mq.server.run import prepare_run
from tests.runtime.ports import VirtualClock, Worker


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return prepare_run(ServerConfig(federation="f", state_dir=tmp_path, engine="toy", toy_weights=30))


class Slow:
    """`each_inner_product` during which something happens; keeps the versions of the directions that were begun."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.begun: list[int] = []
        self._meanwhile = meanwhile

    def __call__(self, g_p: object, run_id: bytes, version: int, *, steps: int, **how: object) -> Iterator[float]:
        for _ in range(steps):
            self.begun.append(version)
            if len(self.begun) == 1:
                self._meanwhile()
            yield float(version)


class Measured:
    """A measurer, and what it tells."""

    def __init__(self, run: Run) -> None:
        self.clock = VirtualClock()
        self.told: list[e.DirectionsMeasured] = []
        self.it = Measurer(run, Worker(self.clock), self.clock, self.told.append)


def test_it_answers_with_the_products_of_the_round(run: Run) -> None:
    measured = Measured(run)
    measured.it.put(e.MeasureDirections(4, 2, 3))
    assert measured.told == []
    measured.clock.settle()
    (answer,) = measured.told
    expected = inner_products(run.mask.g_p, run.descriptor.run_id, 4, lanes=2, steps=3, stream="mk1")
    assert (answer.version, answer.products) == (4, expected)
    assert [len(lane) for lane in answer.products] == [3, 3]


def test_of_what_comes_meanwhile_the_newest_is_measured_and_alone_answered(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more() -> None:
        for version in (1, 2, 3):
            measured.it.put(e.MeasureDirections(version, 1, 2))

    measured, slow = Measured(run), Slow(more)
    monkeypatch.setattr(measure, "each_inner_product", slow)
    measured.it.put(e.MeasureDirections(0, 1, 2))
    measured.clock.settle()
    assert [answer.version for answer in measured.told] == [3]
    assert slow.begun == [0, 3, 3]  # of what is out of date, no further direction


def test_it_ends_at_once_although_a_measurement_is_under_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(run)
    slow = Slow(measured.it.stop)
    monkeypatch.setattr(measure, "each_inner_product", slow)
    measured.it.put(e.MeasureDirections(0, 1, 400))
    measured.clock.settle()
    assert measured.told == []
    assert slow.begun == [0]
