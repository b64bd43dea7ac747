"""The snapshot blob: theta of one version, for those who come back (protocol/SPECIFICATION.md, section 5)."""

import struct
from dataclasses import dataclass

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import digest, short_hash
from meerkat_mq.errors import BadMagic, BadValue
from meerkat_mq.wire.arrays import encode_array, read_array
from meerkat_mq.wire.reader import Reader

MAGIC = b"MKSNAP\x01\n"
_HEAD = struct.Struct("<8s16sI16s16sI")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """theta of a version, float32 (n,), and its place in the ledger.

    Attributes:
        version: number of ledger entries behind theta.
        head: 16 bytes, hash of the last of them.
    """

    run_id: bytes
    version: int
    head: bytes
    theta: Float32Array


def encode_snapshot(run_id: bytes, version: int, head: bytes, theta: Float32Array) -> bytes:
    """Magic, run id, u32 version, 16 head, 16 digest of theta, u32 n, theta as an array."""
    return _HEAD.pack(MAGIC, run_id, version, head, digest(theta), theta.size) + encode_array(theta)


def decode_snapshot(blob: bytes, expected_hash: bytes, weights: int) -> Snapshot:
    """Decode a snapshot, untrusted, and hold it against its hash, the run's size and its own digest.

    Whether it is of the run and version that the caller wants is for the caller to see.

    Raises:
        WireError: the blob is damaged or not the snapshot asked for.
    """
    found = short_hash(blob)
    if found != expected_hash:
        raise BadValue("snapshot", f"hash {found.hex()} is not {expected_hash.hex()}", "fetch it again")
    reader = Reader(blob)
    magic, run_id, version, head, expected, size = reader.unpack(_HEAD)
    if magic != MAGIC:
        raise BadMagic("snapshot", f"starts with {magic.hex()}, not {MAGIC.hex()}")
    if size != weights:
        raise BadValue("snapshot", f"has {size} weights, expected {weights}")
    theta = np.asarray(read_array(reader, "<f4", weights), dtype=np.float32)
    reader.end()
    if digest(theta) != expected:
        raise BadValue("snapshot", "theta does not match its digest")
    if not np.isfinite(theta).all():
        raise BadValue("snapshot", "theta is not finite")
    return Snapshot(run_id, version, head, theta)
