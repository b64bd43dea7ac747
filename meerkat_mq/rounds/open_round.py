"""The open round: who is asked, what came, what that comes to, and its frame."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from meerkat_mq.core.path import MAX_WEIGHT, Entry
from meerkat_mq.rounds.clipping import heaviest
from meerkat_mq.rounds.early_stopping import EarlyStopping, judgements_of, with_verdicts
from meerkat_mq.rounds.events import CommitEntry
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import (
    ANNOUNCE_AT,
    RoundSettings,
    deadline_length,
    fewest_asked,
    needed,
    sample,
    shares_of,
    terms_of,
)  # fmt: skip
from meerkat_mq.rounds.records import RoundOutcome, UpdateRecord, Verdict
from meerkat_mq.rounds.roster import Awaited
from meerkat_mq.wire.frames import Header, Round
from meerkat_mq.wire.limits import round_room

PAIRS = 16_000  # of slots and numbers in a frame: 16,371 fit beside whole bitmaps and an entry of 16 KiB


@dataclass(slots=True)
class OpenRound:
    """The open version: who is asked, and what came.

    Attributes:
        acknowledged: committed updates that close with it, refused ones too, by base version and node.
    """

    version: int  # of theta
    asked: dict[str, int]  # node to slot
    needed: int  # how many updates from theta of this version it takes to close; of a buffered one, its buffer's size
    acknowledged: dict[tuple[int, str], UpdateRecord]
    products: tuple[tuple[float, ...], ...] | None  # ⟨g_p, z⟩ by lane and step; None until they are measured
    candidates: set[str] = field(init=False)  # nodes of which an update that can be used is among them
    taken: int = field(init=False)  # how many updates are taken, committed or not, that will close with it
    awaited: Awaited = field(init=False)  # nodes asked whose update from theta of this version is not committed
    answered: set[str] = field(init=False)  # nodes with a committed update, one that can be used or not
    deadline_at: float = 0.0
    deadline_s: float = 0.0
    heard_at: float = 0.0  # when the last update was committed, or the round was opened
    attempt: int = 0  # how often the deadline was doubled
    announce_at: list[float] = field(default_factory=list)
    closing: bool = False  # whether it is decided which updates the entry is made of; no update joins them from then on
    overdue: bool = False  # whether the deadline closed it
    outcome: RoundOutcome | None = None  # set when the updates are judged
    entry: Entry | None = None  # set when the terms are applied
    heaviest: tuple[int, int] = (0, MAX_WEIGHT)  # of so many nodes asked, the largest weight that counts

    def __post_init__(self) -> None:
        """Nodes whose update is acknowledged need not be awaited."""
        self.candidates = {record.node for record in self.acknowledged.values() if record.verdict is Verdict.ACCEPTED}
        self.taken = len(self.acknowledged)
        self.awaited = Awaited(
            self.asked.keys() - {name for version, name in self.acknowledged if version == self.version}
        )
        self.answered = {name for _, name in self.acknowledged}

    @property
    def answers(self) -> int:
        """How many of the nodes asked have a committed update."""
        return len(self.asked) - len(self.awaited)

    def comparable(self, least: int) -> bool:
        """Whether usable updates came of `least` nodes; or of none, which changes nothing, of as many that answered."""
        return len(self.candidates or self.answered) >= least

    @property
    def useless(self) -> list[str]:
        """The nodes with committed updates of which none can be used."""
        return sorted(self.answered - self.candidates)

    @property
    def records(self) -> tuple[UpdateRecord, ...]:
        """The committed updates, by base version and slot."""
        return tuple(sorted(self.acknowledged.values(), key=lambda record: (record.version, record.slot)))

    def weight(self, own: int, weight_of: Callable[[str], int]) -> int:
        """What an update of a node of this weight counts: no more than a few times what those of most others do."""
        if self.heaviest[0] != len(self.asked):
            known = {record.node: record.weight for record in self.acknowledged.values()}
            weights = [known.get(name) or weight_of(name) for name in self.asked]
            self.heaviest = len(self.asked), heaviest(weights, MAX_WEIGHT)
        return min(own, self.heaviest[1])

    def commit(self, entry: Entry) -> CommitEntry:
        """What the ledger keeps of the round, once it is judged."""
        assert self.products is not None
        assert self.outcome is not None
        records, judgements = self.outcome.records, self.outcome.judgements
        return CommitEntry(entry, records, len(self.asked), self.overdue, self.products, judgements)

    def ask(self, name: str, slot: int, awaited_until: float) -> bool:
        """Ask one more node; False where it is asked already."""
        if name in self.asked:
            return False
        self.asked[name] = slot
        if (self.version, name) not in self.acknowledged:
            self.awaited.add(name, awaited_until)
        return True

    def forget(self, name: str) -> None:
        """Ask this node no more."""
        del self.asked[name]
        self.awaited.discard(name)

    def acknowledge(self, record: UpdateRecord) -> None:
        """Its update is committed."""
        self.acknowledged.setdefault((record.version, record.node), record)
        self.answered.add(record.node)
        if record.verdict is Verdict.ACCEPTED:
            self.candidates.add(record.node)
        if record.version == self.version:
            self.awaited.discard(record.node)

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


def opened(
    version: int,
    settings: RoundSettings,
    eligible: Mapping[str, int],
    acknowledged: dict[tuple[int, str], UpdateRecord],
    has_answered: Callable[[str], bool],
) -> OpenRound:
    """The round of a version: it asks a sample of the nodes at hand, and those whose update it has already."""
    chosen = sample(settings.run_id, version, eligible.values(), settings.fraction_of(version), settings.min_updates)
    asked = {name: slot for name, slot in eligible.items() if slot in chosen}
    asked |= {record.node: record.slot for record in acknowledged.values() if record.version == version}
    by_buffer = settings.takes_what_comes(version)
    enough = settings.buffer_size if by_buffer else quorum_of(asked, settings, version, has_answered)
    return OpenRound(version, asked, enough, acknowledged, None if settings.measured else ())


def quorum_of(
    asked: Collection[str], settings: RoundSettings, version: int, has_answered: Callable[[str], bool]
) -> int:
    """How many of the nodes asked have to answer.

    Those that never answered a round count only as long as there are not as many others as a round of `min_nodes`
    would ask: else whoever makes up ids could hold up all rounds.
    """
    others = sum(map(has_answered, asked))
    return needed(others if others >= fewest_asked(settings, version) else len(asked), settings.quorum)


def outcome_of(
    guard: Guard,
    settings: RoundSettings,
    version: int,
    products: Sequence[Sequence[float]],
    records: Sequence[UpdateRecord],
) -> RoundOutcome:
    """Judge a closed round: verdicts, judgements, coefficients and shares; of each round once, in order.

    A function of the round's committed updates, by base version and slot, and of the guards' window alone. With 1,000
    nodes and 100 steps it takes a good part of a second, so the machine has it computed for it (JudgeRound). The
    guard, which nobody else uses meanwhile, remembers the round. The displacements are measured before.
    """
    guarded = guard.judge(records)
    judgements = judgements_of(version, guarded, products, settings)
    judged = with_verdicts(guarded, judgements)
    guard.remember(judged)
    terms, shares = terms_of(judged, settings, version), shares_of(judged, settings, version)
    return RoundOutcome(judged, judgements, terms, shares, dict(guard.flagged))


def round_frame(
    header: Header,
    settings: RoundSettings,
    early: EarlyStopping,
    current: OpenRound | None,
    *,
    acknowledged: Mapping[int, int],
    entries: tuple[Entry, ...],
) -> Round:
    """The round as nodes see it.

    Args:
        header: of its version.
        settings: of the run.
        early: who does fewer steps.
        current: None while none is open.
        acknowledged: slot to the newest base version of a committed update.
        entries: the newest; those stay that have room.
    """
    version = header.version
    steps, asked = settings.steps_of(version), current.asked if current else {}
    deadline_s = current.deadline_s if current else deadline_length(settings, version, 0)
    fewer = sorted((asked[node], early.steps_of(version, node)) for node in early.nodes if node in asked)
    short = tuple(pair for pair in fewer if pair[1] < steps)
    frame = Round(
        header,
        is_open=current is not None,
        steps=steps,
        lanes=settings.directions,
        eps=settings.eps,
        deadline_ms=min(round(1000 * deadline_s), 2**32 - 1),
        attempt=current.attempt if current else 0,
        asked=frozenset(asked.values()),
        heard=frozenset(slot for slot, base in acknowledged.items() if base == version),
        short=short,
    )
    entries, pairs = round_room(frame, entries, settings.frame_bytes)
    ages = _ages(acknowledged, version, settings.acknowledged, room=min(pairs, max(0, PAIRS - len(short))))
    return replace(frame, entries=entries, heard_before=ages)


def _ages(acknowledged: Mapping[int, int], version: int, oldest: int, *, room: int) -> tuple[tuple[int, int], ...]:
    """(slot, age) of updates acknowledged before `version`, up to an age, by slot; the newest where not all have room.

    A node that is left out sends its committed update again, as a duplicate, until that update is too old.
    """
    ages = ((version - base, slot) for slot, base in acknowledged.items()) if oldest else ()
    newest = sorted((age, slot) for age, slot in ages if 1 <= age <= oldest)[:room]
    return tuple(sorted((slot, age) for age, slot in newest))
