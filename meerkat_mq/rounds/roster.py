"""The nodes that the server's machine knows, and those that an open round waits for.

Slots. A node gets a slot when it is born, and keeps it while this term lasts. The ledger keeps the slot once the node
has answered a round: whoever makes up ids leaves nothing behind. Of nodes that have not answered, a bounded number may
be present at one time.

Waiting. Rounds wait for a node up to their deadline. The time from the last answer of others to the end of the round
was waited in vain for those that did not answer: they lose so much of their credit. A node without credit is silent: it
is asked as before, and its update counts where it comes in time, but rounds go on at the pace of the others. It is
waited for again once an update of it was taken and its credit has come back, at a tenth of the time: so that is how
much of the time a node can cost the rounds, whatever it does. Nodes that never answered share a credit, too.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from meerkat_mq.core.used import Used
from meerkat_mq.wire.frames import MAX_SLOTS

NEWCOMERS = 1024  # nodes present that have not answered a round; twice as many as a round needs, where that is more
IN_VAIN = 0.1  # share of the time that rounds may wait for one node in vain
CREDIT = 1.5  # deadlines: a node may miss one, and is silent from the second on
NEWCOMERS_CREDIT = 0.5  # one that never answered is silent from the first on
ALL_NEWCOMERS_CREDIT = 4.0  # of all together that never answered


@dataclass(slots=True)
class KnownNode:
    """A node; while it is offline, nobody waits for it from `dead_at` on."""

    slot: int
    answered: bool = False  # an update of it was taken, in this run: the ledger keeps its slot
    boot: int = 0
    link: int = 0
    weight: int = 1
    online: bool = False
    asleep: bool = False  # it said when it would come back: until `dead_at`, it is asked as if it were online
    dead_at: float = float("-inf")
    silent: bool = False  # it lost its credit, and no update of it was taken since
    in_vain_s: Used = field(default_factory=lambda: Used(IN_VAIN))

    def at_hand(self, now: float) -> bool:
        """Whether a round can ask it."""
        return self.online or (self.asleep and now < self.dead_at)


class Roster:
    """The nodes that the server knows, by id. No call but `eligible` looks at more than one of them.

    Args:
        slots: that the ledger keeps.
        deadline_s: seconds of a round's first deadline: the measure of credit.
        fewest: how many nodes a round needs.

    Attributes:
        online: how many are.
        answered: how many have answered a round of this run.
    """

    def __init__(self, slots: Mapping[str, int], *, deadline_s: float, fewest: int) -> None:
        self._nodes = {name: KnownNode(slot, answered=True) for name, slot in slots.items()}
        self._next_slot = 1 + max(slots.values(), default=-1)
        self._present: dict[str, KnownNode] = {}  # online, or asleep
        self._deadline_s = deadline_s
        self._most_newcomers = max(NEWCOMERS, 2 * fewest)
        self._newcomers = 0  # present
        self._in_vain_s = Used(IN_VAIN)  # for any of those that never answered
        self.online, self.answered = 0, len(slots)

    def __getitem__(self, name: str) -> KnownNode:
        return self._nodes[name]

    def get(self, name: str) -> KnownNode | None:
        """The node, if it is known."""
        return self._nodes.get(name)

    def appeared(self, name: str) -> KnownNode | None:
        """The node is online, a new one in the next slot; None: all are given, or too many have never answered."""
        node = self._nodes.get(name)
        joins = name not in self._present and (node is None or not node.answered)
        if joins and self._newcomers >= self._most_newcomers:
            return None
        if node is None:
            if self._next_slot >= MAX_SLOTS:
                return None
            node = self._nodes[name] = KnownNode(self._next_slot)
            self._next_slot += 1
        self._newcomers += joins
        self._present[name] = node
        self.online += not node.online
        node.online = True
        return node

    def vanished(self, name: str, dead_at: float, *, asleep: bool = False) -> None:
        """The node went offline, for ever or to sleep."""
        node = self._nodes[name]
        self.online -= node.online
        node.online, node.asleep, node.dead_at = False, asleep, dead_at
        if asleep:
            self._newcomers += name not in self._present and not node.answered
            self._present[name] = node
        elif self._present.pop(name, None) is not None:
            self._newcomers -= not node.answered

    def answers(self, name: str, *, forgiven: bool) -> bool:
        """An update of the node is taken; whether it is its first. `forgiven`: its credit is whole again."""
        node = self._nodes[name]
        is_first, node.answered, node.silent = not node.answered, True, False
        self._newcomers -= is_first and name in self._present
        self.answered += is_first
        if is_first or forgiven:
            node.in_vain_s = Used(IN_VAIN)
        return is_first

    def waited(self, names: Iterable[str], now: float, in_vain_s: float) -> list[str]:
        """Rounds waited so long for nodes that did not answer; returns those that are silent from now on."""
        late = {name: self._nodes[name] for name in names}
        if not all(node.answered for node in late.values()):
            self._in_vain_s.add(now, in_vain_s)
        for node in late.values():
            node.in_vain_s.add(now, in_vain_s)
        lost = [name for name, node in late.items() if not node.silent and not self._has_credit(node, now)]
        for name in lost:
            late[name].silent = True
        return lost

    def _has_credit(self, node: KnownNode, now: float) -> bool:
        credit = CREDIT if node.answered else NEWCOMERS_CREDIT
        together = node.answered or self._in_vain_s.now(now) < ALL_NEWCOMERS_CREDIT * self._deadline_s
        return together and node.in_vain_s.now(now) < credit * self._deadline_s

    def awaited_until(self, name: str, now: float) -> float:
        """When nobody waits for the node any more: minus infinity while it is silent, infinite while it is online."""
        node = self._nodes.get(name)
        if node is None or node.silent or not self._has_credit(node, now):
            return -math.inf
        return math.inf if node.online else node.dead_at

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

    @property
    def waited_for(self) -> list[str]:
        """Those that are, or were until they died."""
        return [name for name, dead_at in self._dead_at.items() if dead_at > -math.inf]

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
