"""Snapshots of theta: files beside the ledger, which knows their hashes; at most two are kept."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.path import digest, digest_due, short_hash
from meerkat_mq.errors import LedgerError, WireError
from meerkat_mq.ledger.files import snapshot_file
from meerkat_mq.ledger.rows import KeptSnapshot
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.rounds.catch_up import Stretch, snapshot_is_cheaper
from meerkat_mq.wire.arrays import chunks_of
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES
from meerkat_mq.wire.messages import Chunk, Header, Offer, Want
from meerkat_mq.wire.snapshot import Snapshot, decode_snapshot, encode_snapshot

LOOKED_AT = 1000


class Snapshots:
    """The snapshot files of one run. Every method blocks, on the thread of the ledger."""

    def __init__(self, folder: Path, ledger: Ledger, run: RunDescriptor) -> None:
        self._folder = folder
        self._ledger = ledger
        self._run = run
        self._seen_whole: tuple[bytes, int] | None = None

    def keep(self, version: int, head: bytes, theta: Float32Array) -> None:
        """Write a snapshot's file, then its row, then remove what is not among the newest two.

        Raises:
            LedgerError: the folder is full or read-only.
            AnotherServer: the ledger is another server's by now.
        """
        blob = encode_snapshot(self._run.run_id, version, head, theta)
        file = self._file(version)
        try:
            write_atomically(file, blob)
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise LedgerError(str(file), problem, "free space, and start the server again: it goes on") from error
        self._ledger.commit_snapshot(version, short_hash(blob), len(blob))
        self.sweep()

    def sweep(self) -> None:
        """Remove the files that the ledger does not know, and what an interrupted write left."""
        known = {self._file(kept.version) for kept in self._ledger.snapshots()}
        for file in (*self._folder.glob("snapshot-*.mks"), *self._folder.glob(".snapshot-*.mks.*")):
            if file not in known:
                with suppress(OSError):
                    file.unlink()

    def newest(self) -> Snapshot | None:
        """The newest snapshot that is whole and of this ledger; None where theta_0 is all there is."""
        for kept in self._ledger.snapshots():
            try:
                return self._load(kept)
            except (OSError, WireError, LedgerError) as error:
                structlog.get_logger().warning("snapshot passed over", file=str(self._file(kept.version)),
                                               problem=str(error))  # fmt: skip
        return None

    def _load(self, kept: KeptSnapshot) -> Snapshot:
        file, run = self._file(kept.version), self._run
        found = decode_snapshot(file.read_bytes(), kept.hash, run.weights)
        (entry,) = self._ledger.entries(kept.version - 1, 1) or (None,)
        ours = entry is not None and (found.run_id, found.head) == (run.run_id, entry.hash(run.run_id))
        if not ours or found.version != kept.version:
            raise LedgerError(str(file), "is of another run or version")
        assert entry is not None
        if digest_due(kept.version, run.digest_every) and digest(found.theta) != entry.digest:
            raise LedgerError(str(file), "does not have the digest that the ledger gives")
        return found

    def offer(self, header: Header, first: int) -> Offer | None:
        """The newest snapshot, where it brings a node that stands at version `first` to the head at less cost."""
        kept = next(iter(self._ledger.snapshots()), None)
        if kept is None or kept.version <= first or not self._is_whole(kept):
            return None
        missed, after = self._stretch(first), self._stretch(kept.version)
        cheaper = snapshot_is_cheaper(
            missed,
            after,
            weights=self._run.weights,
            snapshot_bytes=kept.size,
            digest_every=self._run.digest_every,
        )
        return Offer(header, kept.version, kept.hash, kept.size) if cheaper else None

    def _stretch(self, first: int) -> Stretch:
        """The entries from `first` on; where they are many, as large as the newest are in the mean."""
        count = max(0, self._ledger.version - first)
        looked_at, *sizes = self._ledger.stretch(max(first, self._ledger.version - LOOKED_AT))
        return Stretch(count, *(round(size * count / max(1, looked_at)) for size in sizes))

    def _is_whole(self, kept: KeptSnapshot) -> bool:
        """Whether its file is there and undamaged: a node would ask for the other kind for ever."""
        file = self._file(kept.version)
        try:
            seen = (kept.hash, file.stat().st_mtime_ns)
            if self._seen_whole != seen and short_hash(file.read_bytes()) == kept.hash:
                self._seen_whole = seen
        except OSError:
            return False
        return self._seen_whole == seen

    def chunks(self, header: Header, want: Want) -> Iterator[Chunk]:
        """The chunks of a snapshot that a node wants, at most 64 of them; none of an unknown one."""
        kept = next((kept for kept in self._ledger.snapshots() if kept.hash == want.blob), None)
        if kept is None:
            return
        count = -(-kept.size // MAX_CHUNK_BYTES)
        with suppress(OSError), self._file(kept.version).open("rb") as file:
            for index in chunks_of(want, count):
                file.seek(index * MAX_CHUNK_BYTES)
                yield Chunk(header, kept.hash, index, count, kept.size, file.read(MAX_CHUNK_BYTES))

    def _file(self, version: int) -> Path:
        return snapshot_file(self._folder, version)
