"""What the server's machine keeps of nodes and of the open round."""

from dataclasses import dataclass, field

from meerkat_mq.core.path import Entry, Term
from meerkat_mq.rounds.events import UpdateRecord
from meerkat_mq.rounds.policy import ANNOUNCE_AT


@dataclass(slots=True)
class KnownNode:
    """A node; while it is offline, nobody waits for it from `dead_at` on."""

    slot: int
    welcomed: bool = False
    boot: int = 0
    link: int = 0
    weight: int = 1
    online: bool = False
    dead_at: float = float("-inf")

    def dead(self, now: float) -> bool:
        """Whether it has been offline for its grace."""
        return not self.online and now >= self.dead_at


@dataclass(slots=True)
class OpenRound:
    """The open round.

    Attributes:
        asked: node to slot.
        needed: how many updates it takes to close.
        heard: committed updates.
        taken: nodes whose update is accepted, committed or not.
        attempt: how often the deadline was doubled.
        terms: set when the round closes; nothing is heard from then on.
        entry: set when the terms are applied.
    """

    asked: dict[str, int]
    needed: int
    heard: dict[str, UpdateRecord]
    taken: set[str]
    deadline_at: float = 0.0
    deadline_s: float = 0.0
    attempt: int = 0
    announce_at: list[float] = field(default_factory=list)
    terms: tuple[Term, ...] | None = None
    entry: Entry | None = None

    @property
    def closing(self) -> bool:
        """Whether it is decided what the entry says."""
        return self.terms is not None

    @property
    def records(self) -> tuple[UpdateRecord, ...]:
        """The committed updates, by slot."""
        return tuple(sorted(self.heard.values(), key=lambda record: record.slot))

    def wait(self, now: float, deadline_s: float) -> None:
        """Give the nodes this long from now, and plan the announcements on the way."""
        self.deadline_at, self.deadline_s = now + deadline_s, deadline_s
        self.announce_at = [now + part * deadline_s for part in ANNOUNCE_AT]

    def announcement_due(self, now: float) -> bool:
        """Whether a planned announcement has come; strikes it off the plan."""
        ahead = [at for at in self.announce_at if at > now]
        due = len(ahead) < len(self.announce_at)
        self.announce_at = ahead
        return due
