"""What survives a crash: the ledger, which commits atomically, and files, which do not; and every theta, made once."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.path import NO_DIGEST, Coefficient, Entry, apply, digest, seed_for, short_hash
from meerkat_mq.errors import AnotherServer
from meerkat_mq.rounds.events import CommitEntry
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.wire.values import decode_values

_direction = lru_cache(16_384)(direction)
_seed_for = lru_cache(16_384)(seed_for)


@lru_cache(4096)
def measured(
    g_p: bytes, run_id: bytes, version: int, *, lanes: int, steps: int, stream: str
) -> tuple[tuple[float, ...], ...]:
    """⟨g_p, z⟩ of a round's directions, by lane and step; g_p as float32 bytes."""
    return inner_products(np.frombuffer(g_p, np.float32), run_id, version, lanes=lanes, steps=steps, stream=stream)


class Theta:
    """One theta of one version; nodes that apply the same entries share it."""

    __slots__ = ("_next", "digest", "values", "version")

    def __init__(self, values: Float32Array, version: int) -> None:
        self.values = values
        self.version = version
        self.digest = digest(values)
        self._next: dict[tuple[tuple[Coefficient, ...], bytes | None], Theta] = {}

    def after(self, terms: tuple[Coefficient, ...], blob: bytes | None, run_id: bytes, stream: str) -> "Theta":
        """The theta that entry `version` leads to, by its terms and the blob of its displacement."""
        found = self._next.get((terms, blob))
        if found is None:
            values, scratch = self.values.copy(), np.empty_like(self.values)
            for term in terms:
                seed = _seed_for(run_id, self.version - term.age, term.lane, term.step)
                apply(values, _direction(stream, seed, 0, values.size), term.coefficient, scratch)
            if blob is not None:
                np.add(values, decode_values(blob, None, values.size), out=values)
            found = self._next[terms, blob] = Theta(values, self.version + 1)
        return found


@dataclass(slots=True)
class Ledger:
    """The ledger as SQLite keeps it: each method is one transaction, which a crash leaves done or undone.

    Attributes:
        products: ⟨g_p, z⟩ of each entry's directions, by lane and step.
        judgements: of each entry.
        updates: committed, in no entry yet, by base version and node, of which the first one wins.
        snapshots: version to blob hash.
        blobs: displacements, of nodes and of entries, by hash.
        window: how many versions old an update's theta may be.
    """

    window: int = 0
    entries: list[Entry] = field(default_factory=list)
    entry_terms: list[int] = field(default_factory=list)
    records: list[tuple[UpdateRecord, ...]] = field(default_factory=list)
    products: list[tuple[tuple[float, ...], ...]] = field(default_factory=list)
    judgements: list[tuple[Judgement, ...]] = field(default_factory=list)
    terms: list[tuple[int, str]] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)
    updates: dict[tuple[int, str], UpdateRecord] = field(default_factory=dict)
    snapshots: dict[int, bytes] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)

    def backup(self) -> "Ledger":
        """A copy, whole."""
        made = copy(self)
        for name in self.__slots__:
            setattr(made, name, copy(getattr(self, name)))
        return made

    @property
    def term(self) -> int:
        """The newest term; 0 before the first."""
        return self.terms[-1][0] if self.terms else 0

    def take_term(self, above: int, server_id: str) -> int:
        """Take a term higher than the ledger's and `above`."""
        self.terms.append((max(self.term, above) + 1, server_id))
        return self.term

    def _fence(self, mine: tuple[int, str]) -> None:
        if self.terms[-1] != mine:
            raise AnotherServer(f"term {mine[0]}", f"the ledger is at term {self.term}", "leave the other in charge")

    def commit_slot(self, mine: tuple[int, str], node: str, slot: int) -> None:
        """Keep a node's slot."""
        self._fence(mine)
        self.slots[node] = slot

    def commit_updates(self, mine: tuple[int, str], records: Sequence[UpdateRecord]) -> None:
        """Keep updates, as one group."""
        self._fence(mine)
        for record in records:
            self.updates.setdefault((record.version, record.node), record)

    def keep_blob(self, mine: tuple[int, str], blob: bytes) -> bytes:
        """Keep a displacement; returns its hash."""
        self._fence(mine)
        name = short_hash(blob)
        self.blobs[name] = blob
        return name

    def blob_of(self, entry: Entry) -> bytes | None:
        """The blob of an entry's displacement."""
        return None if entry.displacement is None else self.blobs[entry.displacement.blob]

    def bases(self, theta_0: bytes) -> Mapping[int, bytes]:
        """The newest due digest at or before each version that an update's theta may be of."""
        digests, found, head = [theta_0, *(entry.digest for entry in self.entries)], dict[int, bytes](), theta_0
        for version, known in enumerate(digests):
            found[version] = head = head if known == NO_DIGEST else known
        return {version: found[version] for version in sorted(found)[-1 - self.window :]}

    def heard(self) -> Mapping[str, int]:
        """Node to the newest base version of its committed updates, within the window."""
        first = len(self.entries) - max(1, self.window)
        newest = dict[str, int]()
        for records in [*self.records[max(first, 0) :], tuple(self.updates.values())]:
            for record in records:
                if record.version >= first:
                    newest[record.node] = max(record.version, newest.get(record.node, 0))
        return newest

    def commit_entry(self, mine: tuple[int, str], closed: CommitEntry) -> None:
        """Keep an entry and its updates with their verdicts; what no later entry can take is dropped."""
        self._fence(mine)
        self.entries.append(closed.entry)
        self.entry_terms.append(mine[0])
        self.records.append(closed.records)
        self.products.append(closed.products)
        self.judgements.append(closed.judgements)
        taken = {(record.version, record.node) for record in closed.records}
        oldest = closed.entry.version + 1 - self.window
        self.updates = {
            place: record for place, record in self.updates.items() if place not in taken and record.version >= oldest
        }

    def commit_snapshot(self, mine: tuple[int, str], version: int, blob_hash: bytes) -> None:
        """Keep a snapshot's hash; those of the two newest stay."""
        self._fence(mine)
        self.snapshots[version] = blob_hash
        for old in sorted(self.snapshots)[:-2]:
            del self.snapshots[old]


@dataclass(slots=True)
class Disk:
    """The server's state folder: the ledger, and snapshot files by name."""

    ledger: Ledger = field(default_factory=Ledger)
    files: dict[str, bytes] = field(default_factory=dict)
