"""A ledger of an older schema reads like a new one, is brought up to date when a server opens it, and goes on."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.errors import LedgerError, RunMismatch
from meerkat_mq.ledger import sqlite_file
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.inspect import run_shown
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.verify import verify_ledger
from tests.ledger.ledgers import Writer, alter

KEPT = {
    "run": "id, run, created, descriptor, rules",
    "terms": "term, server_id, host, taken",
    "nodes": "node, slot, slot_version, boot, host, status, rows, first_seen, last_seen, updates, packet_bytes",
    "entries": "version, term, closed, asked, overdue, entry",
    "updates": "version, slot, boot, weight, scalars, loss, verdict",
}
KEPT_2 = KEPT | {
    "entries": f"{KEPT['entries']}, products",
    "judgements": "version, slot, rho_later, rho_quiet, early_stopped",
}
SINCE_SCHEMA_3 = ("mode", "buffer_size", "max_staleness", "staleness", "staleness_exponent", "values")


def without(text: str, *keys: str) -> str:
    """A JSON object as a server wrote it that did not know these keys, at any depth."""
    return json.dumps(json.loads(text, object_hook=lambda found: {k: v for k, v in found.items() if k not in keys}))


def in_schema_1(writer: Writer, folder: Path) -> Path:
    """The same ledger as a server of schema 1 would have left it."""
    return in_schema(1, KEPT, ("perturbations", *SINCE_SCHEMA_3), ("early_stopping",), writer, folder)


def in_schema_2(writer: Writer, folder: Path) -> Path:
    return in_schema(2, KEPT_2, SINCE_SCHEMA_3, (), writer, folder)


def in_schema(
    schema: int, kept: Mapping[str, str], newer: Sequence[str], newer_rules: Sequence[str], writer: Writer, folder: Path
) -> Path:
    """The ledger without what is newer than a schema: of tables all but some columns, of the run some keys."""
    folder.mkdir()
    with closing(sqlite3.connect(writer.folder / LEDGER_FILE)) as new, closing(
        sqlite3.connect(folder / LEDGER_FILE)
    ) as old, old:  # fmt: skip
        for script in sqlite_file.MIGRATIONS[:schema]:
            old.executescript(script)
        for table, columns in kept.items():
            rows: list[list[Any]] = [list(row) for row in new.execute(f"SELECT {columns} FROM {table}")]
            if table == "run":
                rows[0][3] = without(rows[0][3], *newer)
                rows[0][4] = without(rows[0][4], *newer, *newer_rules)
            if rows:
                places = ", ".join("?" * len(rows[0]))
                old.executemany(f"INSERT INTO {table} ({columns}) VALUES ({places})", rows)
        old.execute(f"PRAGMA application_id = {sqlite_file.APPLICATION_ID}")
        old.execute(f"PRAGMA user_version = {schema}")
    return folder


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    made = Writer(tmp_path / "new", count=6)
    for _ in range(3):
        made.round()
    made.see(0, "online", 5.0)
    return made


def test_the_scripts_of_older_schemas_are_those_that_made_their_files() -> None:
    assert [hashlib.sha256(script.encode()).hexdigest() for script in sqlite_file.MIGRATIONS[:2]] == [
        "863217ab1cdcdcb122df80c222a1b453cc418425444bdcab4015d6480ddc5809",
        "ab26209c7e420e297ee30bcca0c7cd043b5a361e06e4653e836dda9929976de3",
    ]


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
        assert connection.execute("PRAGMA user_version").fetchone() == (sqlite_file.SCHEMA,)


def test_what_a_server_of_today_kept_must_not_get_lost(writer: Writer, tmp_path: Path) -> None:
    folder = in_schema_1(writer, tmp_path / "old")
    go_on(writer, folder)
    writer.ledger.close()
    alter(folder, "UPDATE entries SET products = NULL WHERE version = 4")
    with pytest.raises(RunMismatch, match="entry 4: it has no products; the mask gives those of 1"):
        verify_folder(folder)


def test_a_ledger_of_schema_2_reads_and_goes_on_with_what_its_open_round_heard(writer: Writer, tmp_path: Path) -> None:
    heard = writer.hear()
    folder = in_schema_2(writer, tmp_path / "old")
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        assert ledger.rules == writer.ledger.rules
        assert ledger.run == writer.ledger.run
        assert [ledger.records(version) for version in range(4)] == [
            writer.records(version) for version in range(3)
        ] + [()]
        assert (ledger.open_updates(), ledger.heard()) == (heard, {"n0": 3, "n1": 3, "n2": 3})
        assert [ledger.products(version, writer.settings) for version in range(3)] == [
            writer.products(version) for version in range(3)
        ]
        assert (ledger.stretch(0)[2], ledger.displacement(bytes(16))) == (0, None)
        assert {entry - record.version for entry, record in ledger.updates_of(0, 9)} == {0}
    assert verify_folder(folder).rounds == 3
    writer.ledger.close()
    writer.ledger = Ledger.open(folder / LEDGER_FILE)
    assert writer.ledger.open_updates() == heard
    writer.ledger.commit_entry(replace(writer.entries[2], version=3, previous=writer.head), heard, 3, overdue=False)
    assert (writer.ledger.records(3), writer.ledger.records(2)) == (heard, writer.records(2))


def test_a_damaged_ledger_of_schema_1_is_an_error_in_words(writer: Writer, tmp_path: Path) -> None:
    folder = in_schema_1(writer, tmp_path / "old")
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection, connection:
        connection.execute("ALTER TABLE entries RENAME TO others")
    with pytest.raises(LedgerError, match=r"is damaged .no such table: .*entries"):
        verify_folder(folder)
    with pytest.raises(LedgerError, match=r"is damaged .no such table: entries"):
        Ledger.open(folder / LEDGER_FILE)
