"""The nodes that the server's machine knows."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from meerkat_mq.wire.frames import MAX_SLOTS


@dataclass(slots=True)
class KnownNode:
    """A node; while it is offline, nobody waits for it from `dead_at` on.

    Attributes:
        asleep: it said when it would come back: until `dead_at`, it is asked as if it were online.
    """

    slot: int
    welcomed: bool = False
    boot: int = 0
    link: int = 0
    weight: int = 1
    online: bool = False
    asleep: bool = False
    dead_at: float = float("-inf")

    def dead(self, now: float) -> bool:
        """Whether it has been offline for its grace."""
        return not self.online and now >= self.dead_at

    def at_hand(self, now: float) -> bool:
        """Whether a round can ask it."""
        return self.welcomed and (self.online or (self.asleep and now < self.dead_at))


class Roster:
    """The nodes that the server knows, by id; what is asked at each update costs no look at all of them.

    Attributes:
        online: how many are at hand.
    """

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._nodes = {name: KnownNode(slot, welcomed=True) for name, slot in slots.items()}
        self._next_slot = 1 + max(slots.values(), default=-1)
        self._offline: set[str] = set()
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
        self.online += not self._nodes[name].online
        self._nodes[name].online = True
        self._offline.discard(name)

    def vanished(self, name: str, dead_at: float, *, asleep: bool = False) -> None:
        """The node went offline, for ever or to sleep."""
        node = self._nodes[name]
        self.online -= node.online
        node.online, node.asleep, node.dead_at = False, asleep, dead_at
        self._offline.add(name)

    def eligible(self, now: float) -> dict[str, int]:
        """Those that a round can ask, with their slots."""
        return {name: node.slot for name, node in self._nodes.items() if node.at_hand(now)}

    def dead(self, among: Set[str], now: float) -> int:
        """How many of these nobody waits for any more."""
        return sum(name in among and self._nodes[name].dead(now) for name in self._offline)

    def deaths(self, among: Set[str], after: float) -> list[float]:
        """When those of these that are offline will count as dead, as far as that lies ahead."""
        times = (self._nodes[name].dead_at for name in self._offline if name in among)
        return [dead_at for dead_at in times if dead_at > after]
