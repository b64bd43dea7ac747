"""What a ledger tells: all that can be read of one."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from meerkat_mq.config import EarlyStoppingConfig, GuardsConfig, RoundsConfig, ServerValuesConfig, check_config
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import Entry
from meerkat_mq.core.replica import Change
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger import sqlite_file
from meerkat_mq.ledger.rows import (
    Closed,
    KeptSnapshot,
    NodeRow,
    Products,
    Row,
    RowT,
    Term,
    from_row,
    judgement,
    unpack_products,
    update_record,
)
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.wire.descriptor import RunDescriptor, decode_control
from meerkat_mq.wire.frames import decode_entry
from meerkat_mq.wire.values import decode_values

_UPDATES = """
    SELECT entry, version, node, updates.slot, updates.boot, weight, scalars, loss, verdict, blob, size, steps
    FROM updates LEFT JOIN nodes USING (slot)
"""
_JUDGED = """
    SELECT version, node, judgements.slot, rho_later, rho_quiet, early_stopped,
           EXISTS (SELECT 1 FROM entries WHERE entries.version = judgements.version)
    FROM judgements LEFT JOIN nodes USING (slot)
"""
_EARLY_STOPPED_SINCE = """
    WITH cleared AS (SELECT slot, MAX(version) AS last FROM judgements WHERE NOT early_stopped GROUP BY slot)
    SELECT node, MIN(version) FROM judgements JOIN nodes USING (slot) LEFT JOIN cleared USING (slot)
    WHERE version > COALESCE(last, -1) GROUP BY slot
"""
_STRETCH = """
    SELECT COUNT(*), TOTAL(LENGTH(entry)), TOTAL(LENGTH(data))
    FROM entries LEFT JOIN displacements USING (version) LEFT JOIN blobs USING (hash) WHERE version >= ?
"""
_HEARD = """
    SELECT node, MAX(version) FROM updates JOIN nodes USING (slot) WHERE version >= ? GROUP BY slot
"""
_ASTRAY = """
    SELECT version FROM updates
    WHERE CASE WHEN entry IS NULL THEN version < (SELECT COALESCE(MAX(version), -1) FROM entries) - :window
          ELSE entry NOT IN (SELECT version FROM entries) OR entry NOT BETWEEN version AND version + :window END LIMIT 1
"""
_DISPLACEMENT = "SELECT data FROM blobs WHERE hash = ? AND hash IN (SELECT hash FROM displacements)"


class LedgerReader:
    """What there is to read of a ledger; every method blocks, one thread at a time may call them.

    Any method raises LedgerError where the file cannot be read: the message names it and the remedy.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._window: int | None = None

    def close(self) -> None:
        """Leave one whole file."""
        self._connection.close()

    def _rows(self, query: str, *values: object) -> list[Row]:
        with sqlite_file.in_words(self.path):
            return self._connection.execute(query, values).fetchall()

    def _row(self, query: str, *values: object) -> Row:
        return next(iter(self._rows(query, *values)), ())

    def _all(self, kind: type[RowT], what: str, query: str) -> tuple[RowT, ...]:
        rows = self._rows(query)
        with sqlite_file.decoding(self.path, what):
            return tuple(from_row(kind, row) for row in rows)

    @property
    def run(self) -> RunDescriptor | None:
        """The run as it was described at its first start; None before `begin`."""
        row = self._row("SELECT descriptor FROM run")
        with sqlite_file.decoding(self.path, "a run"):
            return decode_control(str(row[0]).encode(), RunDescriptor) if row else None

    @property
    def rules(self) -> dict[str, Any]:
        """The rules of the run's first start; none before `begin`. Sections that are newer than the run: defaults."""
        row = self._row("SELECT rules FROM run")
        if not row:
            return {}
        with sqlite_file.decoding(self.path, "rules of a run"):
            rules = dict(json.loads(row[0]))
            rounds = check_config(rules.get("rounds"), RoundsConfig, where="rounds")
            guards = check_config(rules.get("guards"), GuardsConfig, where="guards")
            early = check_config(rules.get("early_stopping", {}), EarlyStoppingConfig, where="early_stopping")
            values = check_config(rules.get("values", {}), ServerValuesConfig, where="values")
            sections = {"rounds": rounds, "guards": guards, "early_stopping": early, "values": values}
            return {name: section.model_dump(mode="json") for name, section in sections.items()}

    @property
    def window(self) -> int:
        """How many versions old an update's theta may be; 0 before `begin`."""
        if self._window is None and (run := self.run) is not None:
            self._window = run.max_staleness
        return self._window or 0

    @property
    def created(self) -> float:
        """Seconds since 1970 of the run's first start; 0 before."""
        row = self._row("SELECT created FROM run")
        return float(row[0]) if row else 0.0

    @property
    def version(self) -> int:
        """Number of entries, theta's committed version."""
        return int(self._row("SELECT COALESCE(MAX(version) + 1, 0) FROM entries")[0])

    @property
    def term(self) -> int:
        """The newest term; 0 before the first."""
        return int(self._row("SELECT COALESCE(MAX(term), 0) FROM terms")[0])

    def entries(self, first: int, limit: int) -> tuple[Entry, ...]:
        """At most `limit` entries from version `first` on."""
        return tuple(closed.entry for closed in self.closed(first, limit))

    def entries_within(self, first: int, limit: int, size: int) -> tuple[Entry, ...]:
        """The same, of at most `size` encoded bytes together; the first one whatever its size. No more are decoded."""
        query = "SELECT LENGTH(entry) FROM entries WHERE version >= ? ORDER BY version LIMIT ?"
        lengths = [int(length) for (length,) in self._rows(query, first, limit)]
        fit = sum(total <= size for total in accumulate(lengths))
        return self.entries(first, max(1, fit))

    def closed(self, first: int, limit: int) -> tuple[Closed, ...]:
        """At most `limit` entries from version `first` on, with how their rounds closed."""
        query = "SELECT entry, term, closed, asked, overdue FROM entries WHERE version >= ? ORDER BY version LIMIT ?"
        rows = self._rows(query, first, limit)
        with sqlite_file.decoding(self.path, "an entry"):
            return tuple(from_row(Closed, (decode_entry(row[0]), *row[1:4], bool(row[4]))) for row in rows)

    def changes(self, entries: Iterable[Entry], weights: int) -> Iterator[Change]:
        """What `Replica.replay` takes of entries; one displacement is in memory at a time.

        Args:
            entries: of this ledger.
            weights: n.

        Raises:
            LedgerError: a displacement is missing or damaged.
        """
        for entry in entries:
            added = entry.displacement
            yield entry.terms, None if added is None else self.values(added.blob, weights)

    def values(self, name: bytes, weights: int) -> Float32Array:
        """What a displacement that was kept decodes to, a node's or an entry's: float32 (n,).

        Raises:
            LedgerError: it is missing or damaged.
        """
        blob = self.blob(name)
        if blob is None:
            problem = f"lacks the displacement {name.hex()}"
            raise LedgerError(str(self.path), problem, "restore it from a backup")
        with sqlite_file.decoding(self.path, "a displacement"):
            return decode_values(blob, name, weights)

    def blob(self, name: bytes) -> bytes | None:
        """A displacement as it was encoded, a node's or an entry's; None where there is none of this hash."""
        return self._blob("SELECT data FROM blobs WHERE hash = ?", name)

    def displacement(self, name: bytes) -> bytes | None:
        """The same, of entries only: what a node sent is nobody else's business."""
        return self._blob(_DISPLACEMENT, name)

    def _blob(self, query: str, name: bytes) -> bytes | None:
        data = next(iter(self._row(query, name)), None)
        if data is not None and not isinstance(data, bytes):
            raise LedgerError(str(self.path), f"holds a displacement that is {data!r:.50}", "restore it from a backup")
        return data

    def stretch(self, first: int) -> tuple[int, int, int]:
        """How many entries there are from version `first` on, their encoded bytes, and those of displacements."""
        count, size, displaced = self._row(_STRETCH, first)
        return int(count), int(size), int(displaced)

    def records(self, entry: int) -> tuple[UpdateRecord, ...]:
        """The updates that closed with an entry, by base version and slot."""
        return tuple(record for _, record in self._updates(entry, entry))

    def _updates(self, first: int, last: int) -> list[tuple[int, UpdateRecord]]:
        """Of these entries, with their number, in order."""
        where = "WHERE version BETWEEN ? AND ? AND entry BETWEEN ? AND ? ORDER BY entry, version, updates.slot"
        rows = self._rows(f"{_UPDATES} {where}", first - self.window, last, first, last)
        with sqlite_file.decoding(self.path, f"in versions {first - self.window} to {last} an update"):
            return [(row[0], update_record(row[1:])) for row in rows]

    def open_updates(self) -> tuple[UpdateRecord, ...]:
        """The updates that are in no entry yet and not too old for one, by base version and slot."""
        first = self.version - self.window
        rows = self._rows(f"{_UPDATES} WHERE version >= ? AND entry IS NULL ORDER BY version, updates.slot", first)
        with sqlite_file.decoding(self.path, f"since version {first} an update"):
            return tuple(update_record(row[1:]) for row in rows)

    def given_by(self, node: str, first: int, end: int) -> tuple[tuple[int | None, UpdateRecord], ...]:
        """A node's updates from theta of versions `first` to `end` − 1, each with its entry; None while in none."""
        where = "WHERE version >= ? AND version < ? AND node = ? ORDER BY version"
        rows = self._rows(f"{_UPDATES} {where}", first, end, node)
        with sqlite_file.decoding(self.path, f"in versions {first} to {end - 1} an update"):
            return tuple((row[0], update_record(row[1:])) for row in rows)

    def heard(self) -> dict[str, int]:
        """Node to the newest version within the window from whose theta there is an update of it."""
        rows = self._rows(_HEARD, self.version - max(1, self.window))
        return {str(node): int(version) for node, version in rows}

    def astray(self) -> object | None:
        """The version of an update that is in an entry where it cannot be, or in none for too long; None: no such."""
        with sqlite_file.in_words(self.path):
            found = self._connection.execute(_ASTRAY, {"window": self.window}).fetchone()
        return None if found is None else found[0]

    def products(self, version: int, settings: RoundSettings) -> Products | None:
        """⟨g_p, z⟩ of an entry, by lane and step; empty where nothing was measured, None where nothing was kept.

        Nothing was kept by servers older than schema 2, and of a round that did not close.

        Args:
            version: of the entry.
            settings: of the run: how many lanes a round has, and how many directions each.

        Raises:
            LedgerError: they are of another number of directions.
        """
        packed = next(iter(self._row("SELECT products FROM entries WHERE version = ?", version)), None)
        with sqlite_file.decoding(self.path, "products"):
            directions = settings.directions_of(version)
            return None if packed is None else unpack_products(packed, settings.lanes, directions)

    def judgements(self, version: int) -> tuple[Judgement, ...]:
        """What a calibration round showed of the nodes, by slot; nothing of any other round."""
        return self._judged(f"{_JUDGED} WHERE version = ? ORDER BY judgements.slot", version)

    def newest_judgements(self) -> tuple[Judgement, ...]:
        """The newest of each node, by slot.

        Raises:
            LedgerError: one of them is of a round that did not close.
        """
        newest = "SELECT MAX(version), slot FROM judgements GROUP BY slot"
        where = f"WHERE (version, judgements.slot) IN ({newest})"
        return self._judged(f"{_JUDGED} {where} ORDER BY judgements.slot")

    def _judged(self, query: str, *values: object) -> tuple[Judgement, ...]:
        rows = self._rows(query, *values)
        with sqlite_file.decoding(self.path, "a judgement"):
            return tuple(map(judgement, rows))

    def judged_while_open(self) -> object | None:
        """The version of a judgement whose round did not close; None: there is none, as no server writes one."""
        row = self._row("SELECT version FROM judgements WHERE version NOT IN (SELECT version FROM entries) LIMIT 1")
        return next(iter(row), None)

    def early_stopped_since(self) -> dict[str, int]:
        """Early-stopped node to the calibration round from which on every one said so."""
        rows = self._rows(_EARLY_STOPPED_SINCE)
        with sqlite_file.decoding(self.path, "judgements"):
            return {str(node): int(version) for node, version in rows}

    def past(self, window: int) -> list[tuple[UpdateRecord, ...]]:
        """The updates of the newest entries, oldest first; of those that have any."""
        version = self.version
        records = self._updates(version - window, version - 1)
        return [tuple(record for _, record in group) for _, group in groupby(records, key=lambda found: found[0])]

    def staleness(self, window: int) -> float | None:
        """Mean age of the updates of the newest entries, in versions; None if they have none."""
        first = self.version - window
        query = "SELECT AVG(entry - version) FROM updates WHERE version >= ? AND entry >= ?"
        found = self._row(query, first - self.window, first)[0]
        return None if found is None else float(found)

    def slots(self) -> dict[str, int]:
        """Node to slot."""
        return {node.node: node.slot for node in self.nodes()}

    def nodes(self) -> tuple[NodeRow, ...]:
        """All nodes that have a slot, by slot."""
        return self._all(NodeRow, "a node", "SELECT * FROM nodes WHERE slot IS NOT NULL ORDER BY slot")

    def terms(self) -> tuple[Term, ...]:
        """All terms, oldest first."""
        return self._all(Term, "a term", "SELECT * FROM terms ORDER BY term")

    def snapshots(self) -> tuple[KeptSnapshot, ...]:
        """Snapshot files, newest first."""
        return self._all(KeptSnapshot, "a snapshot", "SELECT * FROM snapshots ORDER BY version DESC")

    def metrics(self) -> dict[int, dict[str, float]]:
        """Version to what was found, by name."""
        found: dict[int, dict[str, float]] = {}
        for version, name, value in self._rows("SELECT version, name, value FROM metrics ORDER BY version, name"):
            found.setdefault(version, {})[name] = value
        return found
