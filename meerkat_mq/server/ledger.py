"""The ledger: what a run is, in one SQLite file. Entries are here before anybody hears of them."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from meerkat_mq.config import EarlyStoppingConfig, GuardsConfig, RoundsConfig, check_config
from meerkat_mq.core.path import Entry
from meerkat_mq.errors import AnotherServer
from meerkat_mq.rounds.events import Judgement, UpdateRecord
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.server import ledger_file
from meerkat_mq.server.ledger_rows import (
    Closed,
    KeptSnapshot,
    NodeRow,
    Products,
    Row,
    RowT,
    Sighting,
    Term,
    from_row,
    judgement,
    pack_products,
    unpack_products,
    update_record,
    update_row,
)
from meerkat_mq.wire.descriptor import RunDescriptor, decode_control
from meerkat_mq.wire.frames import decode_entry, encode_entry

LEDGER_FILE = "ledger.sqlite"
SNAPSHOTS_KEPT = 2

_UPDATES = """
    SELECT version, node, updates.slot, updates.boot, weight, scalars, loss, verdict
    FROM updates LEFT JOIN nodes USING (slot) WHERE version >= ? AND version < ? ORDER BY version, updates.slot
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
_NEWEST_TERM = "SELECT term, server_id, host FROM terms ORDER BY term DESC LIMIT 1"
_SIGHTING = """
    UPDATE nodes SET boot = ?, host = ?, status = ?, rows = ?, first_seen = COALESCE(first_seen, ?), last_seen = ?,
                     updates = updates + ?, packet_bytes = packet_bytes + ? WHERE node = ?
"""


class Ledger:
    """A run's ledger. Every method blocks; one thread at a time may call them.

    Each commit is a transaction of its own, or part of the `group` around it; it returns when what it was given would
    outlive a power cut. After `take_term`, every commit first sees that the ledger still holds this server's term.

    Any method raises LedgerError where the file cannot be read or written: the message names it and the remedy.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._mine: tuple[int, str] | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a run's ledger for writing; make an empty one where there is none.

        Raises:
            LedgerError: it is no ledger, damaged, of a newer version, or cannot be written. The file stays as it is.
        """
        return cls(path, ledger_file.open_to_write(path))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open a ledger for reading, beside a running server or without one.

        Raises:
            LedgerError: there is none, or it cannot be used.
        """
        return cls(path, ledger_file.open_to_read(path))

    def close(self) -> None:
        """Leave one whole file."""
        self._connection.close()

    # --- writing ---

    @contextmanager
    def group(self) -> Iterator[None]:
        """One transaction around several commits: all of them are kept, or none.

        Raises:
            AnotherServer: the ledger holds the term of another server.
        """
        if self._connection.in_transaction:
            yield
            return
        with ledger_file.in_words(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._assert_in_charge()
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @property
    def in_charge(self) -> bool:
        """Whether the newest term is the one that this object took."""
        return self._mine is not None and self._mine == self._row(_NEWEST_TERM)[:2]

    def _assert_in_charge(self) -> None:
        if self._mine is not None and not self.in_charge:
            term, _, host = self._row(_NEWEST_TERM)
            raise AnotherServer(
                str(self.path),
                f"a server of term {term} on host {host} has taken over from this one, of term {self._mine[0]}",
                "leave it in charge, or stop it and start this one again",
            )

    def _write(self, statement: str, *rows: Sequence[object]) -> None:
        with self.group():
            self._connection.executemany(statement, rows)

    def begin(self, descriptor: RunDescriptor, rules: Mapping[str, Any]) -> None:
        """Make this the ledger of a run; `rules` are those of its first start, as JSON takes them.

        Raises:
            AnotherServer: it is the ledger of a run by now.
        """
        with self.group():
            if self.run is not None:
                problem = "another server has just begun a run here"
                raise AnotherServer(str(self.path), problem, "start this one again, with --replace to take it over")
            row = (descriptor.run_id, time.time(), descriptor.model_dump_json(), json.dumps(rules))
            self._write("INSERT INTO run VALUES (1, ?, ?, ?, ?)", row)

    def take_term(self, above: int, server_id: str, host: str) -> int:
        """Take, for this server, the term after the ledger's newest and `above`; fences all earlier servers."""
        with self.group():
            term = 1 + max(above, self.term)
            self._write("INSERT INTO terms VALUES (?, ?, ?, ?)", (term, server_id, host, time.time()))
        self._mine = (term, server_id)
        return term

    def commit_slot(self, node: str, slot: int, version: int) -> None:
        """Keep a node's slot, given at theta's version."""
        self._write("INSERT INTO nodes (node, slot, slot_version) VALUES (?, ?, ?)", (node, slot, version))

    def commit_updates(self, records: Iterable[UpdateRecord]) -> None:
        """Keep updates, refused ones too."""
        self._write("INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?)", *map(update_row, records))

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
        """Keep an entry, and the final verdicts on its updates; one that was kept too late for the entry goes.

        Args:
            entry: of the ledger's version.
            records: every update of its round.
            asked: how many nodes were asked.
            overdue: whether the deadline closed the round.
            products: ⟨g_p, z⟩ by lane and step; empty where the run does not measure GradIP.
            judgements: what a calibration round showed of nodes in `records`.
        """
        assert entry.version == self.version
        term = self._mine[0] if self._mine else 0
        with self.group():
            row = (entry.version, term, time.time(), asked, overdue, encode_entry(entry), pack_products(products))
            self._write("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            slots = {record.node: record.slot for record in records}
            counted = set(slots.values())
            judged = [(j.version, slots[j.node], j.rho_later, j.rho_quiet, j.early_stopped) for j in judgements]
            self._write("INSERT INTO judgements VALUES (?, ?, ?, ?, ?)", *judged)
            kept = self._rows("SELECT slot FROM updates WHERE version = ?", entry.version)
            late = [(entry.version, slot) for (slot,) in kept if slot not in counted]
            self._write("DELETE FROM updates WHERE version = ? AND slot = ?", *late)
            verdicts = [(record.verdict, record.version, record.slot) for record in records if record.verdict]
            self._write("UPDATE updates SET verdict = ? WHERE version = ? AND slot = ?", *verdicts)

    def commit_snapshot(self, version: int, blob_hash: bytes, size: int) -> None:
        """Keep the hash of a snapshot file, and forget all but the newest two."""
        with self.group():
            self._write("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)", (version, blob_hash, size))
            kept = "SELECT version FROM snapshots ORDER BY version DESC LIMIT ?"
            self._write(f"DELETE FROM snapshots WHERE version NOT IN ({kept})", (SNAPSHOTS_KEPT,))  # noqa: S608

    def commit_sightings(self, sightings: Iterable[Sighting]) -> None:
        """Keep news of nodes; those without a slot are passed over."""
        rows = [
            (s.boot, s.host, s.status, s.rows, s.seen, s.seen, s.updates, s.packet_bytes, s.node) for s in sightings
        ]
        self._write(_SIGHTING, *rows)

    def commit_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        """Keep what theta of a version was found to be worth."""
        rows = [(version, name, value) for name, value in metrics.items()]
        self._write("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", *rows)

    # --- reading ---

    def _rows(self, query: str, *values: object) -> list[Row]:
        with ledger_file.in_words(self.path):
            return self._connection.execute(query, values).fetchall()

    def _row(self, query: str, *values: object) -> Row:
        return next(iter(self._rows(query, *values)), ())

    def _all(self, kind: type[RowT], what: str, query: str) -> tuple[RowT, ...]:
        rows = self._rows(query)
        with ledger_file.decoding(self.path, what):
            return tuple(from_row(kind, row) for row in rows)

    @property
    def run(self) -> RunDescriptor | None:
        """The run as it was described at its first start; None before `begin`."""
        row = self._row("SELECT descriptor FROM run")
        with ledger_file.decoding(self.path, "a run"):
            return decode_control(str(row[0]).encode(), RunDescriptor) if row else None

    @property
    def rules(self) -> dict[str, Any]:
        """The rules of the run's first start; none before `begin`. Sections that are newer than the run: defaults."""
        row = self._row("SELECT rules FROM run")
        if not row:
            return {}
        with ledger_file.decoding(self.path, "rules of a run"):
            rules = dict(json.loads(row[0]))
            rounds = check_config(rules.get("rounds"), RoundsConfig, where="rounds")
            guards = check_config(rules.get("guards"), GuardsConfig, where="guards")
            early = check_config(rules.get("early_stopping", {}), EarlyStoppingConfig, where="early_stopping")
            sections = {"rounds": rounds, "guards": guards, "early_stopping": early}
            return {name: section.model_dump(mode="json") for name, section in sections.items()}

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

    def closed(self, first: int, limit: int) -> tuple[Closed, ...]:
        """The same, with how their rounds closed."""
        query = "SELECT entry, term, closed, asked, overdue FROM entries WHERE version >= ? ORDER BY version LIMIT ?"
        rows = self._rows(query, first, limit)
        with ledger_file.decoding(self.path, "an entry"):
            return tuple(from_row(Closed, (decode_entry(row[0]), *row[1:4], bool(row[4]))) for row in rows)

    def stretch(self, first: int) -> tuple[int, int]:
        """How many entries there are from version `first` on, and their encoded bytes."""
        count, size = self._row("SELECT COUNT(*), TOTAL(LENGTH(entry)) FROM entries WHERE version >= ?", first)
        return int(count), int(size)

    def records(self, version: int) -> tuple[UpdateRecord, ...]:
        """The updates of a version, by slot."""
        return self._updates(version, version + 1)

    def _updates(self, first: int, end: int) -> tuple[UpdateRecord, ...]:
        rows = self._rows(_UPDATES, first, end)
        with ledger_file.decoding(self.path, f"in versions {first} to {end - 1} an update"):
            return tuple(map(update_record, rows))

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
        with ledger_file.decoding(self.path, "products"):
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
        with ledger_file.decoding(self.path, "a judgement"):
            return tuple(map(judgement, rows))

    def judged_while_open(self) -> object | None:
        """The version of a judgement whose round did not close; None: there is none, as no server writes one."""
        row = self._row("SELECT version FROM judgements WHERE version NOT IN (SELECT version FROM entries) LIMIT 1")
        return next(iter(row), None)

    def early_stopped_since(self) -> dict[str, int]:
        """Early-stopped node to the calibration round from which on every one said so."""
        rows = self._rows(_EARLY_STOPPED_SINCE)
        with ledger_file.decoding(self.path, "judgements"):
            return {str(node): int(version) for node, version in rows}

    def open_updates(self) -> tuple[UpdateRecord, ...]:
        """The updates of the open round."""
        return self.records(self.version)

    def past(self, window: int) -> list[tuple[UpdateRecord, ...]]:
        """The updates of the newest closed rounds, oldest first."""
        version = self.version
        records = self._updates(version - window, version)
        return [tuple(group) for _, group in groupby(records, key=lambda record: record.version)]

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
