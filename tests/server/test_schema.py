"""A ledger of schema 1 reads like one of the newest, is brought up to date when a server opens it, and goes on."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.errors import LedgerError, RunMismatch
from meerkat_mq.server import ledger_file
from meerkat_mq.server.inspect import run_shown
from meerkat_mq.server.ledger import LEDGER_FILE, Ledger
from meerkat_mq.server.verify import verify_folder, verify_ledger
from tests.server.ledgers import Writer, alter, close_all

KEPT = {
    "run": "id, run, created, descriptor, rules",
    "terms": "term, server_id, host, taken",
    "nodes": "node, slot, slot_version, boot, host, status, rows, first_seen, last_seen, updates, packet_bytes",
    "entries": "version, term, closed, asked, overdue, entry",
    "updates": "version, slot, boot, weight, scalars, loss, verdict",
}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


def without(text: str, *keys: str) -> str:
    """A JSON object as a server wrote it that did not know these keys, at any depth."""
    return json.dumps(json.loads(text, object_hook=lambda found: {k: v for k, v in found.items() if k not in keys}))


def in_schema_1(writer: Writer, folder: Path) -> Path:
    """The same ledger as a server of schema 1 would have left it."""
    folder.mkdir()
    with closing(sqlite3.connect(writer.folder / LEDGER_FILE)) as new, closing(
        sqlite3.connect(folder / LEDGER_FILE)
    ) as old, old:  # fmt: skip
        old.executescript(ledger_file.MIGRATIONS[0])
        for table, columns in KEPT.items():
            rows: list[list[Any]] = [list(row) for row in new.execute(f"SELECT {columns} FROM {table}")]
            if table == "run":
                rows[0][3] = without(rows[0][3], "perturbations")
                rows[0][4] = without(rows[0][4], "perturbations", "early_stopping")
            if rows:
                places = ", ".join("?" * len(rows[0]))
                old.executemany(f"INSERT INTO {table} ({columns}) VALUES ({places})", rows)
        old.execute(f"PRAGMA application_id = {ledger_file.APPLICATION_ID}")
        old.execute("PRAGMA user_version = 1")
    return folder


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    made = Writer(tmp_path / "new", count=6)
    for _ in range(3):
        made.round()
    made.see(0, "online", 5.0)
    return made


def test_the_script_of_schema_1_is_the_one_that_made_its_files() -> None:
    assert hashlib.sha256(ledger_file.MIGRATIONS[0].encode()).hexdigest() == (
        "863217ab1cdcdcb122df80c222a1b453cc418425444bdcab4015d6480ddc5809"
    )


def test_a_reader_changes_nothing(writer: Writer, tmp_path: Path) -> None:
    folder = in_schema_1(writer, tmp_path / "old")
    before = (folder / LEDGER_FILE).read_bytes()
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        assert ledger.rules["early_stopping"] == EarlyStoppingConfig().model_dump(mode="json")
        assert ledger.rules == writer.ledger.rules
        assert ledger.run == writer.ledger.run
        assert ledger.entries(0, 9) == tuple(writer.entries)
        assert [ledger.products(version, writer.settings) for version in range(4)] == [None] * 4
        assert (ledger.judgements(0), ledger.newest_judgements(), ledger.early_stopped_since()) == ((), (), {})
        assert [node.gradip for node in run_shown(ledger).nodes] == [None] * 3
    assert verify_folder(folder).rounds == 3
    assert (folder / LEDGER_FILE).read_bytes() == before


def go_on(writer: Writer, folder: Path) -> None:
    """A server of today opens the ledger, and the next rounds close."""
    writer.ledger.close()
    writer.ledger = Ledger.open(folder / LEDGER_FILE)
    writer.ledger.take_term(0, "6" * 16, "here")
    for _ in range(3):
        writer.round()


def test_a_server_migrates_it_and_goes_on(writer: Writer, tmp_path: Path) -> None:
    folder = in_schema_1(writer, tmp_path / "old")
    go_on(writer, folder)
    found = [writer.ledger.products(version, writer.settings) for version in range(6)]
    assert found == [None] * 3 + [writer.products(version) for version in (3, 4, 5)]
    assert writer.ledger.nodes()[0].last_seen == 5.0
    assert verify_ledger(writer.ledger, writer.mask).rounds == 6
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (ledger_file.SCHEMA,)


def test_what_a_server_of_today_kept_must_not_get_lost(writer: Writer, tmp_path: Path) -> None:
    folder = in_schema_1(writer, tmp_path / "old")
    go_on(writer, folder)
    writer.ledger.close()
    alter(folder, "UPDATE entries SET products = NULL WHERE version = 4")
    with pytest.raises(RunMismatch, match="entry 4: it has no products; the mask gives those of 1"):
        verify_folder(folder)


def test_a_damaged_ledger_of_schema_1_is_an_error_in_words(writer: Writer, tmp_path: Path) -> None:
    folder = in_schema_1(writer, tmp_path / "old")
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection, connection:
        connection.execute("ALTER TABLE entries RENAME TO others")
    with pytest.raises(LedgerError, match=r"is damaged .no such table: .*entries"):
        verify_folder(folder)
    with pytest.raises(LedgerError, match=r"is damaged .no such table: entries"):
        Ledger.open(folder / LEDGER_FILE)
