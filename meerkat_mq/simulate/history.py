"""What happened to a federation: all that the checkers see, filled by the simulator and by drills."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry
from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.messages import Round, Update

CORRUPT_THETA = "corrupt theta"
_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault as it struck; times in seconds on the history's clock, `ended` infinite where it did not end.

    While a fault named "corrupt theta" lasts on its target, that node's claims are false by intent.
    """

    name: str
    target: str
    began: float
    ended: float


@dataclass(slots=True)
class History:
    """One run, from its first start to its last word. Every time is in seconds on one clock.

    Attributes:
        mask: theta_0 among others.
        entries: of the final ledger.
        records: of the final ledger: the updates of each entry, refused ones too.
        products: of the final ledger: ⟨g_p, z⟩ of each entry's directions, by lane and step.
        judgements: of the final ledger: what each entry's round showed of its nodes.
        open_updates: of the final ledger: the committed updates that are in no entry yet.
        blobs: of the final ledger: displacements of its updates and entries, by hash.
        terms: of the final ledger: (term, server id).
        entry_terms: of the final ledger: the term that wrote each entry.
        rounds: (time, frame) of every round frame published.
        updates: (time, node, update) of every update sent, whatever became of it.
        claims: (time, node, version, digest): what nodes say of their theta; 16 bytes, or the first 8.
        states: (time, state) of every server state published.
        faults: what was injected.
        finished: whether all rounds were closed, once every fault had healed, within the time that they may take.
        stuck: of one that is not finished, what the run waits for.
        reached: what the simulator met, by name.
        backups: (time, version) of deliberate restores of the ledger from a backup of `version` entries: what was
            published of later entries, or of the updates of the rounds from there on, before that time may differ.
    """

    mask: Mask
    settings: RoundSettings
    entries: list[Entry] = field(default_factory=list)
    records: list[tuple[UpdateRecord, ...]] = field(default_factory=list)
    products: list[tuple[tuple[float, ...], ...]] = field(default_factory=list)
    judgements: list[tuple[Judgement, ...]] = field(default_factory=list)
    open_updates: tuple[UpdateRecord, ...] = ()
    blobs: Mapping[bytes, bytes] = field(default_factory=dict)
    terms: list[tuple[int, str]] = field(default_factory=list)
    entry_terms: list[int] = field(default_factory=list)
    rounds: list[tuple[float, Round]] = field(default_factory=list)
    updates: list[tuple[float, str, Update]] = field(default_factory=list)
    claims: list[tuple[float, str, int, bytes]] = field(default_factory=list)
    states: list[tuple[float, ServerState]] = field(default_factory=list)
    faults: list[Injected] = field(default_factory=list)
    finished: bool = False
    stuck: str = ""
    reached: Counter[str] = field(default_factory=Counter)
    backups: list[tuple[float, int]] = field(default_factory=list)

    def take_ledger(self, ledger: Store) -> None:
        """Keep what the final ledger holds; a server may write on meanwhile."""
        version = ledger.version
        closed = [found for first in range(0, version, _AT_ONCE) for found in ledger.closed(first, _AT_ONCE)][:version]
        self.entries, self.entry_terms = [found.entry for found in closed], [found.term for found in closed]
        self.records = [ledger.records(number) for number in range(version)]
        self.products = [ledger.products(number, self.settings) or () for number in range(version)]
        self.judgements = [ledger.judgements(number) for number in range(version)]
        self.terms = [(taken.term, taken.server_id) for taken in ledger.terms()]
        found = [*ledger.open_updates(), *(record for _, record in ledger.updates_of(version, ledger.version))]
        waiting = {(record.version, record.node): record for record in found if record.version <= version}
        self.open_updates = tuple(waiting.values())
        records = [record for records in self.all_records for record in records]
        named = [record.values.blob for record in records if record.values]
        named += [entry.displacement.blob for entry in self.entries if entry.displacement]
        self.blobs = {name: ledger.blob(name) or b"" for name in named}

    def saw_update(self, time: float, node: str, update: Update) -> None:
        """A node sent an update: its base says what its newest due theta is."""
        self.updates.append((time, node, update))
        if update.header.run == int.from_bytes(self.settings.run_id[:4], "little"):
            version = update.header.version
            self.claims.append((time, node, version - version % self.settings.digest_every, update.base))

    def saw_status(self, time: float, node: str, status: NodeStatus) -> None:
        """A node published its status: where it stands, and the newest due digest there."""
        if status.digest is not None and status.run == self.settings.run_id.hex():
            due = status.version - status.version % self.settings.digest_every
            self.claims.append((time, node, due, bytes.fromhex(status.digest)))

    @property
    def all_records(self) -> list[tuple[UpdateRecord, ...]]:
        """The updates of each entry, then those that are in none yet."""
        return [*self.records, self.open_updates]

    def took(self, node: str) -> bool:
        """Whether the final ledger holds an update of a node."""
        return any(record.node == node for records in self.all_records for record in records)

    def undone(self, time: float, version: int) -> bool:
        """Whether a restore from a backup undid what was said of entry `version` at that time."""
        return any(time <= restored and version >= first for restored, first in self.backups)
