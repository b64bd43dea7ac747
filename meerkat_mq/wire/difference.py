"""The difference file: a fine-tuned model as what it changed, mask and theta, in one small file.

It begins like a snapshot, so one function tells of which run and version either is.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.mask import MAX_WEIGHTS, Mask
from meerkat_mq.core.path import digest
from meerkat_mq.errors import BadMagic, BadValue, ModelError, WireError
from meerkat_mq.wire import snapshot
from meerkat_mq.wire.arrays import decode_mask, encode_array, encode_mask, read_array
from meerkat_mq.wire.reader import Reader

MAGIC = b"MKDIFF\x01\n"
_HEAD = struct.Struct("<8s16sI16s16sII")
_STAMP = struct.Struct("<8s16sI")


@dataclass(frozen=True, eq=False)
class Difference:
    """A model = base + this.

    Attributes:
        mask: which weights, and their base.
        theta: float32 (n,), mask order.
        run_id: 16 bytes.
        version: number of ledger entries behind theta.
    """

    mask: Mask
    theta: Float32Array
    run_id: bytes
    version: int

    def save(self, path: Path) -> None:
        """Write the file atomically: magic, run id, version, digest, mask hash, sizes, mask blob, theta."""
        blob = encode_mask(self.mask)
        place = (self.run_id, self.version, digest(self.theta), self.mask.hash)
        head = _HEAD.pack(MAGIC, *place, self.mask.size, len(blob))
        write_atomically(path, head + blob + encode_array(self.theta))

    @classmethod
    def load(cls, path: Path) -> "Difference":
        """Read and check the file.

        Raises:
            ModelError: missing or damaged; names the file.
        """
        try:
            return _decode(path.read_bytes())
        except OSError as error:
            raise ModelError(str(path), f"cannot be read ({error.strerror})", "give a difference file") from error
        except WireError as error:
            raise ModelError(str(path), f"is damaged ({error})", "copy it again from the server's state_dir") from error


def _decode(data: bytes) -> Difference:
    reader = Reader(data)
    magic, run_id, version, expected, mask_hash, weights, length = reader.unpack(_HEAD)
    if magic != MAGIC:
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
        with file.open("rb") as opened:
            magic, run_id, version = _STAMP.unpack(opened.read(_STAMP.size))
    except (OSError, struct.error):
        return None
    return (run_id, version) if magic in (MAGIC, snapshot.MAGIC) else None
