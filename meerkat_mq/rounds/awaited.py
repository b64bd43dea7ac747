"""The nodes that an open round waits for, and when it waits no longer for those that are offline.

A node is awaited from when it is asked until its update is committed. While it is offline it is awaited only until it
counts as dead. Each call costs O(log n) at most, whatever the number of nodes: deaths lie in a heap, and one that a
return has made void is skipped when its turn comes.
"""

import heapq
import math
from collections.abc import Iterable


class Awaited:
    """Nodes by name, each with the time when it counts as dead: infinite while it is online."""

    def __init__(self, names: Iterable[str]) -> None:
        """Begin with these nodes, all online."""
        self._dead_at = dict.fromkeys(names, math.inf)
        self._deaths: list[tuple[float, str]] = []
        self._dead: set[str] = set()

    def __len__(self) -> int:
        """How many, dead ones included."""
        return len(self._dead_at)

    def add(self, name: str, dead_at: float) -> None:
        """Wait for one more."""
        self._dead_at[name] = math.inf
        self.until(name, dead_at)

    def discard(self, name: str) -> None:
        """Wait for this one no more: it answered, or left."""
        self._dead_at.pop(name, None)
        self._dead.discard(name)

    def until(self, name: str, dead_at: float) -> None:
        """The node, if it is awaited, went offline and will be dead then; or, where that is infinite, it is back."""
        if name in self._dead_at:
            self._dead_at[name] = dead_at
            self._dead.discard(name)
            if dead_at < math.inf:
                heapq.heappush(self._deaths, (dead_at, name))

    def all_dead(self, now: float) -> bool:
        """Whether nobody is left to wait for."""
        while self._deaths and self._deaths[0][0] <= now:
            dead_at, name = heapq.heappop(self._deaths)
            if self._dead_at.get(name) == dead_at:
                self._dead.add(name)
        return len(self._dead) == len(self._dead_at)

    @property
    def next_death(self) -> float:
        """When the next of those that are offline will be dead; infinite where none is."""
        while self._deaths and self._dead_at.get(self._deaths[0][1]) != self._deaths[0][0]:
            heapq.heappop(self._deaths)
        return self._deaths[0][0] if self._deaths else math.inf
