"""A ledger's file may come from anybody, so no more of SQLite is used than a ledger needs.

A SQLite file holds more than rows. A view in a table's place answers a query with rows without end; a trigger, a
generated column or an index on an expression runs inside the reader's own statement, and what a trigger writes is part
of the server's own transaction. So

1. the schema is compared with what the migrations make, before anything is read: any other table, view, trigger, index
   or column is refused, and so is one whose words differ;
2. SQLite is told not to trust a schema (`trusted_schema = OFF`: for what a comparison could miss), to check the size of
   cells as it meets them, and not to map the file into memory, where a file that is cut short ends the process;
3. a statement may take no more steps than the size of the file warrants. Pages of a damaged tree may name the same page
   many times: by pages that are named twice on each of 20 levels, a file of 100 KB has a million times its rows;
4. a cell, and the number of rows that one query gives, have a largest size.
"""

import sqlite3
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from meerkat_mq.errors import LedgerError, cut

MOST_ROWS: Final = 2_000_000  # of one query; a window of updates of all nodes is the most that anybody asks for
_LARGEST_CELL: Final = 257 << 20  # a displacement has 256 MiB at most
_EVERY: Final = 100_000  # steps of SQLite's machine
_FREE: Final = 3_000_000  # steps of any statement …
_A_BYTE: Final = 20  # … and so many more for each byte of the file; the dearest of our queries takes one
_LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: _LARGEST_CELL,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 10,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_STATISTICS: Final = "sqlite_stat"  # tables that ANALYZE leaves: of a person who asked for it, and never read by us
_FOREIGN: Final = "it is not what a server writes and may harm who opens it: use a backup, or the server's own file"

Schema = dict[tuple[str, str], str]  # kind and name of an object to its words


class Bounded(sqlite3.Connection):
    """A connection whose statements take a bounded number of steps each, 3 million and 20 a byte of the file.

    A statement that takes more is interrupted (sqlite3.OperationalError).
    """

    _taken = 0
    _file: Path | None = None

    def bound(self, file: Path) -> None:
        """Begin to count; `file` is the ledger, whose size decides."""
        self._file = file
        self.set_progress_handler(self._count, _EVERY)

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> sqlite3.Cursor:  # type: ignore[override]
        """The same; begins to count anew."""
        self._taken = 0
        return super().execute(statement, values)

    def executemany(self, statement: str, rows: Any, /) -> sqlite3.Cursor:
        """The same; begins to count anew."""
        self._taken = 0
        return super().executemany(statement, rows)

    def _count(self) -> bool:
        self._taken += _EVERY
        return self._taken > _FREE and self._file is not None and self._taken > _FREE + _A_BYTE * _size(self._file)


def _size(file: Path) -> int:
    """Bytes of a ledger, and of what SQLite has not yet written into it."""
    size = 0
    for part in (file, file.with_name(f"{file.name}-wal")):
        try:
            size += part.stat().st_size
        except OSError:
            continue
    return size


def connect(file: Path, how: str, busy_s: float) -> Bounded:
    """A connection that trusts nothing of the file; the schema is the caller's to check.

    Args:
        how: SQLite's own parameters of an address, such as "mode=ro".
        busy_s: how long another process's lock is waited for.
    """
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?{how}",
        uri=True,
        isolation_level=None,
        timeout=busy_s,
        check_same_thread=False,
        factory=Bounded,
    )
    try:
        for limit, most in _LIMITS.items():
            connection.setlimit(limit, most)
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
            connection.execute(f"PRAGMA {setting}").close()
        connection.bound(file)
    except BaseException:
        connection.close()
        raise
    return connection


def check_schema(connection: sqlite3.Connection, file: Path, migrations: Sequence[str]) -> None:
    """Refuse a file that holds anything but what these scripts make.

    Raises:
        LedgerError: names what else there is, is missing, or is another.
    """
    found, expected = _schema(connection), _made_by(tuple(migrations))
    extra, missing = found.keys() - expected.keys(), expected.keys() - found.keys()
    for kind, name in sorted(extra):
        if not missing or kind in ("view", "trigger"):
            problem = f"holds a {cut(kind)} {cut(name)!r}, which no server makes"
            raise LedgerError(str(file), problem, _FOREIGN)
    for kind, name in sorted(missing, reverse=True):  # tables first
        raise LedgerError(str(file), f"is damaged (no such {kind}: {name})", "restore it from a backup")
    for (kind, name), words in expected.items():
        if found[kind, name] != words:
            raise LedgerError(str(file), f"holds a {kind} {name!r} that no server makes", _FOREIGN)


@cache
def _made_by(migrations: tuple[str, ...]) -> Schema:
    connection = sqlite3.connect(":memory:")
    try:
        for script in migrations:
            connection.executescript(script)
        return _schema(connection)
    finally:
        connection.close()


def _schema(connection: sqlite3.Connection) -> Schema:
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM main.sqlite_schema LIMIT 1000").fetchall()
    return {
        (str(kind), str(name)): f"{table}: {' '.join(str(words).split())}"
        for kind, name, table, words in rows
        if not (kind == "table" and str(name).startswith(_STATISTICS))
    }
