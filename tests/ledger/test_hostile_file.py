"""A ledger's file may come from anybody: H17, and its kinds. It is refused in a line, and nothing of it runs."""

import os
import sqlite3
import struct
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger import sqlite, sqlite_guard
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.server.reporting import read_report
from tests.ledger.ledgers import Writer, write
from tests.support.command import Meerkat

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT"
TOOLS = ("status", "ledger", "verify", "report")  # that only read
SOON_S = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, nodes=3, count=6)
    return tmp_path


def script(folder: Path, words: str) -> None:
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        connection.executescript(words)


def in_the_place_of(table: str, columns: str) -> str:
    return f"ALTER TABLE {table} RENAME TO other; CREATE VIEW {table} AS {ENDLESS} {columns} FROM n;"


RUN = "1 AS id, x'00' AS run, 0.0 AS created, '' AS descriptor, '' AS rules"
HOSTILE = {
    "an endless run": (in_the_place_of("run", RUN), "holds a view 'run'"),
    "endless terms": (in_the_place_of("terms", "x AS term, '' AS server_id, '' AS host, 0.0 AS taken"), "view 'terms'"),
    "another endless view": (f"CREATE VIEW beside AS {ENDLESS} x FROM n;", "holds a view 'beside'"),
    "a trigger that deletes": (
        "CREATE TRIGGER gone AFTER INSERT ON terms BEGIN DELETE FROM updates; END;", "holds a trigger 'gone'"
    ),
    "a trigger in place of a write": (
        """ALTER TABLE metrics RENAME TO other; CREATE VIEW metrics AS SELECT * FROM other;
        CREATE TRIGGER instead INSTEAD OF INSERT ON metrics BEGIN SELECT RAISE(ROLLBACK, 'no'); END;""",
        "holds a trigger 'instead'",
    ),
    "an index on an expression": (
        "CREATE INDEX costly ON updates (hex(scalars));", "holds a index 'costly'"
    ),
    "a generated column": (
        "ALTER TABLE nodes ADD COLUMN more TEXT AS (hex(zeroblob(100000000)));", "holds a table 'nodes' that no server"
    ),
    "another column": ("ALTER TABLE updates ADD COLUMN more INTEGER DEFAULT 3;", "holds a table 'updates' that no"),
    "a check": (
        """DROP TABLE metrics; CREATE TABLE metrics (version INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL
        CHECK (value < hex(randomblob(9))), PRIMARY KEY (version, name)) WITHOUT ROWID;""",
        "holds a table 'metrics' that no server makes",
    ),
    "a virtual table": ("CREATE VIRTUAL TABLE found USING fts5(text);", "holds a table 'found"),
    "one more table": ("CREATE TABLE more (x);", "holds a table 'more', which no server makes"),
    "a name that steers a terminal": ('CREATE VIEW "\x1b[2Jrun" AS SELECT 1;', "holds a view"),
    "a schema below the first": ("PRAGMA user_version = -1;", r"is damaged .schema -1."),
    "a schema of none": ("PRAGMA user_version = 0;", r"is damaged .schema 0."),
    "an older schema than its tables": ("PRAGMA user_version = 1;", "which no server makes"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_schema_that_no_server_makes(folder: Path, what: str) -> None:
    """H17: `status` hung; a trigger deleted all updates in the server's own transaction."""
    words, said = HOSTILE[what]
    script(folder, words)
    before, began = (folder / LEDGER_FILE).read_bytes(), time.monotonic()
    for look in (Ledger.read, Ledger.open):
        with pytest.raises(LedgerError, match=said) as caught:
            look(folder / LEDGER_FILE)
        assert caught.value.remedy
        assert str(caught.value).isprintable()
    assert (folder / LEDGER_FILE).read_bytes() == before
    assert time.monotonic() - began < SOON_S


def test_a_schema_that_sqlite_quotes_and_that_is_no_text(folder: Path) -> None:
    """Found by fuzzing pages: SQLite's message holds the bytes, and Python cannot decode it."""
    script(folder, "PRAGMA journal_mode = DELETE;")
    file = folder / LEDGER_FILE
    file.write_bytes(file.read_bytes().replace(b"CREATE TABLE metrics", b"CREATE \xe1\x28\xa1LE metrics"))
    for look in (Ledger.read, Ledger.open):
        with pytest.raises(LedgerError, match="is damaged"):
            look(file)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_that_reads_ends_in_a_line(folder: Path, tool: str, meerkat: Meerkat) -> None:
    script(folder, in_the_place_of("run", RUN))
    began = time.monotonic()
    meerkat(tool, folder).failed(6, "ledger.sqlite: holds a view 'run', which no server makes")
    assert time.monotonic() - began < SOON_S


def test_statistics_that_a_person_asked_for_do_no_harm(folder: Path) -> None:
    script(folder, "ANALYZE;")
    assert verify_folder(folder).rounds == 6
    Ledger.open(folder / LEDGER_FILE).close()


def test_what_sqlite_is_told(folder: Path) -> None:
    for ledger in (Ledger.read(folder / LEDGER_FILE), Ledger.open(folder / LEDGER_FILE)):
        with closing(ledger):
            connection = ledger._connection
            found = [
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("trusted_schema", "cell_size_check")
            ]
            assert found == [0, 1]
            assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) < 1 << 29
            assert connection.getlimit(sqlite3.SQLITE_LIMIT_ATTACHED) == 0


# --- pages that name each other ---


def tangled(folder: Path) -> None:
    """Make `metrics` a tree of many levels, of whose inner pages each names the one below it again and again."""
    file = folder / LEDGER_FILE
    script(folder, "PRAGMA journal_mode = DELETE;")
    with closing(sqlite3.connect(file)) as connection:
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'terms'").fetchone()
    data = bytearray(file.read_bytes())
    leaf = bytes(data[(root - 1) * size : root * size])
    levels, children = 12, 12
    chain = [root, *range(pages + 1, pages + levels + 1)]  # each names the next; the last is the leaf
    for number, below in pairwise(chain):
        page = bytearray(size)
        cells = [below.to_bytes(4, "big") + bytes([1])] * children
        at = size
        for index, cell in enumerate(cells):
            at -= len(cell)
            page[at : at + len(cell)] = cell
            page[12 + 2 * index : 14 + 2 * index] = at.to_bytes(2, "big")
        page[0] = 5  # an inner page of a table
        page[3:5], page[5:7], page[8:12] = children.to_bytes(2, "big"), at.to_bytes(2, "big"), below.to_bytes(4, "big")
        data[(number - 1) * size : number * size] = page
    data[(chain[-1] - 1) * size :] = leaf
    data[28:32] = chain[-1].to_bytes(4, "big")
    file.write_bytes(data)


def test_pages_that_name_a_page_again_and_again(folder: Path, meerkat: Meerkat) -> None:
    """A file of 100 KB whose `terms` have 10^12 rows: nothing of a schema shows that."""
    tangled(folder)
    began = time.monotonic()
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger, pytest.raises(LedgerError) as caught:
        ledger.terms()
    assert "more" in caught.value.problem
    with pytest.raises(LedgerError):
        Ledger.open(folder / LEDGER_FILE)
    for tool in ("status", "report"):
        meerkat(tool, folder).failed(6)
    assert time.monotonic() - began < SOON_S


def test_more_rows_than_any_question_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "MOST_ROWS", 5)
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        assert len(ledger.nodes()) == 3
        with pytest.raises(LedgerError, match="answers a question with more than 5 rows"):
            ledger.updates(0, 9)


def test_a_value_that_is_larger_than_any(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(folder, "UPDATE nodes SET host = hex(zeroblob(600000));")
    monkeypatch.setitem(sqlite_guard._LIMITS, sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
    with (
        closing(Ledger.read(folder / LEDGER_FILE)) as ledger,
        pytest.raises(LedgerError, match="holds a value that is"),
    ):
        ledger.nodes()


def test_a_long_ledger_is_within_its_steps(tmp_path: Path) -> None:
    """What its size warrants is far more than any question takes."""
    writer = Writer(tmp_path, nodes=10, count=60)
    for _ in range(60):
        writer.round()
    writer.ledger.checkpoint()
    steps = [0]

    def count() -> bool:
        steps[0] += 100
        return False

    with closing(Ledger.read(tmp_path / LEDGER_FILE)) as ledger:
        ledger._connection.set_progress_handler(count, 100)
        for look in (ledger.astray, lambda: ledger.stretch(0), lambda: ledger.updates_of(0, 99)):
            steps[0] = 0
            look()
            assert steps[0] < sqlite_guard._A_BYTE * (tmp_path / LEDGER_FILE).stat().st_size / 4


# --- what lies in the folder ---


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def a_link_to_zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [a_pipe, a_link_to_zeros, Path.mkdir])
def test_a_ledger_that_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / LEDGER_FILE)
    for look in (Ledger.read, Ledger.open):
        with pytest.raises(LedgerError, match=r"cannot be read \((it is no regular file|Is a directory)\)"):
            look(tmp_path / LEDGER_FILE)


@pytest.mark.parametrize("part", ["wal", "shm", "journal"])
def test_files_of_sqlite_that_lead_elsewhere(folder: Path, part: str) -> None:
    """SQLite would write its own into what they lead to, for readers too."""
    victim = folder / "victim"
    victim.write_bytes(b"kept" * 100)
    for make in (lambda file: file.symlink_to(victim), a_pipe):
        file = folder / f"{LEDGER_FILE}-{part}"
        file.unlink(missing_ok=True)
        make(file)
        for look in (Ledger.read, Ledger.open):
            with pytest.raises(LedgerError, match=f"-{part}: is no regular file, and SQLite would write there"):
                look(folder / LEDGER_FILE)
    assert victim.read_bytes() == b"kept" * 100


def test_a_journal_that_has_sqlite_delete_another_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """SQLite follows such a journal whenever somebody opens the database to write: `sqlite3 ledger.sqlite .tables`."""
    victim = tmp_path_factory.mktemp("home") / "victim"
    victim.write_text("kept")
    page, name = (folder / LEDGER_FILE).read_bytes()[:4096], str(victim).encode()
    magic, count = bytes.fromhex("d9d505f920a163d7"), (folder / LEDGER_FILE).stat().st_size // 4096
    head = (magic + struct.pack(">IIIII", 1, 1, count, 512, 4096)).ljust(512, b"\0")
    checksum = (1 + sum(page[at] for at in range(4096 - 200, 0, -200))) % 2**32
    end = struct.pack(">I", 2**30 // 4096 + 1) + name + struct.pack(">II", len(name), sum(name)) + magic
    journal = folder / f"{LEDGER_FILE}-journal"
    journal.write_bytes(head + struct.pack(">I", 1) + page + struct.pack(">I", checksum) + end)
    for look in (Ledger.read, Ledger.open):
        with pytest.raises(LedgerError, match="-journal: names another file, which SQLite would delete"):
            look(folder / LEDGER_FILE)
    assert victim.exists()
    script(folder, "UPDATE nodes SET host = ''")
    assert not victim.exists()  # that is what SQLite does of itself


@pytest.mark.parametrize("column", ["rules", "descriptor"])
def test_a_description_that_is_nested_without_end(folder: Path, column: str) -> None:
    script(folder, f"UPDATE run SET {column} = replace(hex(zeroblob(20000)), '0', '[')")
    for look in (verify_folder, read_report):
        with pytest.raises(LedgerError, match=r"holds .* that no server writes"):
            look(folder)


def test_a_ledger_that_is_linked_to_another_disk(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A person's own link is fine; SQLite's files are beside what it leads to."""
    moved = tmp_path_factory.mktemp("disk") / LEDGER_FILE
    (folder / LEDGER_FILE).rename(moved)
    (folder / LEDGER_FILE).symlink_to(moved)
    assert verify_folder(folder).rounds == 6


@pytest.mark.parametrize("make", [a_pipe, a_link_to_zeros])
@pytest.mark.parametrize("name", ["snapshot-6.mks", "difference.mkd", "facts.json"])
def test_files_beside_the_ledger_that_are_none(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    """Neither waited for nor read without end."""
    script(folder, "INSERT INTO snapshots VALUES (6, x'00', 10);")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    began = time.monotonic()
    for look in (verify_folder, read_report):
        try:
            look(folder)
        except Exception as error:
            assert "it is no regular file" in str(error)  # noqa: PT017 - one of them may not look at it
    assert time.monotonic() - began < SOON_S
