"""First-order local steps on the mask: what a values node does, and the bound that a sweep compares with."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.step import Engine, Row
from meerkat_mq.errors import NotFinite

Batch = TypeVar("Batch")


@runtime_checkable
class FirstOrderEngine(Engine[Batch], Protocol[Batch]):
    """An engine that back-propagates."""

    def gradient(self, batch: Batch) -> tuple[Float32Array, float]:
        """The gradient of the batch's mean loss in theta as last written, float32 (n,), and that loss."""


class AdamW:
    """Adam (arXiv 1412.6980); AdamW with weight decay 0, β = (0.9, 0.999), ε = 1e-8, in float32."""

    def __init__(self, lr: float, size: int) -> None:
        self._lr = lr
        self._mean: Float32Array = np.zeros(size, dtype=np.float32)
        self._square: Float32Array = np.zeros(size, dtype=np.float32)
        self._steps = 0

    def move(self, theta: Float32Array, gradient: Float32Array) -> None:
        """One step, theta in place."""
        self._steps += 1
        self._mean += (1 - 0.9) * (gradient - self._mean)
        self._square += (1 - 0.999) * (np.square(gradient) - self._square)
        scale = np.sqrt(self._square / (1 - 0.999**self._steps)) + 1e-8
        theta -= self._lr / (1 - 0.9**self._steps) * self._mean / scale


class Sgd:
    """Plain gradient descent."""

    def __init__(self, lr: float, size: int) -> None:
        self._lr = lr

    def move(self, theta: Float32Array, gradient: Float32Array) -> None:
        """One step, theta in place."""
        theta -= self._lr * gradient


_OPTIMISERS: dict[str, type[AdamW | Sgd]] = {"adamw": AdamW, "sgd": Sgd}


def first_order_walk(
    engine: FirstOrderEngine[Batch],
    theta: Float32Array,
    batches: Iterable[Sequence[Row]],
    settings: NodeValuesConfig,
) -> Iterator[tuple[Float32Array, float]]:
    """Steps of an optimiser whose state begins afresh.

    Leaves the engine where the last step began: whoever looks at the model next writes theta first.

    Args:
        theta: float32 (n,), where to start; unchanged.
        batches: rows of each step.

    Returns:
        (theta after the step, loss before it) of each; one array, float32 (n,), changed from step to step.

    Raises:
        NotFinite: the loss, or where a step leads, is not finite.
    """
    walker, optimiser = theta.copy(), _OPTIMISERS[settings.optimiser](settings.lr, theta.size)
    for rows in batches:
        engine.write(walker)
        gradient, loss = engine.gradient(engine.prepare(rows))
        with np.errstate(over="ignore", invalid="ignore"):
            optimiser.move(walker, gradient)
        if not (np.isfinite(loss) and np.isfinite(walker).all()):
            raise NotFinite("first-order step", f"a loss of {loss} leads to no finite weights", "lower values.lr")
        yield walker, loss


def first_order_steps(
    engine: FirstOrderEngine[Batch],
    theta: Float32Array,
    batches: Iterable[Sequence[Row]],
    settings: NodeValuesConfig,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Float32Array, float, int]:
    """A values node's part of a round.

    Args:
        theta: float32 (n,), theta of the round; unchanged.
        batches: T lists of rows.
        stop: asked after each local step; where it answers yes, that was the last one.

    Returns:
        (displacement: float32 (n,), where the steps led − theta; mean loss; steps made). Where a loss, or where a step
        leads, is not finite: no displacement, and NaN as the loss, which the guards refuse.
    """
    end, losses = theta, list[float]()
    try:
        for walker, loss in first_order_walk(engine, theta, batches, settings):
            end = walker
            losses.append(loss)
            if stop():
                break
        return end - theta, sum(losses) / len(losses), len(losses)
    except NotFinite:
        return np.zeros_like(theta), math.nan, len(losses) + 1
