"""Evaluation on held-out rows, and the first-order bound on the same mask."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.first_order import FirstOrderEngine, first_order_walk
from meerkat_mq.core.step import Engine, Row
from meerkat_mq.engines.protocol import Batch, Scores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of some rows.

    Attributes:
        rows: how many; those that cannot be prepared do not count.
        figures: by name, always a mean loss, "loss"; where candidates are scored, also "accuracy", the share of rows
            whose right one scored highest, and "majority", the share of the most frequent one: the accuracy of a
            constant answer.
        recalls: by class, the share of its rows that were found; None where it has no rows.
    """

    rows: int
    figures: Mapping[str, float]
    recalls: tuple[float | None, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.figures["loss"]

    @property
    def accuracy(self) -> float:
        """NaN where nothing is scored."""
        return self.figures.get("accuracy", math.nan)


def evaluate(engine: Engine[Batch], rows: Sequence[Row], batch_size: int = 64) -> Evaluation:
    """Evaluate the engine at the theta last written.

    Args:
        engine: after `write`; without `scores`, its mean loss is all that is found.
        rows: at least one; `usable` tells which they may be.
        batch_size: rows a pass.

    Raises:
        DataError: none of a batch's rows can be prepared.
    """
    losses = list[float]()
    scores, truth = list[Float32Array](), list[npt.NDArray[np.int64]]()
    for start in range(0, len(rows), batch_size):
        batch = engine.prepare(rows[start : start + batch_size])
        if isinstance(engine, Scores):
            found, right = engine.scores(batch)
            scores.append(found)
            truth.append(right)
        else:
            losses += engine.losses(batch).tolist()
    if scores:
        return classified(np.concatenate(scores), np.concatenate(truth))
    return Evaluation(len(losses), {"loss": math.fsum(losses) / len(losses)})


def classified(scores: Float32Array, truth: npt.NDArray[np.int64]) -> Evaluation:
    """What scores, float32 (rows, classes), and the right classes, int64 (rows,), come to."""
    losses, rows, classes = _cross_entropy(scores, truth), len(truth), scores.shape[1]
    labels = np.bincount(truth, minlength=classes)
    found = np.bincount(truth[scores.argmax(axis=1) == truth], minlength=classes)
    return Evaluation(
        rows=rows,
        figures={
            "loss": math.fsum(losses) / rows,
            "accuracy": int(found.sum()) / rows,
            "majority": int(labels.max()) / rows,
        },
        recalls=tuple(int(hit) / int(count) if count else None for hit, count in zip(found, labels, strict=True)),
    )


def _cross_entropy(scores: Float32Array, labels: npt.NDArray[np.int64]) -> list[float]:
    wide = scores.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return [float(loss) for loss in log_sum - wide[np.arange(len(labels)), labels]]


def first_order(
    engine: FirstOrderEngine[Batch],
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
