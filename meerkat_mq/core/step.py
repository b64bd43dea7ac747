"""A local step: two forward passes give one projected gradient.

What is not finite is reported, as NaN, and never an error: it may come of weights that another node ruined, and a node
that ended for it would not be there when they are put right. The guards refuse such an update, and count it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import apply, coefficient
from meerkat_mq.errors import BadValue, NotFinite

Row = Mapping[str, Any]
Batch = TypeVar("Batch")


class Engine(Protocol[Batch]):
    """All that a step needs of a model. theta is the truth; the model is a view of it."""

    def write(self, theta: Float32Array) -> None:
        """Put theta, float32 (n,) in mask order, into the model, cast to the model's dtype."""

    def prepare(self, rows: Sequence[Row]) -> Batch:
        """Turn data rows into a batch, once for both passes."""

    def losses(self, batch: Batch) -> Float32Array:
        """Per-example losses, float32 (rows,)."""


def projected_gradient(
    engine: Engine[Batch], theta: Float32Array, z: Float32Array, eps: float, batch: Batch
) -> tuple[float, float]:
    """g = (loss(theta + eps·z) − loss(theta − eps·z)) / (2·eps), MEERKAT (arXiv 2506.03337), after MeZO.

    Leaves the engine at theta − eps·z: whoever looks at the model next writes theta first.

    Args:
        theta: float32 (n,), unchanged.
        z: float32 (n,).
        eps: perturbation scale, > 0.
        batch: from `engine.prepare`.

    Returns:
        (g, loss): g a float that is exactly a float32; loss the mean over both passes. NaN both where a loss, or g, is
        not finite.
    """
    shift = z * np.float32(eps)
    point = theta + shift
    engine.write(point)
    with np.errstate(all="ignore"):
        plus = float(np.mean(engine.losses(batch), dtype=np.float64))
        engine.write(np.subtract(theta, shift, out=point))
        minus = float(np.mean(engine.losses(batch), dtype=np.float64))
        g = float(np.float32((plus - minus) / (2 * eps)))
    return (g, (plus + minus) / 2) if math.isfinite(g) else (math.nan, math.nan)


def local_steps(
    engine: Engine[Batch],
    theta: Float32Array,
    seeds: Sequence[int],
    batches: Sequence[Sequence[Row]],
    *,
    stream: str,
    eps: float,
    lr: float,
    draw: Callable[[str, int, int, int], Float32Array] = direction,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[tuple[float, ...], float]:
    """A node's part of a round: one projected gradient a seed, each step from where the one before it ended.

    With K = seeds ÷ batches above one, a step measures K projected gradients at one point, and moves by their mean:
    theta − lr/K·Σ_i g_i·z_i (DeComFL, arXiv 2405.15861).

    Args:
        theta: float32 (n,), theta of the round; unchanged.
        seeds: T·K seeds of the node's lane.
        batches: T lists of rows.
        lr: learning rate of the node's own walk.
        draw: makes directions; one that remembers them, where several nodes of a process walk one lane.
        stop: asked after each local step; where it answers yes, that was the last one: a partial path.

    Returns:
        (T·K projected gradients, fewer where it was stopped; mean loss). From the first one on that is not finite, or
        leads out of float32, all are NaN, and so is the loss.
    """
    perturbations, rest = divmod(len(seeds), len(batches))
    assert perturbations > 0 == rest
    walker, ahead, scratch = theta.copy(), theta.copy(), np.empty_like(theta)
    scalars, losses = list[float](), list[float]()
    for step, rows in enumerate(batches):
        batch = engine.prepare(rows)
        for seed in seeds[step * perturbations : (step + 1) * perturbations]:
            z = draw(stream, seed, 0, theta.size)
            g, loss = projected_gradient(engine, walker, z, eps, batch)
            if step + 1 < len(batches) and not _moved(ahead, z, lr / perturbations, g, scratch):
                g = math.nan
            if math.isnan(g):
                return (*scalars, *[math.nan] * (len(seeds) - len(scalars))), math.nan
            scalars.append(g)
            losses.append(loss)
        if stop():
            break
        np.copyto(walker, ahead)
    return tuple(scalars), sum(losses) / len(losses)


def _moved(walker: Float32Array, z: Float32Array, lr: float, g: float, scratch: Float32Array) -> bool:
    """Take a step of the node's own walk, in place; False where it leads out of float32, or g is NaN."""
    try:
        apply(walker, z, coefficient(lr, [(1, g)], 1), scratch)
    except (BadValue, NotFinite):
        return False
    return True
