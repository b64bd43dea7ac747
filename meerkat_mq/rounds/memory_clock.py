"""Virtual time."""

import heapq
import itertools
from collections.abc import Callable


class VirtualClock:
    """What is to be done, by time.

    Attributes:
        now: virtual seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a virtual time."""
        heapq.heappush(self._agenda, (time, next(self._order), action))

    def pass_until(self, until: float, done: Callable[[], bool]) -> None:
        """Do what is to be done up to that time, or until `done`; `now` is then that of the last thing done."""
        while not done() and self._agenda and self._agenda[0][0] <= until:
            time, _, action = heapq.heappop(self._agenda)
            self.now = max(self.now, time)
            action()
