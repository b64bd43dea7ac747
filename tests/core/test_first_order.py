import math
from collections.abc import Sequence

import numpy as np
import pytest

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.first_order import AdamW, Sgd, first_order_steps, first_order_walk
from meerkat_mq.core.step import Row
from meerkat_mq.engines.toy import QuadraticEngine
from meerkat_mq.errors import NotFinite

N = 200
ROWS = [{"seed": 1}, {"seed": 2}, {"seed": 3}]
SGD = NodeValuesConfig(optimiser="sgd", lr=0.5)


class Fixed:
    """Gives these gradients and losses, one a step."""

    def __init__(self, *found: tuple[list[float], float]) -> None:
        self._found = iter(found)
        self.written: list[list[float]] = []

    def write(self, theta: Float32Array) -> None:
        self.written.append(theta.tolist())

    def prepare(self, rows: Sequence[Row]) -> int:
        return len(rows)

    def losses(self, batch: int) -> Float32Array:
        raise AssertionError

    def gradient(self, batch: int) -> tuple[Float32Array, float]:
        gradient, loss = next(self._found)
        return np.array(gradient, np.float32), loss


def test_the_toys_gradient_is_the_slope_of_its_mean_loss() -> None:
    engine, theta = QuadraticEngine(N), direction("mk1", 9, 0, N)
    batch = engine.prepare(ROWS)
    engine.write(theta)
    gradient, loss = engine.gradient(batch)
    assert loss == float(engine.losses(batch).mean(dtype=np.float64))
    for number in (0, 77, N - 1):
        sides = []
        for shift in (0.5, -0.5):  # of a parabola, the central difference is exact
            point = theta.copy()
            point[number] += np.float32(shift)
            engine.write(point)
            sides.append(float(engine.losses(batch).mean(dtype=np.float64)))
        assert gradient[number] == pytest.approx(sides[0] - sides[1], abs=1e-6)


def test_steps_start_where_the_one_before_ended() -> None:
    theta = np.array([1.0, -1.0], np.float32)
    engine = Fixed(([1.0, 0.0], 3.0), ([0.0, -2.0], 1.0))
    displacement, loss, steps = first_order_steps(engine, theta, [ROWS, ROWS], SGD)
    assert (displacement.tolist(), loss, steps) == ([-0.5, 1.0], 2.0, 2)
    assert displacement.dtype == np.float32
    assert engine.written == [[1.0, -1.0], [0.5, -1.0]]
    assert theta.tolist() == [1.0, -1.0]


def test_a_stop_ends_after_the_present_step() -> None:
    engine = Fixed(([1.0], 3.0), ([1.0], 1.0), ([1.0], 1.0))
    answers = iter([False, True])
    found = first_order_steps(engine, np.zeros(1, np.float32), [ROWS] * 3, SGD, lambda: next(answers))
    assert (found[0].tolist(), *found[1:]) == ([-1.0], 2.0, 2)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("found", [([np.nan], 1.0), ([np.inf], 1.0), ([3e38], 1.0), ([0.0], np.nan)])
def test_what_leads_nowhere_finite_is_reported(optimiser: str, found: tuple[list[float], float]) -> None:
    settings = NodeValuesConfig.model_validate({"optimiser": optimiser, "lr": 2.0})
    theta = np.full(1, -3e38, np.float32)
    with pytest.raises(NotFinite, match=r"first-order step: .*lower values\.lr"):
        list(first_order_walk(Fixed(found), theta, [ROWS], settings))
    displacement, loss, steps = first_order_steps(Fixed(found), theta, [ROWS], settings)
    assert (displacement.tolist(), math.isnan(loss), steps) == ([0.0], True, 1)


def test_the_state_of_the_optimiser_begins_afresh() -> None:
    engine, theta = QuadraticEngine(N), direction("mk1", 9, 0, N)
    settings = NodeValuesConfig(optimiser="adamw", lr=0.01)
    found = [first_order_steps(engine, theta, [ROWS] * 5, settings)[0].tobytes() for _ in range(2)]
    assert found[0] == found[1]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_toy_learns(optimiser: str) -> None:
    engine, theta = QuadraticEngine(N), direction("mk1", 9, 0, N)
    settings = NodeValuesConfig.model_validate({"optimiser": optimiser, "lr": {"adamw": 0.3, "sgd": 40.0}[optimiser]})
    displacement, _, _ = first_order_steps(engine, theta, [ROWS] * 30, settings)
    engine.write(theta + displacement)
    best = direction("mk1", 1, 0, N) + direction("mk1", 2, 0, N) + direction("mk1", 3, 0, N)
    assert np.abs(theta + displacement - best / 3).max() < 0.5
    assert np.abs(theta - best / 3).max() > 2


def test_adamw_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    theta, ours = direction("mk1", 1, 0, N), direction("mk1", 1, 0, N)
    leaf = torch.tensor(theta, requires_grad=True)
    optimiser, adam = torch.optim.AdamW([leaf], lr=0.01, weight_decay=0.0), AdamW(0.01, N)
    for step in range(20):
        gradient = direction("mk1", 100 + step, 0, N) * np.float32(10.0**-step)
        leaf.grad = torch.from_numpy(gradient)
        optimiser.step()
        adam.move(ours, gradient)
    assert ours.dtype == np.float32
    assert np.allclose(ours, leaf.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_sgd_walks_against_the_gradient() -> None:
    theta = np.array([1.0, 2.0], np.float32)
    Sgd(0.5, 2).move(theta, np.array([2.0, -4.0], np.float32))
    assert theta.tolist() == [0.0, 4.0]
