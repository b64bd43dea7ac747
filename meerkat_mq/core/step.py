"""A local step: two forward passes give one projected gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import apply, coefficient
from meerkat_mq.errors import RunError

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
        engine: the model.
        theta: float32 (n,), unchanged.
        z: float32 (n,).
        eps: perturbation scale, > 0.
        batch: from `engine.prepare`.

    Returns:
        (g, loss): g a float that is exactly a float32; loss the mean over both passes.

    Raises:
        RunError: a loss is not finite.
    """
    shift = z * np.float32(eps)
    point = theta + shift
    engine.write(point)
    plus = float(np.mean(engine.losses(batch), dtype=np.float64))
    engine.write(np.subtract(theta, shift, out=point))
    minus = float(np.mean(engine.losses(batch), dtype=np.float64))
    with np.errstate(over="ignore"):
        g = float(np.float32((plus - minus) / (2 * eps)))
    if not np.isfinite(g):
        raise RunError("projected gradient", f"losses {plus} and {minus} give {g}", "lower the learning rate")
    return g, (plus + minus) / 2


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
        engine: the model.
        theta: float32 (n,), theta of the round; unchanged.
        seeds: T·K seeds of the node's lane.
        batches: T lists of rows.
        stream: direction stream.
        eps: perturbation scale.
        lr: learning rate of the node's own walk.
        draw: makes directions; one that remembers them, where several nodes of a process walk one lane.
        stop: asked after each local step; where it answers yes, that was the last one: a partial path.

    Returns:
        (T·K projected gradients, fewer where it was stopped; mean loss).

    Raises:
        RunError: a loss is not finite.
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
            scalars.append(g)
            losses.append(loss)
            if step + 1 < len(batches):
                apply(ahead, z, coefficient(lr / perturbations, [(1, g)], 1), scratch)
        if stop():
            break
        np.copyto(walker, ahead)
    return tuple(scalars), sum(losses) / len(losses)
