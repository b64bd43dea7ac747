"""What the ledger keeps of virtual paths: with the entry or not at all, and back as it was given."""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.recovery import resumed
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.sqlite_rows import pack_products, unpack_products
from meerkat_mq.rounds.records import Judgement
from tests.ledger.ledgers import Writer, alter, close_all
from tests.ledger.test_ledger import ENTRY, begin, record
from tests.rounds.support import settings

RULES = settings(lanes=2, steps=2)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger.open(tmp_path / LEDGER_FILE)) as opened:
        begin(opened)
        yield opened
    close_all()


def judged(version: int, *stopped: bool) -> tuple[Judgement, ...]:
    """Of node-b (slot 0) and node-a (slot 1)."""
    return tuple(
        Judgement(version, node, 1.5 + version, 0.25, early)
        for node, early in zip(("node-b", "node-a"), stopped, strict=False)
    )


def close(ledger: Ledger, version: int, *stopped: bool) -> None:
    records = [record(node, slot, version) for slot, node in enumerate(("node-b", "node-a"))]
    ledger.commit_updates(records)
    products = ((0.5, -1.5), (2.0**-149, float(version)))
    entry = replace(ENTRY, version=version)
    ledger.commit_entry(entry, records, 2, overdue=False, products=products, judgements=judged(version, *stopped))


def test_what_is_kept_comes_back(ledger: Ledger) -> None:
    close(ledger, 0, True, False)
    close(ledger, 1)
    close(ledger, 2, True)
    with closing(Ledger.read(ledger.path)) as reader:
        for found in (ledger, reader):
            assert found.products(1, RULES) == ((0.5, -1.5), (2.0**-149, 1.0))
            assert found.products(3, RULES) is None
            assert [found.judgements(version) for version in range(3)] == [judged(0, True, False), (), judged(2, True)]
            assert found.newest_judgements() == (*judged(2, True), judged(0, True, False)[1])
            assert found.early_stopped_since() == {"node-b": 0}


@pytest.mark.parametrize("ratio", [math.inf, 5e-324, 1e308])
def test_any_ratio_comes_back(ledger: Ledger, ratio: float) -> None:
    found = replace(judged(0, True)[0], rho_later=ratio)
    updates = [record("node-b", 0)]
    ledger.commit_updates(updates)
    ledger.commit_entry(ENTRY, updates, 1, overdue=False, judgements=[found])
    assert ledger.judgements(0) == (found,)


@given(lanes=st.integers(1, 4), steps=st.integers(0, 5), data=st.data())
def test_products_come_back(lanes: int, steps: int, data: st.DataObject) -> None:
    lane = st.tuples(*[st.floats(width=32, allow_nan=False)] * steps)
    products = data.draw(st.tuples(*[lane] * lanes))
    assert unpack_products(pack_products(products), lanes, steps) == (products if steps else ())


def test_entry_products_and_judgements_are_kept_together_or_not_at_all(ledger: Ledger) -> None:
    close(ledger, 0, True, True)
    ledger._connection.execute("CREATE TRIGGER t BEFORE INSERT ON judgements BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(LedgerError, match="no"):
        close(ledger, 1, True, True)
    assert (ledger.version, ledger.products(1, RULES), ledger.judgements(1)) == (1, None, ())


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE judgements SET version = 'x'", "holds a judgement that no server writes .version is 'x'"),
        ("UPDATE judgements SET early_stopped = 2", "holds a judgement that no server writes .early_stopped is 2"),
        ("UPDATE judgements SET version = 50", "holds a judgement that no server writes .round 50 did not close"),
        ("INSERT INTO judgements VALUES (1, 0, 1.0, 1.0, 1)", "that no server writes .round 1 did not close"),
        ("UPDATE judgements SET rho_quiet = x'00'", "holds a judgement that no server writes .rho_quiet is b"),
        ("UPDATE judgements SET slot = slot + 9", "holds a judgement that no server writes .no node has slot 9"),
        (
            "UPDATE entries SET products = x'00000000'",
            "holds products that no server writes .4 bytes; 2 × 2 directions have 16",
        ),
        ("UPDATE entries SET products = 3", "holds products that no server writes .3."),
        ("DROP TABLE judgements", "is damaged .no such table: judgements"),
    ],
)
def test_rows_that_no_server_writes(ledger: Ledger, statement: str, words: str) -> None:
    close(ledger, 0, True, False)
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        connection.execute(statement)
    with pytest.raises(LedgerError, match=words) as caught, closing(Ledger.read(ledger.path)) as reader:
        print(reader.newest_judgements(), reader.early_stopped_since(), reader.products(0, RULES))  # noqa: T201
    assert caught.value.where == str(ledger.path)


def test_a_judgement_of_a_version_that_is_none(ledger: Ledger) -> None:
    close(ledger, 0, True, True)
    alter(ledger.path.parent, "UPDATE judgements SET version = 'x'")
    with pytest.raises(LedgerError, match=r"holds a judgement that no server writes .version is 'x'"):
        ledger.early_stopped_since()


def test_a_machine_goes_on_with_what_was_judged(tmp_path: Path) -> None:
    early = EarlyStoppingConfig(by="random", steps=2, calibration_steps=8, random_share=0.5)
    writer = Writer(tmp_path, nodes=4, steps=4, early_stopping=early)
    writer.round()
    run = Run(writer.run, writer.settings, writer.mask, b"", {})
    machine = resumed(writer.ledger, run, term=2, server_id="5" * 16)
    assert machine._early.nodes == writer.early.nodes
    assert len(writer.early.nodes) == 2
    close_all()
