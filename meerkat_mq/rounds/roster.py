"""The nodes that the server's machine knows, and those that an open round waits for."""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meerkat_mq.wire.frames import MAX_SLOTS


@dataclass(slots=True)
class KnownNode:
    """A node; while it is offline, nobody waits for it from `dead_at` on."""

    slot: int
    welcomed: bool = False
    boot: int = 0
    link: int = 0
    weight: int = 1
    online: bool = False
    asleep: bool = False  # it said when it would come back: until `dead_at`, it is asked as if it were online
    dead_at: float = float("-inf")

    @property
    def awaited_until(self) -> float:
        """When nobody waits for it any more; infinite while it is online."""
        return math.inf if self.online else self.dead_at

    def at_hand(self, now: float) -> bool:
        """Whether a round can ask it."""
        return self.welcomed and (self.online or (self.asleep and now < self.dead_at))


class Roster:
    """The nodes that the server knows, by id. No call but `eligible` looks at more than one of them.

    Attributes:
        online: how many are.
    """

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._nodes = {name: KnownNode(slot, welcomed=True) for name, slot in slots.items()}
        self._next_slot = 1 + max(slots.values(), default=-1)
        self._present: dict[str, KnownNode] = {}  # online, or asleep
        self.online = 0

    def __getitem__(self, name: str) -> KnownNode:
        return self._nodes[name]

    def get(self, name: str) -> KnownNode | None:
        """The node, if it is known."""
        return self._nodes.get(name)

    def add(self, name: str) -> KnownNode | None:
        """A new node in the next slot, or None where all are given."""
        if self._next_slot >= MAX_SLOTS:
            return None
        node = self._nodes[name] = KnownNode(self._next_slot)
        self._next_slot += 1
        return node

    def appeared(self, name: str) -> None:
        """The node is online."""
        node = self._present[name] = self._nodes[name]
        self.online += not node.online
        node.online = True

    def vanished(self, name: str, dead_at: float, *, asleep: bool = False) -> None:
        """The node went offline, for ever or to sleep."""
        node = self._nodes[name]
        self.online -= node.online
        node.online, node.asleep, node.dead_at = False, asleep, dead_at
        if asleep:
            self._present[name] = node
        else:
            self._present.pop(name, None)

    def eligible(self, now: float, least: int = 0) -> dict[str, int]:
        """Those that a round can ask, with their slots; none where there are not `least`."""
        if len(self._present) < least:
            return {}
        found = {name: node.slot for name, node in self._present.items() if node.at_hand(now)}
        return found if len(found) >= least else {}


class Awaited:
    """The nodes that an open round waits for, each with the time when it counts as dead: infinite while it is online.

    A node is awaited from when it is asked until its update is committed; while it is offline, until it counts as dead.
    Each call costs O(log n) at most, whatever the number of nodes: deaths lie in a heap, and one that a return has made
    void is skipped when its turn comes.
    """

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
