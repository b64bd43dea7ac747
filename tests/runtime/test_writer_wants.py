"""What a want for entries costs the ledger's thread: no more is decoded than the reply takes."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import Coefficient, Entry
from meerkat_mq.ledger import sqlite
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.rounds import events as e
from meerkat_mq.runtime.writer import REPLY_ENTRIES
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.frames import decode_entry, entry_bytes
from meerkat_mq.wire.limits import REPLY_BYTES
from meerkat_mq.wire.messages import Entries
from tests.runtime.one_writer import OneWriter

LONGEST = 12_000  # terms of an entry: twice what a reply takes
SHORT, LONG = 2, 800


def entry(version: int, terms: int) -> Entry:
    return Entry(version, (Coefficient(0, 0, 0.5),) * terms, bytes(16), bytes(16))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger.open(tmp_path / LEDGER_FILE)) as opened:
        yield opened


@pytest.fixture
def run(ledger: Ledger) -> Run:
    prepared = prepare_run(ServerConfig(federation="f", state_dir=ledger.path.parent, engine="toy", toy_weights=10))
    ledger.begin(prepared.descriptor, prepared.rules)
    ledger.take_term(0, "0" * 16, "here")
    return prepared


def fill(ledger: Ledger, sizes: list[int]) -> list[Entry]:
    """Entries with so many terms."""
    entries = [entry(version, terms) for version, terms in enumerate(sizes)]
    with ledger.group():
        for made in entries:
            ledger.commit_entry(made, (), 1, overdue=False)
    return entries


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The entries that a ledger decodes from now on."""
    seen: list[bytes] = []

    def counted(data: bytes) -> Entry:
        seen.append(data)
        return decode_entry(data)

    monkeypatch.setattr(sqlite, "decode_entry", counted)
    return seen


def taken(entries: list[Entry]) -> list[Entry]:
    """What a reply takes: the first, and those that fit behind it."""
    chosen, room = list[Entry](), REPLY_BYTES
    for found in entries[:REPLY_ENTRIES]:
        room -= entry_bytes(found)
        if room < 0 and chosen:
            break
        chosen.append(found)
    return chosen


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        ([LONG] * 40, 0),
        ([LONG] * 40, 36),
        ([SHORT] * 1200, 100),
        ([LONGEST, LONG, SHORT], 0),
        ([SHORT, LONGEST, SHORT], 0),
        ([0] * 1500, 0),
    ],
    ids=["many", "the last", "short", "a long one first", "a long one next", "more than a reply counts"],
)
def test_no_more_entries_are_decoded_than_the_reply_takes(
    ledger: Ledger, run: Run, monkeypatch: pytest.MonkeyPatch, sizes: list[int], first: int
) -> None:
    it = OneWriter(ledger, run)
    entries = fill(ledger, sizes)
    seen = decoded(monkeypatch)
    it.put(e.SendEntries("node", first))
    expected = taken(entries[first:])
    assert it.replies == [("node", Entries(it.header(), tuple(expected)))]
    assert len(seen) == len(expected)
    assert it.told == []


def test_the_last_byte_of_the_room_is_used(ledger: Ledger, run: Run) -> None:
    entries = fill(ledger, [LONG, SHORT, LONG, SHORT])
    size = sum(map(entry_bytes, entries[:3]))
    assert list(ledger.entries_within(0, 9, size)) == entries[:3]
    assert list(ledger.entries_within(0, 9, size - 1)) == entries[:2]
    assert list(ledger.entries_within(0, 1, size)) == entries[:1]
    assert list(ledger.entries_within(3, 9, 0)) == entries[3:]
    assert ledger.entries_within(4, 9, size) == ()
