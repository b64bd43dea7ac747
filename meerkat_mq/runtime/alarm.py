"""The clock of a machine: rings when `wake_at` comes, whatever else happens."""

from collections.abc import Callable

from meerkat_mq.runtime.ports import Clock, Timer


class Alarm:
    """Calls `ring` at the time that was set last."""

    def __init__(self, clock: Clock, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._at: float | None = None
        self._timer: Timer | None = None

    def set(self, at: float | None) -> None:
        """Ring then, once; None: do not."""
        if at == self._at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._at = at
        self._timer = None if at is None else self._clock.at(at, self._rings)

    def _rings(self) -> None:
        self._at = self._timer = None
        self._ring()
