"""Evaluation on held-out rows, and the first-order bound on the same mask."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.first_order import FirstOrderEngine, first_order_walk
from meerkat_mq.core.step import Engine, Row
from meerkat_mq.tasks.task import Evaluation, Scored, classified

Judge = Callable[[Scored], Evaluation]


def as_classes(found: Scored) -> Evaluation:
    """The figures of a run without a task: a classifier's."""
    return classified(found.scores, found.truth)


def evaluate(engine: Engine[Any], rows: Sequence[Row], batch_size: int = 64, figures: Judge = as_classes) -> Evaluation:
    """Evaluate the engine at the theta last written.

    Args:
        engine: after `write`; without `scores`, its mean loss is all that is found.
        rows: at least one; `usable` tells which they may be.
        batch_size: rows a pass.
        figures: what a task makes of scores (`Task.evaluation`); default: a classifier's.

    Raises:
        DataError: none of a batch's rows can be prepared.
    """
    batches = (engine.prepare(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
    if own := getattr(engine, "scored", None):
        return figures(_together([own(batch) for batch in batches]))
    if own := getattr(engine, "scores", None):
        return figures(_together([Scored(*own(batch)) for batch in batches]))
    losses = np.concatenate([engine.losses(batch) for batch in batches]).tolist()
    return Evaluation(len(losses), {"loss": math.fsum(losses) / len(losses)})


def _together(parts: Sequence[Scored]) -> Scored:
    """Batches one after the other; their rows may have fewer candidates than those of others."""
    most = max(part.scores.shape[1] for part in parts)
    pads = [((0, 0), (0, most - part.scores.shape[1])) for part in parts]
    scores = [np.pad(part.scores, pad, constant_values=-np.inf) for part, pad in zip(parts, pads, strict=True)]
    tokens, first = (
        [found for part in parts if (found := getattr(part, of)) is not None] for of in ("tokens", "first")
    )
    return Scored(
        np.concatenate(scores),
        np.concatenate([part.truth for part in parts]),
        np.concatenate(tokens) if tokens else None,
        np.concatenate(first) if first else None,
    )


def first_order(
    engine: FirstOrderEngine[Any],
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
        engine: its model is left at the theta that is returned, float32 (n,).
        theta: float32 (n,), where to start; unchanged.
        rows: training rows, drawn in an order that the seed shuffles, again and again.
        progress: called with (steps done, steps).
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
    order = (int(index) for _ in count() for index in rng.permutation(len(rows)))
    while True:
        yield [rows[index] for index in islice(order, batch_size)]
