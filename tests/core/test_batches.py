"""Rows of local steps: looked up one step at a time, however many a server asks for."""

import itertools
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.batches import Batches, batch_rows
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import Row
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import EngineModel
from tests.runtime.one_node import descriptor

DATA: list[Row] = [{"seed": number} for number in range(7)]
MASK = toy_mask(10)


class Frugal:
    """Keeps nothing of a batch but how many rows it had, and says when a step begins."""

    def __init__(self, begun: Callable[[], None] = lambda: None) -> None:
        self.sizes: list[int] = []
        self._begun = begun

    def write(self, theta: Float32Array) -> None:
        pass

    def prepare(self, rows: Sequence[Row]) -> int:
        self.sizes.append(len(rows))
        self._begun()
        return len(rows)

    def losses(self, batch: int) -> Float32Array:
        return np.ones(1, np.float32)

    def gradient(self, batch: int) -> tuple[Float32Array, float]:
        return np.zeros(MASK.size, np.float32), 1.0


def model(engine: Any, batch_size: int, **settings: Any) -> EngineModel:
    run = descriptor(MASK, batch_size=batch_size, local_steps=1000)
    replica, numbers = Replica(MASK, run_id=run.run_id, stream=run.stream, digest_every=1), itertools.count()
    taken: dict[str, Any] = {"take_steps": lambda run, steps: next(numbers) * steps, "values": None}
    return EngineModel(run, replica, name="a", engine=engine, data=DATA, **(taken | settings))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_they_are_those_of_the_step(batch_size: int) -> None:
    found = Batches(bytes(16), "a", DATA, batch_size, range(5, 9))
    wanted = [[DATA[row] for row in batch_rows(bytes(16), "a", 7, batch_size, step)] for step in range(5, 9)]
    assert (len(found), list(found), list(found[1:3]), found[-1]) == (4, wanted, wanted[1:3], wanted[-1])


@pytest.mark.parametrize("uplink", ["path", "values"])
def test_the_largest_batches_of_the_longest_round_need_the_memory_of_one_step(uplink: str) -> None:
    """65,536,000 row numbers would be 520 MB, and take half a minute in which nothing can be stopped."""
    stop = threading.Event()
    engine = Frugal(stop.set)
    values = NodeValuesConfig(optimiser="sgd") if uplink == "values" else None
    node = model(engine, 65536, values=values)
    tracemalloc.start()
    try:
        result = node.step(StartSteps(0, 0, 1000, 1e-3), stop, 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result is not None
    assert engine.sizes == [65536]
    assert len(result.scalars) == (uplink == "path")
    assert peak < 16 * 2**20


def test_all_steps_are_made_unless_they_are_stopped() -> None:
    engine = Frugal()
    result = model(engine, 3).step(StartSteps(0, 0, 4, 1e-3), threading.Event(), 4)
    assert result is not None
    assert (engine.sizes, len(result.scalars)) == ([3, 3, 3, 3], 4)
