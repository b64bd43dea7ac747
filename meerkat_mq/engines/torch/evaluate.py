"""Evaluation on held-out rows, and the first-order bound on the same mask."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.first_order import first_order_walk
from meerkat_mq.core.step import Row
from meerkat_mq.engines.torch.engine import TransformersEngine


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of some rows.

    Attributes:
        rows: how many; those that cannot be prepared do not count.
        loss: mean cross-entropy over the classes.
        accuracy: share of rows whose class scored highest.
        majority: share of the most frequent class: the accuracy of a constant answer.
        recalls: by class, the share of its rows that were found; None where it has no rows.
    """

    rows: int
    loss: float
    accuracy: float
    majority: float
    recalls: tuple[float | None, ...] = ()


def evaluate(engine: TransformersEngine, rows: Sequence[Row], batch_size: int = 64) -> Evaluation:
    """Evaluate the engine at the theta last written.

    Args:
        engine: after `write`.
        rows: at least one; `engine.usable` tells which they may be.
        batch_size: rows a pass.

    Raises:
        DataError: none of a batch's rows can be prepared.
    """
    losses: list[float] = []
    labels, found = Counter[int](), Counter[int]()
    classes = 0
    for start in range(0, len(rows), batch_size):
        batch = engine.prepare(rows[start : start + batch_size])
        scores = engine.scores(batch)
        truth = batch.labels.cpu().numpy()
        losses += _cross_entropy(scores, truth)
        labels.update(truth.tolist())
        found.update(truth[scores.argmax(axis=1) == truth].tolist())
        classes = scores.shape[1]
    count = len(losses)
    return Evaluation(
        rows=count,
        loss=math.fsum(losses) / count,
        accuracy=found.total() / count,
        majority=max(labels.values()) / count,
        recalls=tuple(found[label] / labels[label] if labels[label] else None for label in range(classes)),
    )


def _cross_entropy(scores: Float32Array, labels: npt.NDArray[np.int64]) -> list[float]:
    wide = scores.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return [float(loss) for loss in log_sum - wide[np.arange(len(labels)), labels]]


def first_order(
    engine: TransformersEngine,
    theta: Float32Array,
    rows: Sequence[Row],
    *,
    steps: int,
    lr: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Float32Array:
    """AdamW with back-propagation on the masked weights alone: what the mask could give at best.

    Args:
        engine: its model is left at the theta that is returned.
        theta: float32 (n,), where to start; unchanged.
        rows: training rows, drawn in a shuffled order, again and again.
        steps: optimiser steps.
        lr: learning rate.
        batch_size: rows a step.
        seed: of the order.
        progress: called with (steps done, steps).

    Returns:
        float32 (n,).
    """
    order = _endless(rows, batch_size, seed)
    walk = first_order_walk(engine, theta, islice(order, steps), NodeValuesConfig(optimiser="adamw", lr=lr))
    for step, (walker, _) in enumerate(walk, start=1):
        theta = walker
        if progress is not None:
            progress(step, steps)
    engine.write(theta)
    return theta


def _endless(rows: Sequence[Row], batch_size: int, seed: int) -> Iterator[list[Row]]:
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += rng.permutation(len(rows)).tolist()
        yield [rows[index] for index in queue[:batch_size]]
        queue = queue[batch_size:]
