"""How much of a projected gradient is signal, and how much is rounding.

In exact arithmetic, g measured at eps and g measured at 1.5·eps, with the same batch and direction, differ by the
third derivative of the loss alone, a term of order eps². What rounding adds to the losses is another number at each of
the four points, as if it were drawn, and it is divided by eps. So, over some directions, the mean of g·g' is the square
of the signal, and half the mean of (g − g')² is that of the noise. A second pass at the same points would show nothing:
rounding is deterministic. A correlation ρ with exact projected gradients belongs to a ratio of ρ ÷ √(1 − ρ²).
"""

import math
from collections import deque

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.step import Batch, Engine, projected_gradient

LEAST = 3.0  # below it, more than a tenth of the variance of g is noise: its correlation with exact g is below .95
SECOND = 1.5  # the second eps, in units of the first
KEPT = 8  # the newest pairs
MOST = 1e6  # a larger ratio says nothing more


class Signal:
    """The ratio of signal to noise, over the newest pairs of projected gradients."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=KEPT)

    def measure(self, engine: Engine[Batch], theta: Float32Array, z: Float32Array, eps: float, batch: Batch) -> None:
        """Measure a pair: four forward passes. What is not finite says nothing of rounding, and is left out."""
        pair = (
            projected_gradient(engine, theta, z, eps, batch)[0],
            projected_gradient(engine, theta, z, SECOND * eps, batch)[0],
        )
        if all(map(math.isfinite, pair)):
            self._pairs.append(pair)

    @property
    def ratio(self) -> float | None:
        """Signal ÷ noise, from 0 to `MOST`; None before the first pair, and where every g is zero."""
        signal = math.fsum(first * second for first, second in self._pairs)
        noise = math.fsum((first - second) ** 2 for first, second in self._pairs) / 2
        if not any(first or second for first, second in self._pairs):
            return None
        return min(MOST, math.sqrt(max(signal, 0.0) / noise)) if noise else MOST
