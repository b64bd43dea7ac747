import math
from collections.abc import Sequence

import numpy as np
import pytest

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import apply, coefficient
from meerkat_mq.core.step import Row, local_steps, projected_gradient
from meerkat_mq.engines.toy import QuadraticEngine

N = 200
ROWS = [{"seed": 1}, {"seed": 2}, {"seed": 3}]


class Fixed:
    """Gives these losses, one list a pass."""

    def __init__(self, *losses: list[float]) -> None:
        self._losses = iter(losses)
        self.written: list[Float32Array] = []

    def write(self, theta: Float32Array) -> None:
        self.written.append(theta.copy())

    def prepare(self, rows: Sequence[Row]) -> int:
        return len(rows)

    def losses(self, batch: int) -> Float32Array:
        return np.array(next(self._losses), np.float32)


def test_g_is_the_slope_along_z() -> None:
    engine = QuadraticEngine(N)
    batch = engine.prepare(ROWS)
    theta, z = direction("mk1", 9, 0, N), direction("mk1", 10, 0, N)
    g, loss = projected_gradient(engine, theta, z, 1e-3, batch)
    slope = float((theta - batch.mean(axis=0)) @ z) / N
    assert g == pytest.approx(slope, rel=1e-2, abs=1e-3)
    assert g == float(np.float32(g))
    engine.write(theta)
    assert loss == pytest.approx(float(engine.losses(batch).mean()), rel=1e-5)


def test_theta_is_unchanged_and_written_on_both_sides() -> None:
    engine = Fixed([1.0, 2.0], [1.0, 1.0])
    theta = np.array([1.0, -2.0], np.float32)
    before = theta.copy()
    g, loss = projected_gradient(engine, theta, np.array([1.0, -1.0], np.float32), 0.25, 2)
    assert np.array_equal(theta, before)
    assert [w.tolist() for w in engine.written] == [[1.25, -2.25], [0.75, -1.75]]
    assert (g, loss) == (1.0, 1.25)


@pytest.mark.parametrize("plus", [[np.nan], [np.inf], [3e38]])
def test_a_loss_without_a_finite_slope_is_reported(plus: list[float]) -> None:
    found = projected_gradient(Fixed(plus, [0.0]), np.zeros(1, np.float32), np.ones(1, np.float32), 1e-3, 1)
    assert all(map(math.isnan, found))


class Breaks(QuadraticEngine):
    """Its losses are infinite from a number of forward passes on."""

    def __init__(self, size: int, good: int) -> None:
        super().__init__(size)
        self.good = good

    def losses(self, batch: Float32Array) -> Float32Array:
        self.good -= 1
        return super().losses(batch) if self.good >= 0 else np.full(len(batch), np.inf, np.float32)


@pytest.mark.parametrize(("passes", "whole"), [(0, 0), (1, 0), (5, 2), (8, 4)])
def test_a_walk_that_leads_nowhere_finite_is_reported_from_there_on(passes: int, whole: int) -> None:
    """The update is as long as the round asked for, so that the server keeps it as evidence."""
    scalars, loss = local_steps(
        Breaks(N, passes), np.zeros(N, np.float32), range(4), [ROWS] * 4, stream="mk1", eps=0.1, lr=0.1
    )
    assert [math.isnan(scalar) for scalar in scalars] == [number >= whole for number in range(4)]
    assert math.isnan(loss) == (whole < 4)


def test_a_step_of_the_own_walk_that_leaves_float32_is_reported() -> None:
    scalars, loss = local_steps(
        QuadraticEngine(N), np.zeros(N, np.float32), range(2), [ROWS] * 2, stream="mk1", eps=0.1, lr=1e42
    )
    assert all(map(math.isnan, (*scalars, loss)))


def test_the_toy_learns() -> None:
    engine = QuadraticEngine(N)
    batch, theta = engine.prepare(ROWS), np.zeros(N, np.float32)
    losses = []
    for seed in range(300):
        z = direction("mk1", 100 + seed, 0, N)
        g, loss = projected_gradient(engine, theta, z, 1e-3, batch)
        theta -= np.float32(0.5 * g) * z
        losses.append(loss)
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize(("steps", "perturbations"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_a_step_measures_k_gradients_at_one_point_and_moves_by_their_mean(steps: int, perturbations: int) -> None:
    engine, lr, eps = QuadraticEngine(N), 0.5, 1e-3
    theta = direction("mk1", 9, 0, N)
    seeds = [100 + number for number in range(steps * perturbations)]
    batches = [[{"seed": step}, {"seed": step + 50}] for step in range(steps)]
    walker, expected, losses = theta.copy(), list[float](), list[float]()
    for step, rows in enumerate(batches):
        here, batch = walker.copy(), engine.prepare(rows)
        for number in range(perturbations):
            z = direction("mk1", seeds[step * perturbations + number], 0, N)
            g, loss = projected_gradient(engine, here, z, eps, batch)
            expected.append(g)
            losses.append(loss)
            apply(walker, z, coefficient(lr / perturbations, [(1, g)], 1), np.empty_like(z))
    before = theta.copy()
    found = local_steps(engine, theta, seeds, batches, stream="mk1", eps=eps, lr=lr)
    assert found == (tuple(expected), sum(losses) / len(losses))
    assert np.array_equal(theta, before)


def test_the_last_step_goes_nowhere_so_that_a_huge_gradient_reaches_the_server() -> None:
    engine = Fixed([3e38], [0.0])
    (g,), _ = local_steps(engine, np.zeros(1, np.float32), [1], [[{}]], stream="mk1", eps=1.0, lr=1e30)
    assert g == float(np.float32(1.5e38))


@pytest.mark.parametrize("perturbations", [1, 3])
def test_a_stop_leaves_a_partial_path_of_whole_steps(perturbations: int) -> None:
    engine, theta = QuadraticEngine(N), direction("mk1", 9, 0, N)
    seeds, batches = list(range(4 * perturbations)), [[{"seed": step}] for step in range(4)]
    whole, _ = local_steps(engine, theta, seeds, batches, stream="mk1", eps=1e-3, lr=0.5)
    answers = iter([False, True])
    found = local_steps(
        engine, theta, seeds, batches, stream="mk1", eps=1e-3, lr=0.5, stop=lambda: next(answers)
    )  # fmt: skip
    assert found[0] == whole[: 2 * perturbations]
    assert found == local_steps(
        engine, theta, seeds[: 2 * perturbations], batches[:2], stream="mk1", eps=1e-3, lr=0.5
    )  # fmt: skip
