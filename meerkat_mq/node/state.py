"""What a node keeps between starts: a lock, the step counter, the mask, and the update that was not heard yet.

Losing it costs a `want` or a step, never correctness.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from filelock import FileLock, Timeout

from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import BadMagic, BadValue, ConfigError, MaskError, TooLarge, WireError
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import MAX_FRAME_BYTES, decode, encode
from meerkat_mq.wire.messages import Header, Update
from meerkat_mq.wire.reader import Reader
from meerkat_mq.wire.values import largest_blob

_MAGIC = b"MKUPDT\x01\n"
_HEAD = struct.Struct("<8s16sI")  # magic, run id, bytes of the frame; then the frame and the blob
_NO_BLOB = short_hash(b"")


@dataclass(frozen=True, slots=True)
class KeptUpdate:
    """An update that the server may not have heard, and the blob of its displacement (b"" without one)."""

    update: Update
    blob: bytes = field(default=b"", repr=False)


class NodeState:
    """The state folder of one node, locked by one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: FileLock | None = None

    def __enter__(self) -> "NodeState":
        """Lock the folder.

        Raises:
            ConfigError: it cannot be made or written, or another process holds it.
        """
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._folder / "lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise ConfigError(self._where, "is in use by another node process", "give each its own") from None
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()

    def take_steps(self, run: str, count: int) -> int:
        """Move the data pointer of a run on by `count` local steps; returns the first of them."""
        file = self._folder / "steps.json"
        try:
            table = json.loads(file.read_text())
            first = int(table["steps"]) if table["run"] == run else 0
        except (OSError, ValueError, KeyError, TypeError):
            first = 0
        with self._writing():
            write_atomically(file, json.dumps({"run": run, "steps": first + count}).encode(), durable=False)
        return first

    def load_mask(self, mask_hash: bytes) -> Mask | None:
        """The mask with this hash, if it was kept and is whole."""
        try:
            mask = Mask.load(self._mask_file(mask_hash))
        except MaskError:
            return None
        return mask if mask.hash == mask_hash else None

    def keep_mask(self, mask: Mask) -> None:
        """Keep a mask for the next start, and no other."""
        with self._writing():
            for old in self._folder.glob("mask-*.mkm"):
                old.unlink()
            mask.save(self._mask_file(mask.hash))

    def keep_update(self, run: RunDescriptor, kept: KeptUpdate) -> None:
        """Keep an update over restarts and power cuts, and no other."""
        frame = encode(kept.update)
        with self._writing():
            write_atomically(self._update_file, _HEAD.pack(_MAGIC, run.run_id, len(frame)) + frame + kept.blob)

    def load_update(self, run: RunDescriptor) -> KeptUpdate | None:
        """The update that was kept, if it is of this run and whole; what is not is removed."""
        try:
            limit = _HEAD.size + MAX_FRAME_BYTES + largest_blob(run.weights)
            if (size := self._update_file.stat().st_size) > limit:
                raise TooLarge("kept update", f"{size} bytes are more than {limit}")
            kept = _decode_update(self._update_file.read_bytes(), run)
        except FileNotFoundError:
            return None
        except (OSError, WireError) as error:
            structlog.get_logger().warning("kept update dropped", file=str(self._update_file), problem=str(error))
            kept = None
        if kept is None:
            self.forget_update()
        return kept

    def forget_update(self) -> None:
        """Keep no update."""
        with self._writing():
            self._update_file.unlink(missing_ok=True)

    @property
    def _update_file(self) -> Path:
        return self._folder / "update"

    @property
    def _where(self) -> str:
        return f"state_dir {self._folder}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot be used ({error.strerror})"
            raise ConfigError(self._where, problem, "name a folder that can be written") from error

    def _mask_file(self, mask_hash: bytes) -> Path:
        return self._folder / f"mask-{mask_hash.hex()}.mkm"


def _decode_update(data: bytes, run: RunDescriptor) -> KeptUpdate | None:
    """What `keep_update` wrote; None of another run.

    Raises:
        WireError: damaged.
    """
    reader = Reader(data)
    magic, run_id, size = reader.unpack(_HEAD)
    if magic != _MAGIC:
        raise BadMagic("kept update", f"starts with {magic.hex()}, not {_MAGIC.hex()}")
    frame = decode(bytes(reader.take(size)))
    blob = data[_HEAD.size + size :]
    if not isinstance(frame, Update):
        raise BadValue("kept update", f"is {type(frame).__name__}")
    if (len(blob), short_hash(blob)) != ((frame.values.size, frame.values.blob) if frame.values else (0, _NO_BLOB)):
        raise BadValue("kept update", "its displacement is damaged")
    header = Header.of(run.run_id, frame.header.term, frame.header.version, run.mask_hash)
    return KeptUpdate(frame, blob) if (run_id, frame.header) == (run.run_id, header) else None
