"""What a ledger promises to whoever uses it.

A ledger holds one run: its description, its terms, its nodes, its entries in order, the updates, what was measured and
judged, and snapshots of theta. Mask and entries are the model. Everything else is kept so that a server can go on, and
so that anybody can check what the entries say. `ledger.sqlite` keeps it in a file, `worlds.store` in memory;
`tests/ledger/test_contract.py` holds both to what is written here.

**Durable.** A commit is a method that changes the ledger. When it returns, what it was given outlives the process, and
for SQLite a power cut. So nobody is told of anything before its commit is back. What a killed process had not committed
is as if it had never been.

**All or nothing.** A commit is one transaction, or part of the `group` around it. A group is kept whole or not at all,
and whoever reads never sees half of one. A commit that raises changes nothing: it can be tried again. It raises
LedgerUnavailable where that may help, any other LedgerError where it will not.

**The fence.** A server takes a term, which is higher than every earlier one. From then on each of its commits asserts,
in the transaction of the commit itself, that its term is still the newest; else it raises AnotherServer and changes
nothing. So of two servers on one ledger, only the one that took the newest term can write. A store that took no term is
not fenced: it begins runs and takes a term. A term belongs to the store object that took it, which is one a process.
This locks out a server that is outdated. It is no consensus: a lost ledger is a lost run.

**Order.** Entries are numbered from 0 without a gap, and one is committed after the one before it. Their hashes chain
them, which `verify` checks; a store does not. Slots are committed before updates that name them, and updates before the
entry that takes them, in the same group at the latest.

**The first one wins.** An update is identified by (run, version, node). The first one committed stays. Another one of
the same identity is refused with LedgerError, and its group with it: a server answers repeated updates from what it
knows, and does not commit them. An update belongs to at most one entry.

**What is forgotten.** Entries, terms, slots, judgements and the updates in entries stay. When an entry is committed,
the updates go that are in no entry and too old for the next one, and the displacements that no update and no entry
names. A new term drops unnamed displacements too. Of snapshots the newest two stay.

**The chain.** Each commit of what stays (run, terms, slots, entries with their updates and judgements, metrics) adds a
link to the ledger's own chain, in its own transaction (`chain.py`). So `verify` notices what is altered afterwards,
names and times too. News of nodes (`Sighting`) change all the time, and are not in it.

**Snapshots** are a convenience: one can be lost, torn or stale, and whoever reads it compares its hash. Bytes come
first, then the row that names them, then what no row names is removed. A crash in between leaves bytes that nobody
knows, which `sweep` removes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from typing import Any, Final, Protocol

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry
from meerkat_mq.core.replica import Change
from meerkat_mq.errors import LedgerError, WireError
from meerkat_mq.ledger.chain import Chain
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.entries import entry_bytes
from meerkat_mq.wire.values import decode_values

SNAPSHOTS_KEPT: Final = 2
REFUSING_KEPT: Final = 100  # nodes without a slot, for anybody can make up ids

Products = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Term:
    """A term that a server took; `taken` in seconds since 1970."""

    term: int
    server_id: str
    host: str
    taken: float


@dataclass(frozen=True, slots=True)
class Closed:
    """An entry and how its round closed; `closed` in seconds since 1970."""

    entry: Entry
    term: int
    closed: float
    asked: int
    overdue: bool


@dataclass(frozen=True, slots=True)
class KeptSnapshot:
    """A snapshot: theta's version, the blob's hash and size."""

    version: int
    hash: bytes
    size: int


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What is known of a node."""

    node: str
    slot: int | None  # None of a node that refuses the run, and never took part
    slot_version: int | None  # theta's version when it got its slot
    boot: int | None
    host: str | None
    status: str | None  # the last word of its status topic; None before the first sighting
    rows: int | None
    first_seen: float | None  # seconds since 1970
    last_seen: float | None
    updates: int  # update messages that came from it, duplicates too
    packet_bytes: int  # all MQTT packets that came from it


@dataclass(frozen=True, slots=True)
class Sighting:
    """News of a node; `updates` and `packet_bytes` count what came since the last sighting."""

    node: str
    boot: int
    host: str
    status: str  # of `with_flag`
    rows: int
    seen: float
    updates: int = 0
    packet_bytes: int = 0


_FLAGGED: Final = ", flagged: "


def with_flag(status: str, flagged: str) -> str:
    """A sighting's status of a node that stands out by what it sends; `flagged` says how, or is ""."""
    return f"{status}{_FLAGGED}{flagged}" if flagged else status


def without_flag(status: str) -> tuple[str, str]:
    """What `with_flag` put together."""
    said, _, flagged = status.partition(_FLAGGED)
    return said, flagged


class Store(Protocol):
    """A run's ledger. Every method blocks; one thread at a time may call them.

    Every method raises LedgerError where the ledger cannot be read or written; every commit raises AnotherServer where
    it holds the term of another server. What has a body here follows from the rest.
    """

    # --- commits ---

    def group(self) -> AbstractContextManager[None]:
        """One transaction around several commits. Inside another group, a part of that one."""

    @property
    def in_charge(self) -> bool:
        """Whether the newest term is the one that this object took."""

    def begin(self, descriptor: RunDescriptor, rules: Mapping[str, Any]) -> None:
        """Make this the ledger of a run; `rules` are those of its first start, as JSON takes them.

        Raises:
            AnotherServer: it is the ledger of a run by now.
        """

    def take_term(self, above: int, server_id: str, host: str) -> int:
        """Take, for this server, the term after the ledger's newest and `above`; fences all earlier servers."""

    def checkpoint(self) -> None:
        """Bring all commits into the main file, where there are several: a copy of it alone is no older than this."""

    def commit_slot(self, node: str, slot: int, version: int) -> None:
        """Keep a node's slot, given at theta's version."""

    def commit_updates(self, records: Iterable[UpdateRecord]) -> None:
        """Keep updates, refused ones too."""

    def keep_blob(self, blob: bytes) -> bytes:
        """Keep a displacement, a node's or that of the next entry; returns its hash.

        The next `commit_entry` forgets it, unless an update or that entry names it by then.
        """

    def commit_entry(
        self,
        entry: Entry,
        records: Sequence[UpdateRecord],
        asked: int,
        overdue: bool,
        *,
        products: Products = (),
        judgements: Sequence[Judgement] = (),
    ) -> None:
        """Keep an entry, of the ledger's version, and every update that closed with it; those now too old for any go.

        Args:
            asked: how many nodes were asked.
            overdue: whether the deadline closed the round.
            products: ⟨g_p, z⟩ by lane and step; empty where the run does not measure GradIP.
            judgements: what a calibration round showed of nodes in `records`.
        """

    def commit_sightings(self, sightings: Iterable[Sighting]) -> None:
        """Keep news of nodes; of those without a slot, of the first hundred that refuse the run, as they say."""

    def commit_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        """Keep what theta of a version was found to be worth."""

    def keep_mask(self, mask: Mask) -> None:
        """Keep a copy of the begun run's mask, where the ledger is one that people verify later."""

    def close(self) -> None:
        """Leave one whole ledger."""

    # --- snapshots ---

    def keep_snapshot(self, version: int, blob: bytes) -> None:
        """Keep a snapshot's bytes, then its hash and size; all but the newest two go. In no group: bytes stay."""

    def snapshots(self) -> tuple[KeptSnapshot, ...]:
        """What snapshots there are, newest first."""

    def snapshot(self, kept: KeptSnapshot) -> bytes | None:
        """The bytes of one as they are now, whatever became of them; None where they are gone."""

    def has_whole(self, kept: KeptSnapshot) -> bool:
        """Whether its bytes are there and undamaged; cheap where that was asked before."""

    def snapshot_name(self, version: int) -> str:
        """How messages name its bytes."""

    def sweep(self) -> None:
        """Remove the bytes of snapshots that the ledger does not know, and what an interrupted write left."""

    # --- what there is to read ---

    @property
    def where(self) -> str:
        """How messages name the ledger."""

    @property
    def chain(self) -> Chain | None:
        """The chain of what stays; None where servers wrote the ledger that kept none."""

    @property
    def run(self) -> RunDescriptor | None:
        """The run as it was described at its first start; None before `begin`."""

    @property
    def rules(self) -> dict[str, Any]:
        """The rules of the run's first start; none before `begin`. Sections that are newer than the run: defaults."""

    @property
    def version(self) -> int:
        """Number of entries, theta's committed version."""

    def terms(self) -> tuple[Term, ...]:
        """All terms, oldest first."""

    def nodes(self) -> tuple[NodeRow, ...]:
        """All nodes that have a slot, by slot."""

    def refusing(self) -> tuple[NodeRow, ...]:
        """Nodes that have no slot, and said that they refuse the run, by name."""

    def closed(self, first: int, limit: int) -> tuple[Closed, ...]:
        """At most `limit` entries from version `first` on, with how their rounds closed."""

    def blob(self, name: bytes) -> bytes | None:
        """A displacement as it was encoded, a node's or an entry's; None where there is none of this hash."""

    def displacement(self, name: bytes) -> bytes | None:
        """The same, of entries only: what a node sent is nobody else's business."""

    def updates_of(self, first: int, last: int) -> list[tuple[int, UpdateRecord]]:
        """The updates that closed with these entries, each with the entry's number; by entry, base version and slot."""

    def updates(self, first: int, end: int, node: str | None = None) -> list[tuple[int | None, UpdateRecord]]:
        """The updates from theta of versions `first` to `end` − 1, those of one node or all, by base version and slot.

        Each with its entry; None while in none.
        """

    def astray(self) -> object | None:
        """The version of an update that is in an entry where it cannot be, or in none for too long; None: no such."""

    def products(self, version: int, settings: RoundSettings) -> Products | None:
        """⟨g_p, z⟩ of an entry, by lane and step; empty where nothing was measured, None where nothing was kept.

        Nothing was kept by servers older than schema 2, and of a round that did not close.

        Raises:
            LedgerError: they are of another number of directions than the settings say.
        """

    def judgements(self, version: int | None = None) -> tuple[Judgement, ...]:
        """What calibration rounds showed of nodes, by version and slot: all of them, or that of one version.

        Raises:
            LedgerError: one of them is of a round that did not close.
        """

    def judged_while_open(self) -> object | None:
        """The version of a judgement whose round did not close; None: there is none, as no server writes one."""

    def metrics(self) -> dict[int, dict[str, float]]:
        """Version to what was found, by name."""

    # --- what follows ---

    @property
    def window(self) -> int:
        """How many versions old an update's theta may be; 0 before `begin`."""
        return 0 if self.run is None else self.run.max_staleness

    @property
    def term(self) -> int:
        """The newest term; 0 before the first."""
        return max((taken.term for taken in self.terms()), default=0)

    def slots(self) -> dict[str, int]:
        """Node to slot."""
        return {node.node: node.slot for node in self.nodes() if node.slot is not None}

    def entries(self, first: int, limit: int) -> tuple[Entry, ...]:
        """At most `limit` entries from version `first` on."""
        return tuple(closed.entry for closed in self.closed(first, limit))

    def entries_within(self, first: int, limit: int, size: int) -> tuple[Entry, ...]:
        """The same, of at most `size` encoded bytes together; the first one whatever its size."""
        entries = self.entries(first, limit)
        fit = sum(1 for _ in takewhile(lambda total: total <= size, accumulate(map(entry_bytes, entries))))
        return entries[: max(1, fit)]

    def said_of(self, version: int) -> bytes | None:
        """The hash that the entry after it says of the entry of this version; None while it is the newest."""
        return next((entry.previous for entry in self.entries(version + 1, 1)), None)

    def stretch(self, first: int) -> tuple[int, int, int]:
        """How many entries there are from version `first` on, their encoded bytes, and those of displacements."""
        entries = self.entries(first, self.version)
        displaced = sum(entry.displacement.size for entry in entries if entry.displacement is not None)
        return len(entries), sum(map(entry_bytes, entries)), displaced

    def changes(self, entries: Iterable[Entry], weights: int) -> Iterator[Change]:
        """What `Replica.replay` takes of entries of n weights; one displacement is in memory at a time."""
        for entry in entries:
            added = entry.displacement
            yield entry.terms, None if added is None else self.values(added.blob, weights)

    def values(self, name: bytes, weights: int) -> Float32Array:
        """What a displacement that was kept decodes to, a node's or an entry's: float32 (n,).

        Raises:
            LedgerError: it is missing or damaged.
        """
        blob, remedy = self.blob(name), "restore it from a backup"
        if blob is None:
            raise LedgerError(self.where, f"lacks the displacement {name.hex()}", remedy)
        try:
            return decode_values(blob, name, weights)
        except WireError as error:
            raise LedgerError(self.where, f"holds a displacement that no server writes ({error})", remedy) from error

    def records(self, entry: int) -> tuple[UpdateRecord, ...]:
        """The updates that closed with an entry, by base version and slot."""
        return tuple(record for _, record in self.updates_of(entry, entry))

    def open_updates(self) -> tuple[UpdateRecord, ...]:
        """The updates that are in no entry yet and not too old for one, by base version and slot."""
        version = self.version
        return tuple(record for entry, record in self.updates(version - self.window, version + 1) if entry is None)

    def heard(self) -> dict[str, int]:
        """Node to the newest version within the window from whose theta there is an update of it."""
        version = self.version
        return {record.node: record.version for _, record in self.updates(version - max(1, self.window), version + 1)}

    def newest_judgements(self) -> tuple[Judgement, ...]:
        """The newest of each node, by slot; raises what `judgements` does."""
        newest, slots = {found.node: found for found in self.judgements()}, self.slots()
        return tuple(sorted(newest.values(), key=lambda found: slots[found.node]))

    def early_stopped_since(self) -> dict[str, int]:
        """Early-stopped node to the calibration round from which on every one said so."""
        since = dict[str, int]()
        for found in self.judgements():
            if found.early_stopped:
                since.setdefault(found.node, found.version)
            else:
                since.pop(found.node, None)
        return since

    def past(self, window: int) -> list[tuple[UpdateRecord, ...]]:
        """The updates of the newest entries, oldest first; of those that have any."""
        return by_entry(self.updates_of(self.version - window, self.version - 1))


def by_entry(updates: Iterable[tuple[int, UpdateRecord]]) -> list[tuple[UpdateRecord, ...]]:
    """What `Store.updates_of` found, an item for each entry."""
    return [tuple(record for _, record in group) for _, group in groupby(updates, key=lambda found: found[0])]
