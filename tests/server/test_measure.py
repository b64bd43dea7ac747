"""Measuring directions: the right products, the newest order, and nothing waits for it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.ledger.run import Run
from meerkat_mq.rounds import events as e
from meerkat_mq.server import measure
from meerkat_mq.server.measure import Measurer
from meerkat_mq.server.run import prepare_run
from tests.support.waiting import until


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return prepare_run(ServerConfig(federation="f", state_dir=tmp_path, engine="toy", toy_weights=30))


class Slow:
    """`each_inner_product` that waits at each direction; keeps the versions of those that were begun."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.free = threading.Event()

    def __call__(self, g_p: object, run_id: bytes, version: int, *, steps: int, **how: object) -> Iterator[float]:
        for _ in range(steps):
            self.begun.append(version)
            assert self.free.wait(30)
            yield float(version)


async def measured(
    run: Run, act: Callable[[Measurer, list[e.DirectionsMeasured]], object]
) -> list[e.DirectionsMeasured]:
    told: list[e.DirectionsMeasured] = []
    measurer = Measurer(run)
    task = asyncio.create_task(measurer.run(told.append))
    done = act(measurer, told)
    if asyncio.iscoroutine(done):
        await done
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return told


async def test_it_answers_with_the_products_of_the_round(run: Run) -> None:
    async def act(measurer: Measurer, told: list[e.DirectionsMeasured]) -> None:
        measurer.put(e.MeasureDirections(4, 2, 3))
        await until(lambda: told)

    (answer,) = await measured(run, act)
    expected = inner_products(run.mask.g_p, run.descriptor.run_id, 4, lanes=2, steps=3, stream="mk1")
    assert (answer.version, answer.products) == (4, expected)
    assert [len(lane) for lane in answer.products] == [3, 3]


async def test_of_what_comes_meanwhile_the_newest_is_measured_and_alone_answered(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(measure, "each_inner_product", slow)

    async def act(measurer: Measurer, told: list[e.DirectionsMeasured]) -> None:
        measurer.put(e.MeasureDirections(0, 1, 2))
        await until(lambda: slow.begun)
        for version in (1, 2, 3):
            measurer.put(e.MeasureDirections(version, 1, 2))
        slow.free.set()
        await until(lambda: told)

    assert [answer.version for answer in await measured(run, act)] == [3]
    assert slow.begun == [0, 3, 3]  # of what is out of date, no further direction


async def test_it_ends_at_once_although_a_measurement_is_under_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setattr(measure, "each_inner_product", slow)

    async def act(measurer: Measurer, told: list[e.DirectionsMeasured]) -> None:
        measurer.put(e.MeasureDirections(0, 1, 400))
        await until(lambda: slow.begun)

    assert await measured(run, act) == []
    slow.free.set()
    await asyncio.get_running_loop().shutdown_default_executor()  # as the process does, and waits for the thread
    assert slow.begun == [0]
