"""Whether a run's loss rises well above the base's: it diverges, and its learning rate is too high."""

import math
import statistics
from collections import deque
from typing import Final

REMEDY: Final = "lower rounds.lr"
FIRST: Final = 3  # rounds whose median is the base's loss on the nodes' rows: theta has hardly moved yet
LAST: Final = 8  # rounds that all have to be above it: the losses of batches are noisy
ON_BATCHES: Final = 1.5  # times the base's
ON_HELD_OUT: Final = 1.2  # … on the same held-out rows each time


class RisingLoss:
    """Is told of the losses as they come; says once that they rise.

    Attributes:
        warning: what it said; "" before.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=LAST)
        self._held_out: float | None = None
        self.warning = ""

    def closed(self, number: int, loss: float) -> str:
        """A round closed; returns the warning, "" where there is nothing to say, or it was said.

        Args:
            number: of the round.
            loss: mean over its accepted updates; not finite where none could be accepted, since no loss is finite.
        """
        if not math.isfinite(loss):
            return self._warn(f"the loss of round {number:,} is not finite")
        if len(self._first) < FIRST:
            self._first.append(loss)
            return ""
        self._last.append(loss)
        base = statistics.median(self._first)
        if len(self._last) < LAST or min(self._last) <= ON_BATCHES * base:
            return ""
        return self._warn(f"the loss rises: {loss:.3g} in round {number:,}, {base:.3g} at the start")

    def evaluated(self, version: int, loss: float) -> str:
        """theta of a version was evaluated; likewise."""
        if not math.isfinite(loss):
            return self._warn(f"the held-out loss after {version:,} rounds is not finite")
        if version == 0:
            self._held_out = loss
        if self._held_out is None or loss <= ON_HELD_OUT * self._held_out:
            return ""
        return self._warn(f"the held-out loss rises: {loss:.3g} after {version:,} rounds, {self._held_out:.3g} before")

    def _warn(self, problem: str) -> str:
        if self.warning:
            return ""
        self.warning = f"{problem}; {REMEDY}"
        return self.warning
