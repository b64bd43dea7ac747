"""The ledger's file: made whole, looked at before it is opened, and every failure in words."""

import os
import re
import sqlite3
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from meerkat_mq.core.files import keep_names
from meerkat_mq.core.foreign import open_regular
from meerkat_mq.errors import ConfigError, LedgerError, LedgerFailing, LedgerUnavailable, WireError
from meerkat_mq.ledger.files import check_remains
from meerkat_mq.ledger.sqlite_chain import add_all
from meerkat_mq.ledger.sqlite_guard import check_schema, connect

APPLICATION_ID = 0x4D4B4C47  # "MKLG"
BUSY_S = 15.0
MIGRATIONS = [
    """
    CREATE TABLE run (id INTEGER PRIMARY KEY CHECK (id = 1), run BLOB NOT NULL, created REAL NOT NULL,
                      descriptor TEXT NOT NULL, rules TEXT NOT NULL);
    CREATE TABLE terms (term INTEGER PRIMARY KEY, server_id TEXT NOT NULL, host TEXT NOT NULL, taken REAL NOT NULL);
    CREATE TABLE nodes (node TEXT PRIMARY KEY, slot INTEGER UNIQUE, slot_version INTEGER, boot INTEGER, host TEXT,
                        status TEXT, rows INTEGER, first_seen REAL, last_seen REAL,
                        updates INTEGER NOT NULL DEFAULT 0, packet_bytes INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE entries (version INTEGER PRIMARY KEY, term INTEGER NOT NULL, closed REAL NOT NULL,
                          asked INTEGER NOT NULL, overdue INTEGER NOT NULL, entry BLOB NOT NULL);
    CREATE TABLE updates (version INTEGER NOT NULL, slot INTEGER NOT NULL, boot INTEGER NOT NULL,
                          weight INTEGER NOT NULL, scalars BLOB NOT NULL, loss REAL NOT NULL, verdict INTEGER NOT NULL,
                          PRIMARY KEY (version, slot)) WITHOUT ROWID;
    CREATE TABLE snapshots (version INTEGER PRIMARY KEY, hash BLOB NOT NULL, bytes INTEGER NOT NULL);
    CREATE TABLE metrics (version INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
                          PRIMARY KEY (version, name)) WITHOUT ROWID;
    """,
    """
    ALTER TABLE entries ADD COLUMN products BLOB;
    CREATE TABLE judgements (version INTEGER NOT NULL, slot INTEGER NOT NULL, rho_later REAL NOT NULL,
                             rho_quiet REAL NOT NULL, early_stopped INTEGER NOT NULL,
                             PRIMARY KEY (version, slot)) WITHOUT ROWID;
    """,
    """
    ALTER TABLE updates ADD COLUMN entry INTEGER;
    ALTER TABLE updates ADD COLUMN blob BLOB;
    ALTER TABLE updates ADD COLUMN size INTEGER;
    ALTER TABLE updates ADD COLUMN steps INTEGER;
    UPDATE updates SET entry = version WHERE version IN (SELECT version FROM entries);
    CREATE INDEX updates_by_blob ON updates (blob) WHERE blob IS NOT NULL;
    CREATE TABLE blobs (hash BLOB PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE displacements (version INTEGER PRIMARY KEY, hash BLOB NOT NULL);
    """,
    """
    CREATE TABLE chain (link INTEGER PRIMARY KEY, kind TEXT NOT NULL, number INTEGER NOT NULL, content BLOB NOT NULL,
                        hash BLOB NOT NULL);
    """,
]
CHAINED = 4  # the first schema with a chain of what is kept beside entries
SCHEMA = len(MIGRATIONS)  # the newest version of the schema

_SHOWN_AS_NEWEST = [  # by schema, what makes a file that must not be written look like one of the next schema
    "",
    """
    CREATE TEMP VIEW entries AS SELECT *, NULL AS products FROM main.entries;
    CREATE TEMP VIEW judgements AS SELECT 0 AS version, 0 AS slot, 0.0 AS rho_later, 0.0 AS rho_quiet,
                                          0 AS early_stopped WHERE FALSE;
    """,
    """
    CREATE TEMP VIEW updates AS SELECT *, CASE WHEN version IN (SELECT version FROM main.entries) THEN version END
                                       AS entry, NULL AS blob, NULL AS size, NULL AS steps FROM main.updates;
    CREATE TEMP VIEW blobs AS SELECT x'' AS hash, x'' AS data WHERE FALSE;
    CREATE TEMP VIEW displacements AS SELECT 0 AS version, x'' AS hash WHERE FALSE;
    """,
]
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_RESTORE = "restore it from a backup, or name another state_dir for a new run"
_DAMAGED = f"keep it and its -wal file for a look, and {_RESTORE}"
_ANOTHER = "it may harm who opens it: use another copy of this ledger"
_AGAIN = "start the server again: it goes on where it was"
_LOCAL_DISK = "keep state_dir on a local disk, not on a network or shared file system"
_OTHERS = ("cannot be used, and SQLite says why", "leave the file as it is, and report this line")
_PROBLEMS = {  # the first that the name of SQLite's error matches
    "FULL": ("there is no space left", f"free some, and {_AGAIN}"),
    "READONLY_DBMOVED": ("was moved or replaced while it was open", f"put it back, and {_AGAIN}"),
    "READONLY": ("cannot be written", "let this user write the file and its folder"),
    "CANTOPEN|PERM|AUTH": ("cannot be opened", "let this user read and write the file and its folder"),
    "BUSY": (
        "is locked: another process has been writing it for too long, or its file system has no locks",
        f"end that process: a stopped server, perhaps; and {_LOCAL_DISK}",
    ),
    "LOCKED": ("is locked", f"{_AGAIN}; and {_LOCAL_DISK}"),
    "NOLFS": ("is larger than its file system takes", f"move state_dir to another disk, and {_AGAIN}"),
    "(IOERR_)?NOMEM": ("there is not enough memory", f"free some, and {_AGAIN}"),
    "IOERR_CORRUPTFS": ("the file system is damaged", f"have it checked, and {_AGAIN}"),
    "PROTOCOL|IOERR_(LOCK|RDLOCK|UNLOCK|BLOCKED|CHECKRESERVEDLOCK|SHM)": (
        "its file system does not lock files as SQLite needs it",
        f"{_LOCAL_DISK}, and {_AGAIN}",
    ),
    "IOERR": ("cannot be read or written", f"see to the disk, and {_AGAIN}"),
    "INTERRUPT": ("takes more steps to read than a ledger of its size can", _ANOTHER),
    "TOOBIG": ("holds a value that is larger than any that a server writes", _ANOTHER),
    "NOTADB": ("is not a ledger", "name another state_dir"),
    "CORRUPT|ERROR": ("is damaged", _DAMAGED),  # ERROR: a table or a column is missing
}
_LATER: dict[str, type[LedgerError]] = {  # what a disk, or another process, can do for a while
    "FULL|BUSY|LOCKED|NOMEM|PROTOCOL": LedgerUnavailable,
    "IOERR": LedgerFailing,
}


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Make a LedgerError of what SQLite says; a LedgerUnavailable where it may say otherwise a moment later."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's own words may quote a damaged schema
        is_none = isinstance(error, sqlite3.OperationalError | UnicodeDecodeError)  # what should be text
        unnamed = "SQLITE_CORRUPT" if is_none else ""
        name = getattr(error, "sqlite_errorname", unnamed).removeprefix("SQLITE_")
        words = next((words for names, words in _PROBLEMS.items() if re.match(names, name)), _OTHERS)
        kind = next((kind for names, kind in _LATER.items() if re.match(names, name)), LedgerError)
        said = str(error).partition(" with text ")[0]  # after that come all bytes of what should be text
        raise kind(str(path), f"{words[0]} ({said})", words[1]) from error


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Make a LedgerError of a row that no server writes; `what` it should hold."""
    try:
        yield
    except (ConfigError, WireError, ValueError, TypeError, RecursionError, struct.error) as error:
        raise LedgerError(str(path), f"holds {what} that no server writes ({error})", _RESTORE) from error


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Both of these."""
    with in_words(path), decoding(path, what):
        yield


def open_to_write(path: Path) -> sqlite3.Connection:
    """Open, or make, a ledger; bring an older schema up to date.

    Raises:
        LedgerError: it is no ledger, damaged, newer, or cannot be written. The file stays as it is.
    """
    if not _exists(path):
        check_remains(path, None, 0)
        _make(path)
    _look(path, thorough=True)
    with in_words(path):
        connection = connect(path, "mode=rw", BUSY_S)
        try:
            _check(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")  # of a read-only file, this begins to read, in silence
            connection.execute("COMMIT" if migrate(connection) else "ROLLBACK")
        except BaseException:
            connection.close()
            raise
    return connection


def number_of(path: Path) -> int | None:
    """Which file is there, by its file system's number; None where none is."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def open_to_read(path: Path) -> sqlite3.Connection:
    """Open a ledger that nobody or another process writes; one of an older schema reads like one of the newest.

    Raises:
        LedgerError: there is none, or it cannot be read.
    """
    if not _exists(path):
        check_remains(path, None, 0)
        below = [path.parent / name for name in ("server", "server-state")]  # a demo's folder, one of `meerkat init`
        near = next((str(folder) for folder in below if (folder / path.name).is_file()), None)
        raise LedgerError(
            str(path), "there is no ledger", f"give {near or 'the state_dir of a server that was started'}"
        )
    _look(path, thorough=False)
    with in_words(path):
        connection = _reader(path)
        try:
            _run(connection, _SHOWN_AS_NEWEST[_check(connection, path) :])
        except BaseException:
            connection.close()
            raise
        return connection


def migrate(connection: sqlite3.Connection) -> bool:
    """Bring the schema up to date, inside the caller's transaction.

    Writes in any case, so shows whether one can; returns whether there is anything to keep.
    """
    schema = _schema(connection)
    _run(connection, MIGRATIONS[schema:])
    if schema < CHAINED:
        add_all(connection)
    connection.execute(f"PRAGMA user_version = {SCHEMA}")
    return schema < SCHEMA


def is_chained(connection: sqlite3.Connection) -> bool:
    """Whether the file has a chain: not where an older server wrote it and none of today opened it to write."""
    return _schema(connection) >= CHAINED


def _schema(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _run(connection: sqlite3.Connection, scripts: Iterable[str]) -> None:
    """Statement by statement: `executescript` would commit the caller's transaction."""
    for script in scripts:
        for statement in filter(str.strip, script.split(";")):
            connection.execute(statement)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise _unreachable(path, error) from error


def _unreachable(path: Path, error: OSError) -> LedgerError:
    problem = f"cannot be read ({error.strerror})"
    return LedgerError(str(path), problem, "name a state_dir that this user can read and write")


def _reader(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing; where the folder is read-only, one that takes no locks either."""
    connection = connect(path, "mode=ro", BUSY_S)
    try:
        connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorname != "SQLITE_CANTOPEN" or path.with_name(f"{path.name}-wal").exists():
            raise
        return connect(path, "immutable=1", BUSY_S)
    return connection


def _make(path: Path) -> None:
    """Make an empty ledger under another name, then give it this one, unless another process was faster.

    Raises:
        LedgerError: the folder is missing, full or read-only.
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as memory:
        memory.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        migrate(memory)
        blob = memory.serialize()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            _name(temporary, path)
        keep_names(path.parent)
    except OSError as error:
        problem, remedy = f"cannot be made ({error.strerror})", "free space, or name a folder that can be written"
        raise LedgerError(str(path), problem, remedy) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _name(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except PermissionError:  # a file system without hard links: FAT on a card
        temporary.rename(path)


def _look(path: Path, *, thorough: bool) -> None:
    """Refuse what is no ledger of ours without changing a byte of it."""
    try:
        with open_regular(path) as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise _unreachable(path, error) from error
    if not head:
        raise LedgerError(str(path), "is empty", _RESTORE)
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise LedgerError(str(path), "is not a SQLite file", "name another state_dir")
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise LedgerError(str(path), "is a SQLite file of another program", "name another state_dir")
    _look_beside(path.resolve())
    with in_words(path), closing(_reader(path)) as connection:
        _check(connection, path)
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0] if thorough else "ok"
        if found != "ok":
            raise LedgerError(str(path), f"is damaged ({found.splitlines()[-1]})", _RESTORE)


def _look_beside(path: Path) -> None:
    """SQLite writes into its files beside the ledger, wherever they lead: a link would lead it to another's file.

    A journal may name one more file at its end, which SQLite deletes once it has followed the journal: a program that
    writes several databases at a time has these.
    """
    for file in (path.with_name(f"{path.name}-{part}") for part in ("wal", "shm", "journal")):
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            problem = "is no regular file, and SQLite would write there"
            raise LedgerError(str(file), problem, f"remove it, and {_RESTORE}")
    journal = path.with_name(f"{path.name}-journal")
    with suppress(OSError), open_regular(journal) as stream:
        if stream.read().endswith(_JOURNAL_MAGIC):
            problem = "names another file, which SQLite would delete"
            raise LedgerError(str(journal), problem, f"remove it, and {_RESTORE}")


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """The version of the schema; LedgerError where it is newer, or the file holds anything that no server makes."""
    schema = _schema(connection)
    if schema > SCHEMA:
        problem = f"was written by a newer Meerkat-MQ (schema {schema}, this one knows {SCHEMA})"
        raise LedgerError(str(path), problem, "update Meerkat-MQ on this machine")
    if schema < 1:
        raise LedgerError(str(path), f"is damaged (schema {schema})", _RESTORE)
    check_schema(connection, path, MIGRATIONS[:schema])
    return schema
