"""Signal to noise of projected gradients: losses that are rounded show it, exact ones have none."""

import math

import numpy as np
import pytest

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.signal import LEAST, MOST, Signal
from meerkat_mq.core.step import projected_gradient

SIZE = 50


class Rounded:
    """A quadratic loss around a point, each of whose terms is rounded to a multiple of `grain`."""

    def __init__(self, grain: float) -> None:
        self._grain = grain
        self._theta = np.zeros(SIZE, np.float32)
        self._centre = direction("mk1", 99, 0, SIZE)

    def write(self, theta: Float32Array) -> None:
        self._theta = theta.copy()

    def prepare(self, rows: object) -> object:
        return rows

    def losses(self, batch: object) -> Float32Array:
        terms = np.square(self._theta.astype(np.float64) - self._centre)
        terms = np.round(terms / self._grain) * self._grain if self._grain else terms
        found: Float32Array = terms.mean(keepdims=True)  # float64: no other rounding than ours
        return found


def measured(grain: float, eps: float = 1e-3, pairs: int = 8) -> float | None:
    signal, engine = Signal(), Rounded(grain)
    for seed in range(pairs):
        signal.measure(engine, np.zeros(SIZE, np.float32), direction("mk1", seed, 0, SIZE), eps, ())
    return signal.ratio


def test_exact_losses_have_no_noise() -> None:
    found = measured(0.0)
    assert found is not None
    assert found > 1e3


def test_coarser_losses_have_more_of_it_and_a_larger_eps_less() -> None:
    ratios = [measured(grain) for grain in (1e-5, 1e-4, 1e-3, 2e-2)]
    assert all(ratio is not None for ratio in ratios)
    assert ratios == sorted(ratios, key=lambda ratio: -(ratio or 0))
    assert (ratios[0] or 0) > LEAST > (ratios[-1] or 0)
    assert (measured(2e-2, eps=0.1) or 0) > LEAST


@pytest.mark.parametrize("grain", [1e-4, 1e-3, 3e-3])
def test_the_ratio_tells_the_correlation_with_exact_ones(grain: float) -> None:
    theta, zs = np.zeros(SIZE, np.float32), [direction("mk1", seed, 0, SIZE) for seed in range(400)]
    exact, found = (
        np.array([projected_gradient(engine, theta, z, 1e-3, ())[0] for z in zs])
        for engine in (Rounded(0.0), Rounded(grain))
    )
    noise = float(np.std(found - exact))
    ratios = [measured(grain, pairs=8) or 0.0]
    expected = float(np.sqrt(np.mean(exact**2))) / noise
    assert expected / 2.5 < ratios[0] < expected * 2.5


def test_nothing_is_said_without_a_pair_or_without_a_slope() -> None:
    assert Signal().ratio is None
    assert measured(1e6) is None  # all losses are zero


def test_what_is_not_finite_is_left_out() -> None:
    class Broken(Rounded):
        def losses(self, batch: object) -> Float32Array:
            return np.array([math.nan], np.float32)

    signal = Signal()
    signal.measure(Broken(0), np.zeros(SIZE, np.float32), direction("mk1", 0, 0, SIZE), 1e-3, ())
    assert signal.ratio is None
    assert MOST == 1e6
