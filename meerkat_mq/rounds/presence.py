"""Who owns a topic that carries a will, which keeps late wills and cloned cards apart; how often its state is said."""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum

LEAST_S = 5.0


class Ownership(Enum):
    """What a state found on our own topic means."""

    OURS = "ours"
    OVERWRITTEN = "overwritten"
    REPLACED = "replaced"


class Presence:
    """Judges what stands on the topic that this process owns.

    `owner` tells processes apart (a node's boot, a server's id), `link` connections. OVERWRITTEN: publish the current
    state again. REPLACED: a newer process took our id; `Session.disown()`, then end in words.

    Newest wins without comparing clocks: whoever was on the topic during our *first* connection came before us, and all
    that it leaves there later is a late will; any other stranger came after us.
    """

    def __init__(self, owner: Hashable) -> None:
        self.owner = owner
        self._link: int | None = None
        self._first = True
        self._predecessors: set[Hashable] = set()

    def connected(self, link: int) -> None:
        """Call from `on_connected`."""
        self._link = link

    def disconnected(self) -> None:
        """Call from `on_disconnected`."""
        self._first = self._first and self._link is None
        self._link = None

    def judge(self, owner: Hashable | None, link: int, *, online: bool, retained: bool) -> Ownership:
        """Judge a state found on our own topic.

        Args:
            owner: its owner; None where the topic was cleared or does not decode.
            link: its link.
            online: it says that its owner is there (a birth or an update of it, not a death).
            retained: the message's retained flag, so the state is older than our subscription.
        """
        if owner == self.owner:
            return Ownership.OURS if online and link == self._link else Ownership.OVERWRITTEN
        if self._first and retained:
            self._predecessors.add(owner)
        if owner is None or owner in self._predecessors:
            return Ownership.OVERWRITTEN
        # A stranger's death that arrives live was overtaken by our birth (clusters deliver wills late).
        return Ownership.REPLACED if online or retained else Ownership.OVERWRITTEN


@dataclass(slots=True)
class Pulse:
    """Says when a retained state is due to be published again because theta moved on: for people who watch."""

    rounds: int  # after so many, but not within 5 s of the last time
    slow_s: float  # or after so long, if theta moved on at all
    _version: int = 0
    _at: float = float("-inf")

    def said(self, version: int, now: float) -> None:
        """The state was published, for whatever reason."""
        self._version, self._at = version, now

    def due(self, version: int, now: float) -> bool:
        """Whether the state, now of this version, is to be published again."""
        moved, waited = abs(version - self._version), now - self._at
        return waited >= LEAST_S and (moved >= self.rounds or (moved > 0 and waited >= self.slow_s))
