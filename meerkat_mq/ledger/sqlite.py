"""The ledger in SQLite: one file, `synchronous = FULL`, WAL; a commit is a transaction. `store.py` has the theory."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from meerkat_mq.config import KeptRules, check_config
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry, short_hash
from meerkat_mq.errors import AnotherServer, LedgerError, LedgerUnavailable
from meerkat_mq.ledger import sqlite_file
from meerkat_mq.ledger.files import SnapshotFiles, check_remains, keep_mask
from meerkat_mq.ledger.sqlite_chain import SqliteChain, add_link
from meerkat_mq.ledger.sqlite_guard import MOST_ROWS
from meerkat_mq.ledger.sqlite_rows import (
    CLOSED,
    JUDGED,
    REFUSING,
    SIGHTING,
    UPDATE,
    UPDATES,
    Row,
    RowT,
    closed_row,
    from_row,
    judgement,
    pack_products,
    unpack_products,
    update_record,
    update_row,
)
from meerkat_mq.ledger.store import (
    REFUSING_KEPT,
    SNAPSHOTS_KEPT,
    Closed,
    KeptSnapshot,
    NodeRow,
    Products,
    Sighting,
    Store,
    Term,
)
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.wire.descriptor import REFUSES, RunDescriptor, decode_control
from meerkat_mq.wire.entries import previous_of
from meerkat_mq.wire.frames import decode_entry, encode_entry

LEDGER_FILE = "ledger.sqlite"

_NEWEST_TERM = "SELECT term, server_id, host FROM terms ORDER BY term DESC LIMIT 1"
_TOO_OLD = "FROM updates WHERE version BETWEEN ? AND ? AND entry IS NULL"
_UNNAMED = """
    NOT EXISTS (SELECT 1 FROM updates WHERE blob = blobs.hash)
    AND NOT EXISTS (SELECT 1 FROM displacements WHERE hash = blobs.hash)
"""
_STRETCH = """
    SELECT COUNT(*), TOTAL(LENGTH(entry)), TOTAL(LENGTH(data))
    FROM entries LEFT JOIN displacements USING (version) LEFT JOIN blobs USING (hash) WHERE version >= ?
"""
_ASTRAY = """
    SELECT version FROM updates
    WHERE CASE WHEN entry IS NULL THEN version < (SELECT COALESCE(MAX(version), -1) FROM entries) - ?1
          ELSE entry NOT IN (SELECT version FROM entries) OR entry NOT BETWEEN version AND version + ?1 END LIMIT 1
"""


class Ledger(Store):
    """A run's ledger in a file. Snapshots and the mask are files beside it.

    Any method raises LedgerError where the file cannot be read or written: the message names it and the remedy.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._snapshots = SnapshotFiles(path.parent)
        self._window: int | None = None
        self._mine: tuple[int, str] | None = None
        self._loose = set[bytes]()  # displacements kept since the last entry
        self._number = sqlite_file.number_of(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a run's ledger for writing; make an empty one where there is none. Raises as `open_to_write`."""
        return cls(path, sqlite_file.open_to_write(path))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open a ledger for reading, beside a running server or without one.

        Raises:
            LedgerError: there is none, it cannot be used, or it is older than what lies beside it.
        """
        ledger = cls(path, sqlite_file.open_to_read(path))
        try:
            if not ledger._row("SELECT 1 FROM run"):
                check_remains(path, None, 0)
        except BaseException:
            ledger.close()
            raise
        return ledger

    @contextmanager
    def group(self) -> Iterator[None]:
        """LedgerUnavailable also where the file was moved or replaced: SQLite itself would write on into the void."""
        if self._connection.in_transaction:
            yield
            return
        with sqlite_file.in_words(self.path):
            before = (self._mine, set(self._loose))
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                if sqlite_file.number_of(self.path) != self._number:
                    problem = "was removed, moved or replaced while this server had it open"
                    raise LedgerUnavailable(
                        self.where, problem, "put it back, and the server goes on; or end the server"
                    )
                self._assert_in_charge()
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._mine, self._loose = before  # so that it can be tried again
                raise
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @property
    def in_charge(self) -> bool:
        return self._mine is not None and self._mine == self._row(_NEWEST_TERM)[:2]

    def _assert_in_charge(self) -> None:
        if self._mine is not None and not self.in_charge:
            term, _, host = self._row(_NEWEST_TERM)
            raise AnotherServer(
                self.where,
                f"a server of term {term} on host {host} has taken over from this one, of term {self._mine[0]}",
                "leave it in charge, or stop it and start this one again",
            )

    def _write(self, statement: str, *rows: Sequence[object] | Mapping[str, object]) -> None:
        with self.group():
            self._connection.executemany(statement, rows)

    def begin(self, descriptor: RunDescriptor, rules: Mapping[str, Any]) -> None:
        with self.group():
            if self.run is not None:
                problem = "another server has just begun a run here"
                raise AnotherServer(self.where, problem, "start this one again, with --replace to take it over")
            row = (descriptor.run_id, time.time(), descriptor.model_dump_json(), json.dumps(rules))
            self._write("INSERT INTO run VALUES (1, ?, ?, ?, ?)", row)
            add_link(self._connection, "run", 1)

    def take_term(self, above: int, server_id: str, host: str) -> int:
        with self.group():
            term = 1 + max(above, self.term)
            self._write("INSERT INTO terms VALUES (?, ?, ?, ?)", (term, server_id, host, time.time()))
            add_link(self._connection, "term", term)
            self._write(f"DELETE FROM blobs WHERE {_UNNAMED}", ())  # noqa: S608
        self._mine = (term, server_id)
        return term

    def checkpoint(self) -> None:
        """Whoever reads just then is waited for, up to 15 s."""
        with sqlite_file.in_words(self.path):
            self._connection.execute("PRAGMA wal_checkpoint(FULL)").fetchone()

    def commit_slot(self, node: str, slot: int, version: int) -> None:
        with self.group():
            self._write("DELETE FROM nodes WHERE node = ? AND slot IS NULL", (node,))
            self._write("INSERT INTO nodes (node, slot, slot_version) VALUES (?, ?, ?)", (node, slot, version))
            add_link(self._connection, "slot", slot)

    def commit_updates(self, records: Iterable[UpdateRecord]) -> None:
        self._write(UPDATE, *map(update_row, records))

    def keep_blob(self, blob: bytes) -> bytes:
        name = short_hash(blob)
        self._write("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (name, blob))
        self._loose.add(name)
        return name

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
        term = self._mine[0] if self._mine else 0
        with self.group():
            assert entry.version == self.version
            row = (entry.version, term, time.time(), asked, overdue, encode_entry(entry), pack_products(products))
            self._write("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            if entry.displacement is not None:
                self._write("INSERT INTO displacements VALUES (?, ?)", (entry.version, entry.displacement.blob))
            slots = {record.node: record.slot for record in records}
            judged = [(j.version, slots[j.node], j.rho_later, j.rho_quiet, j.early_stopped) for j in judgements]
            self._write("INSERT INTO judgements VALUES (?, ?, ?, ?, ?)", *judged)
            self._write(CLOSED, *[(entry.version, *closed_row(record)) for record in records])
            add_link(self._connection, "entry", entry.version)
            self._forget_too_old(entry.version - self.window)

    def _forget_too_old(self, version: int) -> None:
        """Forget the updates in no entry from theta of this version, and displacements that nobody names now."""
        oldest = version - 1  # one of that version may have been on its way when its last entry closed
        self._loose |= {blob for (blob,) in self._rows(f"SELECT blob {_TOO_OLD}", oldest, version) if blob}
        self._write(f"DELETE {_TOO_OLD}", (oldest, version))
        if self._loose:
            self._write(f"DELETE FROM blobs WHERE hash = ? AND {_UNNAMED}", *((name,) for name in self._loose))  # noqa: S608
            self._loose.clear()

    def keep_mask(self, mask: Mask) -> None:
        run = self.run
        assert run is not None
        keep_mask(self.path.parent, run, mask)

    def keep_snapshot(self, version: int, blob: bytes) -> None:
        self._snapshots.write(version, blob)
        self._commit_snapshot(version, short_hash(blob), len(blob))
        self.sweep()

    def _commit_snapshot(self, version: int, blob_hash: bytes, size: int) -> None:
        with self.group():
            self._write("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)", (version, blob_hash, size))
            kept = "SELECT version FROM snapshots ORDER BY version DESC LIMIT ?"
            self._write(f"DELETE FROM snapshots WHERE version NOT IN ({kept})", (SNAPSHOTS_KEPT,))  # noqa: S608

    def sweep(self) -> None:
        self._snapshots.sweep(self.snapshots())

    def commit_sightings(self, sightings: Iterable[Sighting]) -> None:
        news = list(sightings)
        with self.group():
            self._write(REFUSING, *((seen.node, REFUSING_KEPT) for seen in news if seen.status.startswith(REFUSES)))
            self._write(SIGHTING, *map(asdict, news))

    def commit_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        rows = [(version, name, value) for name, value in metrics.items()]
        with self.group():
            self._write("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?)", *rows)
            if rows:
                add_link(self._connection, "metrics", version)

    # --- what there is to read ---

    @property
    def chain(self) -> SqliteChain | None:
        """None of a file that an older server wrote, and that is only read."""
        with sqlite_file.in_words(self.path):
            chained = sqlite_file.is_chained(self._connection)
        return SqliteChain(self._connection, partial(sqlite_file.reading, self.path, "a link")) if chained else None

    @property
    def where(self) -> str:
        return str(self.path)

    def close(self) -> None:
        self._connection.close()

    def _rows(self, query: str, *values: object) -> list[Row]:
        with sqlite_file.in_words(self.path):
            found = self._connection.execute(query, values).fetchmany(MOST_ROWS + 1)
        if len(found) > MOST_ROWS:
            problem = f"answers a question with more than {MOST_ROWS:,} rows"
            raise LedgerError(self.where, problem, "restore it from a backup")
        return found

    def _row(self, query: str, *values: object) -> Row:
        return next(iter(self._rows(query, *values)), ())

    def _all(self, kind: type[RowT], what: str, query: str) -> tuple[RowT, ...]:
        rows = self._rows(query)
        with sqlite_file.decoding(self.path, what):
            return tuple(from_row(kind, row) for row in rows)

    @property
    def run(self) -> RunDescriptor | None:
        row = self._row("SELECT descriptor FROM run")
        with sqlite_file.decoding(self.path, "a run"):
            return decode_control(str(row[0]).encode(), RunDescriptor) if row else None

    @property
    def rules(self) -> dict[str, Any]:
        row = self._row("SELECT rules FROM run")
        if not row:
            return {}
        with sqlite_file.decoding(self.path, "rules of a run"):
            return check_config(json.loads(row[0]), KeptRules, where="").kept

    @property
    def window(self) -> int:
        if self._window is None and (run := self.run) is not None:
            self._window = run.max_staleness
        return self._window or 0

    @property
    def version(self) -> int:
        return int(self._row("SELECT COALESCE(MAX(version) + 1, 0) FROM entries")[0])

    def entries_within(self, first: int, limit: int, size: int) -> tuple[Entry, ...]:
        """What does not fit is not decoded."""
        query = "SELECT LENGTH(entry) FROM entries WHERE version >= ? ORDER BY version LIMIT ?"
        lengths = [int(length) for (length,) in self._rows(query, first, limit)]
        fit = sum(total <= size for total in accumulate(lengths))
        return self.entries(first, max(1, fit))

    def said_of(self, version: int) -> bytes | None:
        """Without decoding the entry after it."""
        row = self._row("SELECT entry FROM entries WHERE version = ?", version + 1)
        return previous_of(bytes(row[0])) if row else None

    def closed(self, first: int, limit: int) -> tuple[Closed, ...]:
        query = "SELECT entry, term, closed, asked, overdue FROM entries WHERE version >= ? ORDER BY version LIMIT ?"
        rows = self._rows(query, first, limit)
        with sqlite_file.decoding(self.path, "an entry"):
            return tuple(from_row(Closed, (decode_entry(row[0]), *row[1:4], bool(row[4]))) for row in rows)

    def blob(self, name: bytes) -> bytes | None:
        data = next(iter(self._row("SELECT data FROM blobs WHERE hash = ?", name)), None)
        if data is not None and not isinstance(data, bytes):
            raise LedgerError(self.where, f"holds a displacement that is {data!r:.50}", "restore it from a backup")
        return data

    def displacement(self, name: bytes) -> bytes | None:
        return self.blob(name) if self._row("SELECT 1 FROM displacements WHERE hash = ?", name) else None

    def stretch(self, first: int) -> tuple[int, int, int]:
        """Nothing is decoded: 0.3 ms instead of 220 for 1,000 entries of 100 terms."""
        count, size, displaced = self._row(_STRETCH, first)
        return int(count), int(size), int(displaced)

    def updates_of(self, first: int, last: int) -> list[tuple[int, UpdateRecord]]:
        where = "WHERE version BETWEEN ? AND ? AND entry BETWEEN ? AND ? ORDER BY entry, version, updates.slot"
        rows = self._rows(f"{UPDATES} {where}", first - self.window, last, first, last)
        with sqlite_file.decoding(self.path, f"in versions {first - self.window} to {last} an update"):
            return [(row[0], update_record(row[1:])) for row in rows]

    def updates(self, first: int, end: int, node: str | None = None) -> list[tuple[int | None, UpdateRecord]]:
        where = "WHERE version >= ? AND version < ? AND COALESCE(node = ?, TRUE) ORDER BY version, updates.slot"
        rows = self._rows(f"{UPDATES} {where}", first, end, node)
        with sqlite_file.decoding(self.path, f"in versions {first} to {end - 1} an update"):
            return [(row[0], update_record(row[1:])) for row in rows]

    def astray(self) -> object | None:
        return next(iter(self._row(_ASTRAY, self.window)), None)

    def products(self, version: int, settings: RoundSettings) -> Products | None:
        packed = next(iter(self._row("SELECT products FROM entries WHERE version = ?", version)), None)
        with sqlite_file.decoding(self.path, "products"):
            directions = settings.scalars_of(version)
            return None if packed is None else unpack_products(packed, settings.directions, directions)

    def judgements(self, version: int | None = None) -> tuple[Judgement, ...]:
        where, values = ("", ()) if version is None else ("WHERE version = ?", (version,))
        rows = self._rows(f"{JUDGED} {where} ORDER BY version, judgements.slot", *values)
        with sqlite_file.decoding(self.path, "a judgement"):
            return tuple(map(judgement, rows))

    def judged_while_open(self) -> object | None:
        row = self._row("SELECT version FROM judgements WHERE version NOT IN (SELECT version FROM entries) LIMIT 1")
        return next(iter(row), None)

    def nodes(self) -> tuple[NodeRow, ...]:
        return self._all(NodeRow, "a node", "SELECT * FROM nodes WHERE slot IS NOT NULL ORDER BY slot")

    def refusing(self) -> tuple[NodeRow, ...]:
        return self._all(NodeRow, "a node", "SELECT * FROM nodes WHERE slot IS NULL ORDER BY node")

    def terms(self) -> tuple[Term, ...]:
        return self._all(Term, "a term", "SELECT * FROM terms ORDER BY term")

    def snapshots(self) -> tuple[KeptSnapshot, ...]:
        return self._all(KeptSnapshot, "a snapshot", "SELECT * FROM snapshots ORDER BY version DESC")

    def snapshot(self, kept: KeptSnapshot) -> bytes | None:
        return self._snapshots.read(kept.version)

    def has_whole(self, kept: KeptSnapshot) -> bool:
        return self._snapshots.has_whole(kept)

    def snapshot_name(self, version: int) -> str:
        return self._snapshots.name(version)

    def metrics(self) -> dict[int, dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        for version, name, value in self._rows("SELECT version, name, value FROM metrics ORDER BY version, name"):
            found.setdefault(version, {})[name] = value
        return found
