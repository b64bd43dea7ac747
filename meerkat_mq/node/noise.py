"""A node's look at its own projected gradients: how much of them is signal, before the first round and now and then."""

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import structlog

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.signal import LEAST, Signal
from meerkat_mq.core.step import Engine, Row
from meerkat_mq.errors import reason
from meerkat_mq.wire.descriptor import RunDescriptor

FIRST = 4  # directions before the first round: as long as eight local steps
EVERY = 256  # local steps from one later direction to the next: less than a hundredth of the time

_REMEDY = 'set dtype = "float32" here if it is not, or raise rounds.eps for all nodes'


class Noise:
    """Measures with the node's own engine and rows; says in the log what it finds.

    Attributes:
        ratio: signal ÷ noise, to three digits; None where nothing can be said. Other threads read it.
    """

    def __init__(self, engine: Engine[Any], run: RunDescriptor) -> None:
        self._engine = engine
        self._run = run
        self._signal = Signal()
        self.ratio: float | None = None
        self._measured = 0
        self._due = EVERY
        self._is_low = False

    def first(self, theta: Float32Array, rows: Sequence[Row]) -> None:
        """The check before the first round."""
        try:
            for _ in range(FIRST):
                self._measure(theta, rows)
        except Exception as error:  # whatever an engine's library raises: local steps say so too, and are tried again
            structlog.get_logger().warning("signal to noise not measured", problem=reason(error))
        if self.ratio is not None:
            structlog.get_logger().info("signal to noise of projected gradients", ratio=self.ratio, eps=self._run.eps)
        self._warn()

    def stepped(self, steps: int, theta: Callable[[], Float32Array], rows: Sequence[Row]) -> None:
        """So many local steps were made; the node is at `theta()` again."""
        self._due -= steps
        if self._due <= 0:
            self._due = EVERY
            self._measure(theta(), rows)
            self._warn()

    def _measure(self, theta: Float32Array, rows: Sequence[Row]) -> None:
        size, start = self._run.batch_size, self._measured * self._run.batch_size
        batch = list(islice(cycle(rows), start % len(rows), start % len(rows) + min(size, len(rows))))
        z = direction(self._run.stream, self._measured, 0, theta.size)
        self._signal.measure(self._engine, theta, z, self._run.eps, self._engine.prepare(batch))
        self._measured += 1
        found = self._signal.ratio
        self.ratio = None if found is None else float(f"{found:.3g}")

    def _warn(self) -> None:
        ratio, was_low = self.ratio, self._is_low
        self._is_low = ratio is not None and ratio < LEAST
        if self._is_low and not was_low:
            problem = f"signal to noise is {ratio}, and below {LEAST:g} rounding decides where the model goes"
            structlog.get_logger().warning("projected gradients are noise", problem=problem, remedy=_REMEDY)
