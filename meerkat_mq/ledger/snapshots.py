"""Snapshots of theta: kept by the server, trusted after a look, offered to nodes where they are the cheaper way."""

from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import digest, digest_due, short_hash
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import LedgerError, WireError
from meerkat_mq.ledger.store import KeptSnapshot, Store
from meerkat_mq.wire.arrays import chunks_of, split
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Chunk, Header, Offer, Want
from meerkat_mq.wire.snapshot import Snapshot, decode_snapshot, encode_snapshot

LOOKED_AT = 1000
# What snapshot and entries cost a node; `benchmarks/catch_up.py` measures it, and the crossover.
LINK_BYTES_A_SECOND = 1e6  # what a gateway's link is taken to carry
REPLAY_NS = 3.0  # a weight and term: its direction made and added
DIGEST_NS = 2.4  # a weight and due digest
LOAD_NS = 10.0  # a weight of a snapshot: decompressed, hashed, digested
ENTRY_BYTES = 38  # an encoded entry without terms
TERM_BYTES = 8
DAMAGED = "the ledger is damaged: this is not given to nodes, `meerkat verify` says more"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Ledger entries in a row.

    Attributes:
        entries: how many.
        size: their encoded bytes.
        displaced: bytes of their displacements.
    """

    entries: int
    size: int
    displaced: int = 0

    @property
    def terms(self) -> int:
        """How many terms these bytes hold."""
        return (self.size - ENTRY_BYTES * self.entries) // TERM_BYTES

    def seconds(self, weights: int, digest_every: int) -> float:
        """What it takes a node to receive and apply them."""
        replay_ns = weights * (REPLAY_NS * self.terms + DIGEST_NS * (self.entries // digest_every))
        return (self.size + self.displaced) / LINK_BYTES_A_SECOND + replay_ns * 1e-9


def snapshot_is_cheaper(
    missed: Stretch, after: Stretch, *, weights: int, snapshot_bytes: int, digest_every: int
) -> bool:
    """Whether a snapshot brings a node to the head sooner than all the entries that it missed.

    Args:
        missed: from the node's version to the head.
        after: from the snapshot's version to the head.
        weights: n.
        snapshot_bytes: size of the snapshot blob.
        digest_every: of the run.
    """
    load = snapshot_bytes / LINK_BYTES_A_SECOND + LOAD_NS * weights * 1e-9
    return load + after.seconds(weights, digest_every) < missed.seconds(weights, digest_every)


class Snapshots:
    """The snapshots of one run. Every method blocks, on the thread of the ledger."""

    def __init__(self, ledger: Store, run: RunDescriptor) -> None:
        self._ledger = ledger
        self._run = run
        self._seldom = Seldom()

    def keep(self, version: int, head: bytes, theta: Float32Array) -> None:
        """Keep a snapshot; raises what `Store.keep_snapshot` does."""
        self._ledger.keep_snapshot(version, encode_snapshot(self._run.run_id, version, head, theta))

    def sweep(self) -> None:
        """Remove what the ledger does not know."""
        self._ledger.sweep()

    def newest(self) -> Snapshot | None:
        """The newest snapshot that is whole and of this ledger; None where theta_0 is all there is."""
        for kept in self._ledger.snapshots():
            try:
                return self._load(kept)
            except (WireError, LedgerError) as error:
                name = self._ledger.snapshot_name(kept.version)
                structlog.get_logger().warning("snapshot passed over", file=name, problem=str(error))
        return None

    def _load(self, kept: KeptSnapshot) -> Snapshot:
        ledger, run, name = self._ledger, self._run, self._ledger.snapshot_name(kept.version)
        blob = ledger.snapshot(kept)
        if blob is None:
            raise LedgerError(name, "is gone")
        found = decode_snapshot(blob, kept.hash, run.weights)
        (entry,) = ledger.entries(kept.version - 1, 1) or (None,)
        ours = entry is not None and (found.run_id, found.head) == (run.run_id, entry.hash(run.run_id))
        if not ours or found.version != kept.version:
            raise LedgerError(name, "is of another run or version")
        assert entry is not None
        if digest_due(kept.version, run.digest_every) and digest(found.theta) != entry.digest:
            raise LedgerError(name, "does not have the digest that the ledger gives")
        return found

    def offer(self, header: Header, first: int, *, at_any_cost: bool = False) -> Offer | None:
        """The newest snapshot, where it brings a node that is at version `first` to the head at less cost.

        Not one that is damaged: a node would ask for another for ever.
        """
        kept = next(iter(self._ledger.snapshots()), None)
        if kept is None or kept.version <= first or not self._ledger.has_whole(kept):
            return None
        missed, after, run = self._stretch(first), self._stretch(kept.version), self._run
        cheaper = snapshot_is_cheaper(
            missed, after, weights=run.weights, snapshot_bytes=kept.size, digest_every=run.digest_every
        )
        return Offer(header, kept.version, kept.hash, kept.size) if cheaper or at_any_cost else None

    def _stretch(self, first: int) -> Stretch:
        """The entries from `first` on; where they are many, as large as the newest are in the mean."""
        count = max(0, self._ledger.version - first)
        looked_at, *sizes = self._ledger.stretch(max(first, self._ledger.version - LOOKED_AT))
        return Stretch(count, *(round(size * count / max(1, looked_at)) for size in sizes))

    def chunks(self, header: Header, want: Want) -> Iterator[Chunk]:
        """The chunks of a snapshot or of an entry's displacement that a node wants, at most 64 of them.

        None of anything else: what a node sent is nobody else's business. Nor of what is damaged.
        """
        if want.blob is not None and (blob := self._blob(want.blob)):
            chunks = split(header, want.blob, blob)
            yield from (chunks[index] for index in chunks_of(want, len(chunks)))

    def _blob(self, name: bytes) -> bytes | None:
        kept = next((kept for kept in self._ledger.snapshots() if kept.hash == name), None)
        if kept is not None:
            return self._ledger.snapshot(kept) if self._ledger.has_whole(kept) else None
        blob = self._ledger.displacement(name)
        if blob is None or short_hash(blob) == name:
            return blob
        self._seldom.say(structlog.get_logger().warning, DAMAGED, file=self._ledger.where, displacement=name.hex())
        return None
