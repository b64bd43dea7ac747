"""The ledger's own chain: H18, and its kinds. What stays is not altered without `verify` naming it, names above all."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.errors import AnotherServer, RunError, RunMismatch
from meerkat_mq.ledger.chain import check_chain
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.store import Sighting, Store
from meerkat_mq.worlds.ledger import MemoryLedger
from tests.ledger.ledgers import Writer, alter, close_all
from tests.ledger.stores import InMemory, Kept, begin, close, round_, update
from tests.ledger.test_schema import in_schema_1, in_schema_2
from tests.support.command import Meerkat

# --- both stores ---


def test_what_is_committed_is_linked(kept: Kept) -> None:
    store = kept.open()
    begin(store)
    round_(store)
    store.commit_metrics(1, {"accuracy": 0.5})
    store.commit_metrics(1, {"accuracy": 0.6, "loss": 1.0})
    store.commit_metrics(1, {})
    assert store.chain is not None
    links = store.chain.links(0, 99)
    assert [number for number, _ in links] == list(range(8))
    slots = [("slot", 0), ("slot", 1), ("slot", 2)]
    things = [("run", 1), ("term", 1), *slots, ("entry", 0), ("metrics", 1), ("metrics", 1)]
    assert [(link.kind, link.number) for _, link in links] == things
    assert check_chain(store.chain) == links[-1][1].hash
    assert list(store.chain.links(3, 2)) == [*links[3:5]]


def test_news_of_nodes_and_snapshots_are_not_linked(store: Store) -> None:
    round_(store)
    assert store.chain is not None
    before = check_chain(store.chain)
    store.commit_sightings([Sighting("n0", 7, "there", "online", 50, 5.0, 3, 264)])
    store.keep_snapshot(1, b"snapshot")
    assert check_chain(store.chain) == before


def test_a_group_that_fails_leaves_no_link(store: Store) -> None:
    assert store.chain is not None
    before = check_chain(store.chain)

    def fails() -> None:
        with store.group():
            store.commit_slot("n9", 9, 0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert check_chain(store.chain) == before


def test_a_server_that_is_outdated_adds_no_link(kept: Kept) -> None:
    first = kept.open()
    begin(first)
    second = kept.open()
    second.take_term(0, "b" * 16, "there")
    with pytest.raises(AnotherServer):
        first.commit_slot("n9", 9, 0)
    round_(second)
    assert second.chain is not None
    assert [link.kind for _, link in second.chain.links(0, 99)][-2:] == ["term", "entry"]
    check_chain(second.chain)


def test_an_update_of_an_older_theta_is_in_its_entry_s_link(kept: Kept) -> None:
    store = kept.open()
    begin(store, window=2)
    old = update(0, 1)
    store.commit_updates([old])
    round_2 = update(0, 0)
    store.commit_updates([round_2])
    close(store, round_2)
    close(store, old)
    assert store.chain is not None
    check_chain(store.chain)
    kept.alter_update(0, 1, 9.0, 1)
    with pytest.raises(RunMismatch, match="entry 1: is not as it was committed"):
        check_chain(store.chain)


def renamed(ledger: MemoryLedger) -> None:
    ledger.slots[1], ledger.nodes["mallory"] = "mallory", replace(ledger.nodes["n1"], node="mallory")


def of_an_update(ledger: MemoryLedger, **changes: Any) -> None:
    entry, record = ledger.updates[0][1]
    ledger.updates[0][1] = entry, replace(record, **changes)


def lost_link(ledger: MemoryLedger) -> None:
    del ledger.chain[3]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (renamed, "slot 1"),
        (lambda ledger: of_an_update(ledger, node="mallory"), "entry 0"),
        (lambda ledger: of_an_update(ledger, boot=8), "entry 0"),
        (lambda ledger: ledger.terms.update({1: replace(ledger.terms[1], host="elsewhere")}), "term 1"),
        (lambda ledger: ledger.entries.update({0: replace(ledger.entries[0], closed=1.0)}), "entry 0"),
        (lambda ledger: ledger.metrics.update({1: {"accuracy": 0.99}}), "metrics 1"),
        (lambda ledger: ledger.metrics.update({9: {"accuracy": 0.99}}), "metrics 9"),
        (lost_link, "link 3"),
    ],
)
def test_what_is_altered_in_memory_is_named(change: Callable[[MemoryLedger], Any], where: str) -> None:
    kept = InMemory()
    store = kept.open()
    begin(store)
    round_(store)
    store.commit_metrics(1, {"accuracy": 0.5})
    check_chain(store.chain)
    change(kept.ledger)
    with pytest.raises(RunMismatch) as caught:
        check_chain(store.chain)
    assert caught.value.where == where


# --- the file ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rounds of four nodes, the first of which calibrates; evaluated twice."""
    early = EarlyStoppingConfig(by="random", steps=1, calibration_steps=8, random_share=0.5)
    writer = Writer(tmp_path, nodes=4, steps=4, count=3, early_stopping=early)
    for _ in range(3):
        writer.round()
    writer.ledger.commit_metrics(0, {"accuracy": 0.5, "loss": 1.0})
    writer.ledger.commit_metrics(3, {"accuracy": 0.6})
    writer.ledger.commit_metrics(3, {"accuracy": 0.7})
    writer.see(0, "online", 5.0)
    close_all()
    return tmp_path


ALTERATIONS = {
    "a contributor's name": ("UPDATE nodes SET node = 'mallory' WHERE slot = 2", "slot 2"),
    "when a slot was given": ("UPDATE nodes SET slot_version = 2 WHERE slot = 2", "slot 2"),
    "a boot": ("UPDATE updates SET boot = 8 WHERE version = 1 AND slot = 0", "entry 1"),
    "a loss": ("UPDATE updates SET loss = loss + 0.5 WHERE version = 1 AND slot = 0", "entry 1"),
    "a host": ("UPDATE terms SET host = 'elsewhere'", "term 1"),
    "a server": ("UPDATE terms SET server_id = 'f'", "term 1"),
    "a time": ("UPDATE entries SET closed = closed - 3600 WHERE version = 2", "entry 2"),
    "how many were asked": ("UPDATE entries SET asked = 9 WHERE version = 2", "entry 2"),
    "a deadline": ("UPDATE entries SET overdue = 1 WHERE version = 2", "entry 2"),
    "an accuracy": ("UPDATE metrics SET value = 0.99 WHERE version = 3", "metrics 3"),
    "a metric that is gone": ("DELETE FROM metrics WHERE version = 0 AND name = 'loss'", "metrics 0"),
    "an evaluation that is gone": ("DELETE FROM metrics WHERE version = 0", "metrics 0"),
    "an evaluation that never was": ("INSERT INTO metrics VALUES (2, 'accuracy', 0.99)", "metrics 2"),
    "a node that never was": ("INSERT INTO nodes (node, slot, slot_version) VALUES ('mallory', 9, 0)", "slot 9"),
    "a term that never was": ("INSERT INTO terms VALUES (2, 'ffff', 'elsewhere', 1.0)", "term 2"),
    "the federation": ("UPDATE run SET descriptor = replace(descriptor, '\"f\"', '\"g\"')", "run 1"),
    "when it was begun": ("UPDATE run SET created = created - 86400", "run 1"),
    "a link that is gone": ("DELETE FROM chain WHERE link = 2", "link 2"),
    "the newest link": ("DELETE FROM chain WHERE link = (SELECT MAX(link) FROM chain)", "metrics 3"),
    "all links": ("DELETE FROM chain", "run 1"),
    "a link's hash": ("UPDATE chain SET hash = zeroblob(16) WHERE link = 4", "link 4"),
    "a link's content": ("UPDATE chain SET content = zeroblob(16) WHERE link = 4", "link 4"),
    "a link's kind": ("UPDATE chain SET kind = 'nothing' WHERE link = 4", "link 4"),
    "another type of the same number": ("UPDATE updates SET loss = 1 WHERE version = 1 AND slot = 0", "entry 1"),
}


def test_a_ledger_as_it_was_written(folder: Path, meerkat: Meerkat) -> None:
    found = verify_folder(folder)
    assert found.chain is not None
    assert f", chain {found.chain.hex()}, " in meerkat("verify", folder).out
    alter(folder, "UPDATE nodes SET host = 'moved', status = 'stopped', last_seen = 9.0 WHERE slot = 0")
    assert verify_folder(folder).chain == found.chain


@pytest.mark.parametrize("what", ALTERATIONS)
def test_what_is_altered_is_named(folder: Path, what: str) -> None:
    """H18: a contributor's name was changed, and `verify` passed."""
    statement, where = ALTERATIONS[what]
    alter(folder, statement)
    with pytest.raises(RunMismatch) as caught:
        verify_folder(folder)
    assert caught.value.where == where
    assert caught.value.remedy
    assert caught.value.exit_code == 6


def test_a_name_that_a_server_altered_meanwhile_is_still_named(folder: Path) -> None:
    """A server that resumes goes on with the name that it finds, and adds links: the old one still tells."""
    alter(folder, "UPDATE nodes SET node = 'mallory' WHERE slot = 2")
    with closing(Ledger.open(folder / LEDGER_FILE)) as ledger:
        ledger.take_term(0, "9" * 16, "here")
        ledger.commit_slot("n9", 9, 3)
    with pytest.raises(RunMismatch, match="slot 2: is not as it was committed: the name of its node was altered"):
        verify_folder(folder)


@pytest.mark.parametrize("what", ["number = 'x'", "content = 'x'", "kind = 3", "link = 99"])
def test_rows_of_the_chain_that_no_server_writes(folder: Path, what: str) -> None:
    alter(folder, f"UPDATE chain SET {what} WHERE link = 1")
    with pytest.raises(RunError, match=r"holds a link that no server writes|link 1: is missing"):
        verify_folder(folder)


def test_two_nodes_whose_names_were_exchanged(folder: Path) -> None:
    for before, after in (("n1", ""), ("n2", "n1"), ("", "n2")):
        alter(folder, "UPDATE nodes SET node = ? WHERE node = ?", after, before)
    with pytest.raises(RunMismatch, match="slot 1: is not as it was committed"):
        verify_folder(folder)


# --- older ledgers ---


@pytest.mark.parametrize("in_schema", [in_schema_1, in_schema_2])
def test_an_older_ledger_verifies_as_before_and_is_linked_when_a_server_opens_it(
    tmp_path: Path, in_schema: Callable[[Writer, Path], Path], meerkat: Meerkat
) -> None:
    writer = Writer(tmp_path / "new", count=6)
    for _ in range(3):
        writer.round()
    folder = in_schema(writer, tmp_path / "old")
    assert (verify_folder(folder).rounds, verify_folder(folder).chain) == (3, None)
    assert "no chain: names and times were not compared" in meerkat("verify", folder).out
    history = rows_of(folder)
    Ledger.open(folder / LEDGER_FILE).close()
    assert rows_of(folder) == history
    assert verify_folder(folder).chain is not None
    alter(folder, "UPDATE nodes SET node = 'mallory' WHERE slot = 2")
    with pytest.raises(RunMismatch, match="slot 2: is not as it was committed"):
        verify_folder(folder)


def rows_of(folder: Path) -> list[object]:
    columns = {
        "run": "*", "terms": "*", "nodes": "*", "entries": "version, term, closed, asked, overdue, entry",
        "updates": "version, slot, boot, weight, scalars, loss, verdict",
    }  # fmt: skip
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        return [connection.execute(f"SELECT {what} FROM {table}").fetchall() for table, what in columns.items()]


def test_a_damaged_older_ledger_is_linked_as_it_is(tmp_path: Path) -> None:
    """A server goes on from a snapshot after a damaged entry; `verify` still names the entry."""
    writer = Writer(tmp_path / "new", count=6)
    for _ in range(3):
        writer.round()
    folder = in_schema_2(writer, tmp_path / "old")
    alter(folder, "UPDATE entries SET entry = 'text' WHERE version = 1")
    Ledger.open(folder / LEDGER_FILE).close()
    with pytest.raises(RunMismatch) as caught:
        verify_folder(folder)
    assert caught.value.where == "entry 1"


def test_the_bytes_of_a_link(folder: Path) -> None:
    """So that anybody can recompute a chain: docs/ledger.md."""
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        kind, number, content, found = connection.execute(
            "SELECT kind, number, content, hash FROM chain WHERE link = 0"
        ).fetchone()
        run, *others = connection.execute("SELECT run, created, descriptor, rules FROM run").fetchone()
    rows = json.dumps([[[{"hex": run.hex()}, *others]]])
    assert content == hashlib.sha256(rows.encode()).digest()[:16]
    linked = bytes(16) + kind.encode() + number.to_bytes(8, "little") + content
    assert found == hashlib.sha256(linked).digest()[:16]
