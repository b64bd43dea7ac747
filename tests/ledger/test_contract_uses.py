"""What is made of a ledger, from every store: theta, a server, proofs, a look, snapshots for nodes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.core.path import digest, short_hash
from meerkat_mq.errors import LedgerError, RunMismatch
from meerkat_mq.ledger import snapshots as module
from meerkat_mq.ledger.inspect import path_shown, rebuilt_path, rounds_shown, run_shown
from meerkat_mq.ledger.recovery import follow, recovered, resumed
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.verify import snapshot_look, verify_ledger
from meerkat_mq.wire.arrays import Assembly
from meerkat_mq.wire.messages import Header, Want
from meerkat_mq.wire.snapshot import encode_snapshot
from tests.ledger.ledgers import RUN, Writer
from tests.ledger.stores import Kept

BUFFERED: dict[str, Any] = {
    "max_staleness": 2, "absent": [(1, 1), (2, 0)], "ages": {(2, 1): 1, (4, 0): 2}, "values": {2: "int8"},
}  # fmt: skip


class Written:
    """Six rounds of three nodes in one of the stores, with a snapshot of theta 4 and 6."""

    def __init__(self, folder: Path, kept: Kept) -> None:
        self.writer = Writer(folder, store=kept.open(), count=6, **BUFFERED)
        for version in range(6):
            self.writer.round()
            if version in (1, 3, 5):
                blob = encode_snapshot(RUN, version + 1, self.writer.head, self.writer.replica.theta)
                self.writer.ledger.keep_snapshot(version + 1, blob)
        self.theta = self.writer.replica.theta
        self.mask = self.writer.mask
        self.store = kept.open()
        self.run = Run(self.writer.run, self.writer.settings, self.mask, b"", self.store.rules)
        self.snapshots = Snapshots(self.store, self.writer.run)


@pytest.fixture
def written(tmp_path: Path, kept: Kept) -> Written:
    return Written(tmp_path, kept)


# --- theta and a server ---


@pytest.mark.parametrize("harm", ["none", "newest", "all", "gone"])
def test_theta_is_recovered_whatever_became_of_snapshots(written: Written, kept: Kept, harm: str) -> None:
    if harm != "none":
        kept.write_snapshot(6, None if harm == "gone" else b"damaged")
    if harm in ("all", "gone"):
        kept.write_snapshot(4, bytes(1000))
    newest = written.snapshots.newest()
    assert (newest.version if newest else 0) == {"none": 6, "newest": 4, "all": 0, "gone": 0}[harm]
    replica = recovered(written.store, written.run, written.snapshots)
    assert (replica.version, replica.theta.tobytes()) == (6, written.theta.tobytes())


def test_theta_follows_a_ledger_that_went_on(written: Written) -> None:
    replica = recovered(written.store, written.run, written.snapshots)
    written.writer.count += 2
    for _ in range(2):
        written.writer.round()
    follow(written.store, written.run, replica)
    assert replica.theta.tobytes() == written.writer.replica.theta.tobytes()


def test_an_entry_that_does_not_follow_is_named(written: Written, kept: Kept) -> None:
    for version in (4, 6):
        kept.write_snapshot(version, None)
    kept.alter_entry(replace(written.writer.entries[2], digest=bytes(15) + b"\1"))
    with pytest.raises(LedgerError, match="entry 2 does not follow from those before it; restore"):
        recovered(written.store, written.run, written.snapshots)


def test_a_server_goes_on_where_the_ledger_ends(written: Written) -> None:
    store = written.store
    waiting = replace(written.writer.records(5)[0], version=6)
    written.writer.ledger.commit_updates([waiting])
    machine = resumed(store, written.run, term=2, server_id="5" * 16)
    window = machine._window
    digests = {entry.version + 1: entry.digest for entry in written.writer.entries}
    assert machine.version == 6
    assert {version: window.base(version) for version in range(3, 7)} == {3: None} | {
        version: digests[version] for version in (4, 5, 6)
    }
    assert window.acknowledged == {0: 6, 1: 5, 2: 5}
    assert window.open() == {(6, "n0"): waiting}


# --- proofs ---


def test_a_run_verifies(written: Written) -> None:
    found = verify_ledger(written.store, written.mask)
    assert (found.rounds, found.updates, found.digest) == (6, 16, digest(written.theta))


def test_a_tampered_entry_is_named(written: Written, kept: Kept) -> None:
    entry = written.writer.entries[3]
    kept.alter_entry(replace(entry, terms=(replace(entry.terms[0], coefficient=0.5), *entry.terms[1:])))
    with pytest.raises(RunMismatch, match="its term 0 is") as caught:
        verify_ledger(written.store, written.mask)
    assert caught.value.where == "entry 3"


def test_a_lost_entry_is_named(written: Written, kept: Kept) -> None:
    kept.lose_entry(2)
    with pytest.raises(RunMismatch, match="is missing; entry 3 stands in its place"):
        verify_ledger(written.store, written.mask)


def test_an_update_in_an_entry_where_it_cannot_be_is_named(written: Written, kept: Kept) -> None:
    kept.alter_update(5, 0, 1.0, None)
    with pytest.raises(RunMismatch, match="entry 5"):
        verify_ledger(written.store, written.mask)
    kept.alter_update(0, 0, 1.0, 9)
    assert written.store.astray() == 0


def test_a_tampered_displacement_is_named(written: Written, kept: Kept) -> None:
    added = written.writer.entries[1].displacement
    assert added is not None
    kept.alter_blob(added.blob, b"damaged")
    with pytest.raises(RunMismatch, match="entry 1"):
        verify_ledger(written.store, written.mask)


@pytest.mark.parametrize("harm", ["none", "damaged", "another theta", "gone"])
def test_snapshots_are_compared(written: Written, kept: Kept, harm: str) -> None:
    files = list[str]()
    match harm:
        case "damaged":
            kept.write_snapshot(4, b"damaged")
        case "another theta":
            other = encode_snapshot(RUN, 4, written.writer.entries[3].hash(RUN), written.theta)
            written.writer.ledger.keep_snapshot(4, other)
        case "gone":
            kept.write_snapshot(4, None)
    looks = {
        found.version: [snapshot_look(written.store, found, written.writer.run, files)]
        for found in written.store.snapshots()
    }
    if harm in ("damaged", "another theta"):
        with pytest.raises(RunMismatch, match="snapshot-4"):
            verify_ledger(written.store, written.mask, looks=looks)
    else:
        verify_ledger(written.store, written.mask, looks=looks)
        assert len(files) == (1 if harm == "gone" else 2)


# --- a look ---


def test_a_run_is_shown(written: Written) -> None:
    shown = run_shown(written.store, now=1e9)
    assert (shown.round, shown.term, [node.node for node in shown.nodes]) == (6, 1, ["n0", "n1", "n2"])
    assert [found.round for found in rounds_shown(written.store, 2, 3)] == [2, 3, 4]
    given = list(path_shown(written.store, "n1", 0, 6))
    assert [(found.round, found.entry) for found in given] == [(0, 0), (1, 2), (3, 3), (4, 4), (5, 5)]


def test_a_path_is_rebuilt(written: Written) -> None:
    (step,) = rebuilt_path(written.store, written.mask, 3, "n1")
    (given,) = (found for found in written.writer.records(3) if found.node == "n1")
    assert (step.g, step.distance > 0) == (given.scalars[0], True)


# --- snapshots for nodes ---


def test_a_snapshot_is_offered_where_it_is_cheaper_and_served(
    written: Written, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = Header.of(RUN, 1, 6, written.mask.hash)
    assert written.snapshots.offer(header, 6) is None
    monkeypatch.setattr(module, "snapshot_is_cheaper", lambda missed, after, **_: missed.entries > after.entries)
    offer = written.snapshots.offer(header, 0)
    assert offer is not None
    (chunk,) = written.snapshots.chunks(header, Want(header, 1, blob=offer.blob, chunks=(0, 9)))
    assembly = Assembly(offer.blob, offer.size, 1)
    assembly.add(chunk)
    assert short_hash(assembly.join()) == offer.blob
    assert list(written.snapshots.chunks(header, Want(header, 1, blob=bytes(16), chunks=(0,)))) == []
    kept.write_snapshot(6, b"damaged")
    assert written.snapshots.offer(header, 0) is None


def test_nodes_are_served_displacements_of_entries_only(written: Written) -> None:
    header = Header.of(RUN, 1, 6, written.mask.hash)
    added = written.writer.entries[1].displacement
    (values,) = (record.values for record in written.store.records(1) if record.values is not None)
    assert added is not None
    (chunk,) = written.snapshots.chunks(header, Want(header, 1, blob=added.blob, chunks=(0,)))
    assert chunk.data == written.store.blob(added.blob)
    assert list(written.snapshots.chunks(header, Want(header, 1, blob=values.blob, chunks=(0,)))) == []
