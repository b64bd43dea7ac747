"""The ledger on its own: what is kept comes back, groups are whole, and a file that is no ledger stays as it is."""

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import Coefficient, Entry
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger import sqlite_file
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.ledger.store import Sighting
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.server.run import prepare_run

IMPORTS = "import sys; from pathlib import Path; from meerkat_mq.ledger.sqlite import Ledger"
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
ENTRY = Entry(0, (Coefficient(0, 0, 0.5), Coefficient(1, 0, -(2.0**-20))), bytes(16), bytes(range(16)))


def record(node: str, slot: int, version: int = 0, **changes: Any) -> UpdateRecord:
    return replace(UpdateRecord(version, node, slot, 2**32 - 1, 2**24, (0.5, -3.0), 0.5), **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger.open(path)) as opened:
        yield opened


def begin(ledger: Ledger) -> None:
    run = prepare_run(ServerConfig(federation="f", state_dir=ledger.path.parent, engine="toy"))
    ledger.begin(run.descriptor, run.rules)
    ledger.take_term(0, "a" * 16, "here")
    for slot, node in enumerate(("node-b", "node-a")):
        ledger.commit_slot(node, slot, 0)


def round_(ledger: Ledger, version: int) -> tuple[UpdateRecord, ...]:
    records = tuple(record(node, slot, version) for slot, node in enumerate(("node-b", "node-a")))
    ledger.commit_updates(records)
    ledger.commit_entry(replace(ENTRY, version=version), records, 2, False)
    return records


def test_what_is_kept_comes_back_also_to_another_reader(ledger: Ledger, path: Path) -> None:
    begin(ledger)
    rounds = [round_(ledger, version) for version in range(5)]
    more = record("node-a", 1, 5, scalars=(2.0**-149,))
    ledger.commit_updates([more])
    ledger.commit_sightings(
        [Sighting("node-a", 7, "h", "online", 30, 10.0, 2, 100), Sighting("x", 1, "h", "lost", 0, 1.0)]
    )
    ledger.commit_sightings([Sighting("node-a", 7, "h", "lost", 30, 12.0, 1, 50)])
    ledger.commit_metrics(2, {"accuracy": 0.5, "loss": 1.5})
    for version in (2, 3, 4):
        ledger.keep_snapshot(version, bytes([version] * 16))
    with closing(Ledger.read(path)) as reader:
        for found in (ledger, reader):
            assert found.run == ledger.run is not None
            assert found.rules["rounds"]["aggregate"] == "clipped-mean"
            assert found.version == 5
            assert [entry.version for entry in found.entries(1, 3)] == [1, 2, 3]
            assert found.entries(4, 3) == (replace(ENTRY, version=4),)
            (closed,) = found.closed(4, 1)
            assert (closed.term, closed.asked, closed.overdue) == (1, 2, False)
            assert found.stretch(3) == (2, 2 * 54, 0)
            assert found.records(2) == rounds[2]
            assert found.past(2) == rounds[3:]
            assert found.past(99) == rounds
            assert found.open_updates() == (more,)
            assert found.slots() == {"node-b": 0, "node-a": 1}
            node = found.nodes()[1]
            assert (node.node, node.status, node.boot, node.rows) == ("node-a", "lost", 7, 30)
            assert (node.first_seen, node.last_seen, node.updates, node.packet_bytes) == (10.0, 12.0, 3, 150)
            assert found.nodes()[0].status is None
            assert [term.server_id for term in found.terms()] == ["a" * 16]
            assert [kept.version for kept in found.snapshots()] == [4, 3]
            assert found.metrics() == {2: {"accuracy": 0.5, "loss": 1.5}}


def test_a_group_is_kept_whole_or_not_at_all(ledger: Ledger, path: Path) -> None:
    begin(ledger)
    with closing(Ledger.read(path)) as reader:
        with ledger.group():
            round_(ledger, 0)
            assert reader.version == 0
        assert reader.version == 1
        with pytest.raises(KeyError):
            fail_in_a_group(ledger)
        assert (reader.version, ledger.version) == (1, 1)
        assert ledger.open_updates() == ()


def fail_in_a_group(ledger: Ledger) -> None:
    with ledger.group():
        round_(ledger, 1)
        raise KeyError


# --- files that are no ledger ---------------------------------------------------------------------------------------


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE run (id INTEGER); INSERT INTO run VALUES (1);")


def newer(path: Path) -> None:
    with closing(Ledger.open(path)) as opened:
        begin(opened)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def truncated(path: Path) -> None:
    with closing(Ledger.open(path)) as opened:
        begin(opened)
        with opened.group():
            for version in range(500):
                round_(opened, version)
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def scribbled(path: Path) -> None:
    truncated(path)
    data = bytearray(path.read_bytes())
    data[4096:12288] = bytes(8192)
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    with closing(Ledger.open(path)):
        pass
    os.truncate(path, 50)


BAD: list[tuple[Callable[[Path], object], str]] = [
    (foreign, "is a SQLite file of another program; name another state_dir"),
    (newer, r"was written by a newer Meerkat-MQ \(schema 99, this one knows 4\); update Meerkat-MQ"),
    (truncated, "is damaged .*restore it from a backup"),
    (scribbled, "is damaged .*restore it from a backup"),
    (cut_short, "is not a SQLite file"),
    (lambda path: path.write_bytes(b""), "is empty; restore it from a backup"),
    (lambda path: path.write_bytes(b"not a ledger" * 99), "is not a SQLite file; name another state_dir"),
    (lambda path: path.mkdir(), r"cannot be read \(Is a directory\)"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_a_file_that_is_no_ledger_is_named_and_stays_as_it_is(
    path: Path, make: Callable[[Path], object], words: str
) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(LedgerError, match=words) as caught:
        Ledger.open(path)
    assert caught.value.where == str(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(LedgerError, match=words):
        read_whole(path)
    assert (path.read_bytes() if path.is_file() else b"") == before


def read_whole(path: Path) -> None:
    """A reader need not look at every page before it has to read it."""
    with closing(Ledger.read(path)) as reader:
        for version in range(500):
            reader.entries(version, 1)
            reader.records(version)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE run SET descriptor = '{}'", r"holds a run that no server writes \(RunDescriptor.federation"),
        ("UPDATE run SET descriptor = x'00'", "holds a run that no server writes"),
        ("UPDATE run SET rules = 'zz'", "holds rules of a run that no server writes"),
        ("UPDATE run SET rules = '{}'", r"holds rules of a run that no server writes \(rounds: "),
        ("UPDATE run SET rules = '3'", "holds rules of a run that no server writes"),
        ("UPDATE entries SET closed = 'noon'", "holds an entry that no server writes .closed is 'noon'"),
        ("UPDATE entries SET closed = 9e999", "holds an entry that no server writes .closed is inf"),
        ("UPDATE entries SET entry = 'text'", "holds an entry that no server writes"),
        ("UPDATE nodes SET last_seen = 'noon'", "holds a node that no server writes .last_seen is 'noon'"),
        ("UPDATE nodes SET status = x'00'", "holds a node that no server writes"),
        ("UPDATE updates SET loss = 'low'", "holds in versions 0 to 0 an update that no server writes .loss is 'low'"),
        ("UPDATE updates SET weight = 'x'", "an update that no server writes .weight is 'x'"),
        ("UPDATE nodes SET slot = slot + 7", "an update that no server writes .no node has slot 0"),
        ("UPDATE terms SET taken = 'noon'", "holds a term that no server writes"),
        ("DROP TABLE updates", "is damaged .no such table: updates"),
    ],
)
def test_a_row_that_no_server_writes_is_an_error_in_words(path: Path, statement: str, words: str) -> None:
    with closing(Ledger.open(path)) as opened:
        begin(opened)
        round_(opened, 0)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)
    with pytest.raises(LedgerError, match=words) as caught, closing(Ledger.read(path)) as reader:
        read_all(reader)
    assert caught.value.where == str(path)
    assert "restore it from a backup" in caught.value.remedy


def read_all(reader: Ledger) -> list[object]:
    return [reader.run, reader.rules, reader.closed(0, 1), reader.nodes(), reader.records(0), reader.terms()]


def test_there_is_nothing_to_read_where_no_server_was(path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger; give the state_dir of a server that was started"):
        Ledger.read(path)
    assert not path.exists()


def test_an_older_schema_is_brought_up_to_date_in_one_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Ledger.open(path)) as opened:
        begin(opened)
        round_(opened, 0)
    with monkeypatch.context() as patched:
        migrations, newer = sqlite_file.MIGRATIONS, sqlite_file.SCHEMA + 1
        patched.setattr(sqlite_file, "SCHEMA", newer)
        patched.setattr(sqlite_file, "MIGRATIONS", [*migrations, "CREATE TABLE extra (x); SELECT nonsense"])
        with pytest.raises(LedgerError, match="no such column: nonsense"):
            Ledger.open(path)
        patched.setattr(sqlite_file, "MIGRATIONS", [*migrations, "CREATE TABLE extra (x)"])
        with closing(Ledger.open(path)) as opened:
            assert opened.version == 1
    with pytest.raises(LedgerError, match=rf"newer Meerkat-MQ \(schema {newer}, this one knows {newer - 1}\)"):
        Ledger.open(path)


# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_group_whole(ledger: Ledger) -> None:
    begin(ledger)
    round_(ledger, 0)
    (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
    ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerError, match=r"there is no space left .*free some, and start the server again"):
        fill(ledger)
    closed = ledger.version
    assert closed > 1
    assert len(ledger.records(closed - 1)) == 2
    assert ledger.open_updates() == ()


def fill(ledger: Ledger) -> None:
    for version in range(1, 10_000):
        with ledger.group():
            round_(ledger, version)


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_ledger_that_cannot_be_made_says_so_and_leaves_nothing(path: Path) -> None:
    script = f"{IMPORTS}; Ledger.open(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, path], preexec_fn=_limited, capture_output=True, text=True, check=False
    )
    assert "LedgerError" in done.stderr
    assert "cannot be made (File too large); free space" in done.stderr
    assert list(path.parent.iterdir()) == []


def mounts() -> bool:
    """Whether this user may mount a folder read-only for one process."""
    found = shutil.which("unshare")
    return found is not None and subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not mounts(), reason="this system lets no user mount a folder read-only for himself")
def test_a_read_only_folder_is_named_and_can_still_be_read(path: Path) -> None:
    with closing(Ledger.open(path)) as opened:
        begin(opened)
        round_(opened, 0)
    before = path.read_bytes()
    script = f"{IMPORTS}; path = Path(sys.argv[1]); print(Ledger.read(path).version); Ledger.open(path)"
    mount = f"mount --bind -o ro {path.parent} {path.parent} && exec {sys.executable} -c '{script}' {path}"
    done = subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
    assert "LedgerError" in done.stderr
    assert str(path) in done.stderr
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(not mounts(), reason="this system lets no user mount a file read-only for himself")
def test_a_ledger_that_cannot_be_written_is_noticed_when_it_is_opened(ledger: Ledger, path: Path) -> None:
    begin(ledger)
    files = " ".join(f"{path}{end}" for end in ("", "-wal", "-shm"))
    mount = f"for file in {files}; do mount --bind $file $file && mount -o remount,bind,ro $file; done"
    script = f"{IMPORTS}; Ledger.open(Path(sys.argv[1]))"
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", f"{mount}; exec {sys.executable} -c '{script}' {path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"LedgerError: {path}: cannot be written (attempt to write a readonly database)" in done.stderr


def test_ten_thousand_rounds_of_ten_nodes_take_less_than_ten_megabytes(path: Path) -> None:
    with closing(Ledger.open(path)) as opened:
        begin(opened)
        with opened.group():
            for version in range(10_000):
                records = [record(f"node-{slot}", slot, version, scalars=(0.5,)) for slot in range(10)]
                opened.commit_updates(records)
                opened.commit_entry(replace(ENTRY, version=version), records, 10, overdue=False)
    assert 3e6 < sum(file.stat().st_size for file in path.parent.iterdir()) <= 10e6


def said_by_sqlite(name: str, words: str = "words of SQLite") -> LedgerError:
    """What users read of an error of this name."""
    error = sqlite3.OperationalError(words)
    error.sqlite_errorname = name
    with pytest.raises(LedgerError) as caught, sqlite_file.in_words(Path("ledger.sqlite")):
        raise error
    return caught.value


NAMES = [name for name in dir(sqlite3) if name.startswith("SQLITE_")]
DAMAGE = ("SQLITE_CORRUPT", "SQLITE_ERROR")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SQLITE_PROTOCOL", "file system does not lock files .*local disk.*goes on where it was"),
        ("SQLITE_IOERR_LOCK", "file system does not lock files .*local disk"),
        ("SQLITE_IOERR_RDLOCK", "file system does not lock files .*local disk"),
        ("SQLITE_IOERR_SHMMAP", "file system does not lock files .*local disk"),
        ("SQLITE_BUSY", "is locked: another process .*or its file system has no locks.*local disk"),  # also ENOLCK
        ("SQLITE_BUSY_SNAPSHOT", "is locked"),
        ("SQLITE_IOERR_FSYNC", "cannot be read or written .*see to the disk"),
        ("SQLITE_IOERR_CORRUPTFS", "the file system is damaged"),
        ("SQLITE_IOERR_NOMEM", "not enough memory"),
        ("SQLITE_NOMEM", "not enough memory"),
        ("SQLITE_FULL", "no space left"),
        ("SQLITE_READONLY", "cannot be written .*let this user write"),
        ("SQLITE_READONLY_DBMOVED", "was moved or replaced while it was open"),
        ("SQLITE_CANTOPEN_ISDIR", "cannot be opened"),
        ("SQLITE_CORRUPT_VTAB", "is damaged .*keep it and its -wal file"),
        ("SQLITE_CONSTRAINT", "SQLite says why .words of SQLite.; leave the file as it is"),
        ("SQLITE_MISUSE", "leave the file as it is"),
    ],
)
def test_what_sqlite_says_has_its_true_cause_in_words(name: str, words: str) -> None:
    assert re.search(words, str(said_by_sqlite(name)))
    assert "words of SQLite" in str(said_by_sqlite(name))


def test_nothing_but_damage_is_called_damage_and_no_remedy_destroys() -> None:
    for name in NAMES:
        error = said_by_sqlite(name)
        if not name.startswith(DAMAGE):
            assert not error.problem.startswith("is damaged"), name
            assert "backup" not in error.remedy, name
        for word in ("remove", "delete", "overwrite"):
            assert word not in error.remedy, name
