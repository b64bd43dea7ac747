"""Snapshots: kept by twos, offered where cheaper, served from the file, never trusted unread."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import Coefficient, Entry, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger import files
from meerkat_mq.ledger import snapshots as module
from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.arrays import Assembly
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES
from meerkat_mq.wire.messages import Header, Want
from meerkat_mq.wire.snapshot import decode_snapshot

WEIGHTS = 30_000


class Kept:
    """A ledger of six rounds with a snapshot of every second version, and theta by the way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger.open(folder / LEDGER_FILE)
        self.run: Run = prepare_run(
            ServerConfig(federation="f", state_dir=folder, engine="toy", toy_weights=WEIGHTS)
        )  # fmt: skip
        self.ledger.begin(self.run.descriptor, self.run.rules)
        self.ledger.take_term(0, "0" * 16, "here")
        self.snapshots = Snapshots(self.ledger, self.run.descriptor)
        self.replica = recovered(self.ledger, self.run, self.snapshots)
        head = self.run.mask.hash
        for version in range(6):
            terms = (Coefficient(0, 0, 0.25 + version),)
            entry = Entry(version, terms, head, self.replica.apply(terms))
            self.ledger.commit_entry(entry, (), 1, overdue=False)
            head = entry.hash(self.run.descriptor.run_id)
            if version % 2:
                self.snapshots.keep(version + 1, head, self.replica.theta)
        self.head = head
        self.header = Header.of(self.run.descriptor.run_id, 1, 6, self.run.mask.hash)

    def recovered(self) -> Replica:
        return recovered(self.ledger, self.run, self.snapshots)

    @property
    def files(self) -> set[str]:
        return {file.name for file in self.folder.glob("*snapshot*")}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    with closing(made.ledger):
        yield made


def test_two_are_kept_and_the_newest_is_where_recovery_starts(kept: Kept) -> None:
    assert kept.files == {"snapshot-4.mks", "snapshot-6.mks"}
    newest = kept.snapshots.newest()
    assert newest is not None
    assert (newest.version, newest.head) == (6, kept.head)
    assert kept.recovered().theta.tobytes() == kept.replica.theta.tobytes()


@pytest.mark.parametrize("harm", ["torn", "gone", "both", "another"])
def test_what_is_not_whole_or_not_this_ledgers_is_passed_over(kept: Kept, harm: str) -> None:
    file, older = kept.folder / "snapshot-6.mks", kept.folder / "snapshot-4.mks"
    expected = 4
    match harm:
        case "torn":
            os.truncate(file, 1000)
        case "gone":
            file.unlink()
        case "both":
            file.unlink()
            older.write_bytes(bytes(10))
            expected = 0
        case "another":  # whole, and known by its hash, but of another past
            kept.snapshots.keep(6, bytes(16), kept.replica.theta)
    found = kept.snapshots.newest()
    assert (found.version if found else 0) == expected
    assert kept.recovered().theta.tobytes() == kept.replica.theta.tobytes()


def test_an_entry_that_does_not_lead_to_its_digest_is_named(kept: Kept) -> None:
    for file in kept.folder.glob("*.mks"):
        file.unlink()
    terms = (Coefficient(0, 0, 1.0),)
    kept.ledger.commit_entry(Entry(6, terms, kept.head, bytes(15) + b"\1"), (), 1, overdue=False)
    with pytest.raises(LedgerError, match="entry 6 does not follow from those before it; restore"):
        kept.recovered()


def test_a_snapshot_is_offered_where_it_is_cheaper_and_served_from_its_file(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept.snapshots.offer(kept.header, 0) is None  # six entries cost less
    monkeypatch.setattr(module, "snapshot_is_cheaper", lambda missed, after, **_: missed.entries > after.entries)
    assert kept.snapshots.offer(kept.header, 6) is None
    offer = kept.snapshots.offer(kept.header, 0)
    assert offer is not None
    blob = (kept.folder / "snapshot-6.mks").read_bytes()
    assert (offer.version, offer.blob, offer.size) == (6, short_hash(blob), len(blob))

    count = -(-offer.size // MAX_CHUNK_BYTES)
    assert count > 1
    assembly = Assembly(offer.blob, offer.size, count)
    want = Want(kept.header, 1, blob=offer.blob, chunks=(1, 0, 1, count, 65535))
    chunks = list(kept.snapshots.chunks(kept.header, want))
    assert [chunk.index for chunk in chunks] == [0, 1]
    for chunk in chunks:
        assembly.add(chunk)
    found = decode_snapshot(assembly.join(), offer.blob, WEIGHTS)
    assert found.theta.tobytes() == kept.replica.theta.tobytes()

    assert list(kept.snapshots.chunks(kept.header, Want(kept.header, 1, blob=bytes(16), chunks=(0,)))) == []
    (kept.folder / "snapshot-6.mks").write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    assert kept.snapshots.offer(kept.header, 0) is None  # a damaged one would be asked for again and again
    (kept.folder / "snapshot-6.mks").unlink()
    assert list(kept.snapshots.chunks(kept.header, want)) == []
    assert kept.snapshots.offer(kept.header, 0) is None


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_file(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(LedgerError, match=r"snapshot-8.mks: cannot be written \(No space left on device\)"):
        kept.snapshots.keep(8, kept.head, kept.replica.theta)
    assert [snapshot.version for snapshot in kept.ledger.snapshots()] == [6, 4]
