"""theta of one version as bytes: the snapshot blob (protocol/SPECIFICATION.md, section 5) and the difference file.

A snapshot is for those who come back. A difference file is a fine-tuned model as what it changed: mask and theta. Both
begin alike, so one function tells of which run and version either is.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.foreign import open_regular, read_regular
from meerkat_mq.core.mask import MAX_WEIGHTS, Mask
from meerkat_mq.core.path import digest, short_hash
from meerkat_mq.errors import BadMagic, BadValue, ModelError, WireError
from meerkat_mq.wire.arrays import decode_mask, encode_array, encode_mask, read_array
from meerkat_mq.wire.reader import Reader

MAGIC, DIFFERENCE_MAGIC = b"MKSNAP\x01\n", b"MKDIFF\x01\n"
_HEAD = struct.Struct("<8s16sI16s16sI")
_DIFFERENCE_HEAD = struct.Struct("<8s16sI16s16sII")
_STAMP = struct.Struct("<8s16sI")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """theta of a version, float32 (n,), and its place in the ledger."""

    run_id: bytes
    version: int  # number of ledger entries behind theta
    head: bytes  # 16 bytes, hash of the last of them
    theta: Float32Array


def largest_snapshot(weights: int) -> int:
    """More bytes than any encoded snapshot of so many weights has."""
    return 5 * weights + 2**16


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


@dataclass(frozen=True, eq=False)
class Difference:
    """A model = base + this."""

    mask: Mask  # which weights, and their base
    theta: Float32Array  # float32 (n,), mask order
    run_id: bytes  # 16 bytes
    version: int  # number of ledger entries behind theta

    def save(self, path: Path) -> None:
        """Write the file atomically: magic, run id, version, digest, mask hash, sizes, mask blob, theta."""
        blob = encode_mask(self.mask)
        place = (self.run_id, self.version, digest(self.theta), self.mask.hash)
        head = _DIFFERENCE_HEAD.pack(DIFFERENCE_MAGIC, *place, self.mask.size, len(blob))
        write_atomically(path, head + blob + encode_array(self.theta))

    @classmethod
    def load(cls, path: Path) -> "Difference":
        """Read and check the file.

        Raises:
            ModelError: missing or damaged; names the file.
        """
        try:
            return _decode(read_regular(path))
        except OSError as error:
            raise ModelError(str(path), f"cannot be read ({error.strerror})", "give a difference file") from error
        except WireError as error:
            raise ModelError(str(path), f"is damaged ({error})", "copy it again from the server's state_dir") from error


def _decode(data: bytes) -> Difference:
    reader = Reader(data)
    magic, run_id, version, expected, mask_hash, weights, length = reader.unpack(_DIFFERENCE_HEAD)
    if magic != DIFFERENCE_MAGIC:
        raise BadMagic("difference", "is not a difference file of this version")
    if weights > MAX_WEIGHTS:
        raise BadValue("difference", f"{weights} weights are more than {MAX_WEIGHTS}")
    mask = decode_mask(bytes(reader.take(length)), mask_hash, weights)
    theta = np.asarray(read_array(reader, "<f4", weights), dtype=np.float32)
    reader.end()
    if digest(theta) != expected:
        raise BadValue("difference", "theta does not match its digest")
    return Difference(mask, theta, run_id, version)


def stamp_of(file: Path) -> tuple[bytes, int] | None:
    """(run id, version) of a snapshot or difference file; None where it is neither, or cannot be read."""
    try:
        with open_regular(file) as opened:
            magic, run_id, version = _STAMP.unpack(opened.read(_STAMP.size))
    except (OSError, struct.error):
        return None
    return (run_id, version) if magic in (MAGIC, DIFFERENCE_MAGIC) else None
