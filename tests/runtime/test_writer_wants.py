"""What a want for entries costs the ledger's thread: no more is decoded than the reply takes."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.ledger import sqlite
from meerkat_mq.ledger.recovery import resumed
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import DAMAGED
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.rounds import events as e
from meerkat_mq.runtime.writer import REPLY_ENTRIES
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.frames import decode_entry, entry_bytes
from meerkat_mq.wire.limits import REPLY_BYTES
from meerkat_mq.wire.messages import Entries, Offer, Want
from tests.runtime.one_writer import OneWriter

LONGEST = 12_000  # terms of an entry: twice what a reply takes
SHORT, LONG = 2, 800


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
    assert ledger.run is not None
    run_id, entries, previous = ledger.run.run_id, list[Entry](), ledger.run.mask_hash
    for version, terms in enumerate(sizes):
        entries.append(Entry(version, (Coefficient(0, 0, 0.5),) * terms, previous, b"d" * 16))
        previous = entries[-1].hash(run_id)
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


def damage(ledger: Ledger, version: int, at: int) -> None:
    """Let a byte of an entry flip on the disk; `at` as of a list."""
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as file:
        (data,) = file.execute("SELECT entry FROM entries WHERE version = ?", (version,)).fetchone()
        flipped = bytearray(data)
        flipped[at] ^= 1
        file.execute("UPDATE entries SET entry = ? WHERE version = ?", (bytes(flipped), version))


@pytest.mark.parametrize(("at", "given"), [(-1, 4), (-20, 3), (12, 4), (5, 0)])  # digest, previous, a term, how many
def test_a_damaged_entry_is_not_given_to_a_node_and_said_once_in_words(
    ledger: Ledger, run: Run, at: int, given: int
) -> None:
    it, entries = OneWriter(ledger, run), tuple(fill(ledger, [SHORT] * 9))
    damage(ledger, 4, at)
    with capture_logs() as lines:
        it.put(e.SendEntries("behind", 0))
        it.put(e.SendEntries("at it", 4))
        it.put(e.SendEntries("at it", 4))
        it.put(e.SendEntries("ahead", 5))
    whole, newest = ("behind", Entries(it.header(), entries[:given])), ("ahead", Entries(it.header(), entries[5:]))
    assert it.replies == ([whole, newest] if given else [newest])
    said = [line["event"] for line in lines]
    assert said.count(DAMAGED) == 1
    it.put(e.KeepSnapshot(0, bytes(16)))  # of whatever version: it leads around the damage
    it.replies.clear()
    kept = ledger.snapshots()[0]
    ledger.keep_snapshot(7, ledger.snapshot(kept) or b"")
    it.put(e.SendEntries("at it", 4))
    ((_, offer),) = it.replies
    assert isinstance(offer, Offer)
    assert offer.version == 7


@pytest.mark.parametrize("at", [-1, -20])  # its digest; what it says of the one before it
def test_a_server_that_starts_on_an_old_entry_that_is_damaged_does_not_put_it_into_a_round(
    ledger: Ledger, run: Run, at: int
) -> None:
    entries = tuple(fill(ledger, [SHORT] * 9))
    damage(ledger, 4, at)
    with capture_logs() as lines:
        machine = resumed(ledger, run, term=2, server_id="0" * 16)
    (announced,) = [effect.frame for effect in machine.start(0.0) if isinstance(effect, e.PublishRound)]
    assert announced.entries == entries[5:]
    assert DAMAGED in [line["event"] for line in lines]


def test_a_displacement_that_is_damaged_is_not_given_to_a_node(ledger: Ledger, run: Run) -> None:
    it, blob = OneWriter(ledger, run), bytes(100)
    name = ledger.keep_blob(blob)
    made = Entry(0, (), run.mask.hash, bytes(16), Displacement(name, len(blob)))
    ledger.commit_entry(made, (), 1, overdue=False)
    want = e.SendChunks("node", Want(it.header(), 1, blob=name, chunks=(0,)))
    it.put(want)
    assert len(it.replies) == 1
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as file:
        file.execute("UPDATE blobs SET data = ?", (bytes(99) + b"x",))
    with capture_logs() as lines:
        it.put(want, want)
    assert len(it.replies) == 1
    assert [line["event"] for line in lines] == [DAMAGED]
