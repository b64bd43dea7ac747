"""What a node keeps between starts: a lock, the step counter, the directions of today, the mask, and the newest update.

Losing it costs a `want` or a step, never correctness. So none of it ends a node that has started: what the disk does
not take is kept in memory, and written as soon as it does.
"""

import json
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import structlog

from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.foreign import parse_json
from meerkat_mq.core.lock import locked
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import BadMagic, BadValue, ConfigError, MaskError, TooLarge, WireError, reason
from meerkat_mq.runtime.disk import Spare
from meerkat_mq.runtime.model import KeptUpdate, Spent
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import MAX_FRAME_BYTES, decode, encode
from meerkat_mq.wire.messages import Header, Update
from meerkat_mq.wire.reader import Reader
from meerkat_mq.wire.values import largest_blob

_MAGIC = b"MKUPDT\x01\n"
_HEAD = struct.Struct("<8s16sI")  # magic, run id, bytes of the frame; then the frame and the blob
_NO_BLOB = short_hash(b"")
_MOST_STEPS = 2**48
_DAMAGE = (OSError, ValueError, KeyError, TypeError, OverflowError)  # of a JSON file: an infinity, too
AGAIN_S = 30.0


class NodeState:
    """The state folder of one node, locked by one process; used by one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._spare = Spare()
        self._owed: dict[str, Callable[[], None]] = {}  # what the disk did not take, by what it is
        self._try_again_at = 0.0
        self._spent: Spent | None = None
        self._steps: tuple[str, int] | None = None  # a run, and the local steps that were taken in it

    def __enter__(self) -> "NodeState":
        """Lock the folder.

        Raises:
            ConfigError: it cannot be made or written, or another process holds it.
        """
        where = f"state_dir {self._folder}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            has_locks = self._open.enter_context(locked(self._folder / "lock", where, "node process"))
        except OSError as error:
            problem = f"cannot be used ({error.strerror})"
            raise ConfigError(where, problem, "name a folder that can be written") from error
        if not has_locks:
            structlog.get_logger().warning("no locks on this volume", folder=str(self._folder),
                                           means="nothing keeps a second process out")  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder."""
        self._open.close()

    def take_steps(self, run: str, count: int) -> int:
        """Move the data pointer of a run on by `count` local steps; returns the first of them."""
        known, taken = self._steps or self._load_steps()
        first = taken if known == run else 0
        self._steps = (run, first + count)
        self._write("step counter", self._save_steps)
        return first

    def has_taken_part(self) -> bool:
        """Whether this node has made local steps in some run."""
        return (self._steps or self._load_steps()) != ("", 0)

    def _load_steps(self) -> tuple[str, int]:
        try:
            table = parse_json(self._steps_file.read_text())
            run, steps = str(table["run"]), int(table["steps"])
        except _DAMAGE:
            return "", 0
        return (run, steps) if 0 <= steps < _MOST_STEPS else ("", 0)

    def _save_steps(self) -> None:
        assert self._steps is not None
        run, steps = self._steps
        write_atomically(self._steps_file, json.dumps({"run": run, "steps": steps}).encode(), durable=False)

    def spend(self, run: str, first: float, more: float, most: float) -> bool:
        """Count directions of a row today, as `Spent.then` does; False: they are too many, and none was counted."""
        return self._spends((self._spent or self._load_spent()).then(_today(), run, first, more, most))

    def fetch(self, size: int, most: int) -> bool:
        """Count bytes that will be fetched, as `Spent.fetching` does; False: too many today, and none was counted."""
        return self._spends((self._spent or self._load_spent()).fetching(_today(), size, most))

    def _spends(self, spent: Spent | None) -> bool:
        """Keep what was spent today, unless that would be too much."""
        if spent is None:
            return False
        self._spent = spent
        data = json.dumps(asdict(spent)).encode()
        self._write("directions of today", lambda: write_atomically(self._spent_file, data, durable=False))
        return True

    def _load_spent(self) -> Spent:
        try:
            table = parse_json(self._spent_file.read_text())
            directions, fetched = float(table["directions"]), int(table.get("bytes", 0))
            return Spent(str(table["day"]), max(0.0, directions), str(table["run"]), max(0, fetched))
        except FileNotFoundError:
            return Spent()
        except _DAMAGE as error:
            said = {"file": str(self._spent_file), "problem": reason(error)}
            structlog.get_logger().warning("directions of today are counted anew", **said)
            return Spent()

    def load_mask(self, mask_hash: bytes) -> Mask | None:
        """The mask with this hash, if it was kept and is whole."""
        try:
            mask = Mask.load(self._mask_file(mask_hash))
        except MaskError:
            return None
        return mask if mask.hash == mask_hash else None

    def keep_mask(self, mask: Mask) -> None:
        """Keep a mask for the next start, and no other."""

        def keep() -> None:
            for old in self._folder.glob("mask-*.mkm"):
                old.unlink()
            mask.save(self._mask_file(mask.hash))

        self._write("mask", keep)

    def keep_update(self, run: RunDescriptor, kept: KeptUpdate) -> None:
        """Keep an update over restarts and power cuts, and no other."""
        data = encode_update(run, kept)
        self._write("update", lambda: write_atomically(self._update_file, data))

    def load_update(self, run: RunDescriptor) -> KeptUpdate | None:
        """The update that was kept, if it is of this run and whole; what is not is removed."""
        try:
            limit = _HEAD.size + MAX_FRAME_BYTES + largest_blob(run.weights)
            if (size := self._update_file.stat().st_size) > limit:
                raise TooLarge("kept update", f"{size} bytes are more than {limit}")
            kept = decode_update(self._update_file.read_bytes(), run)
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
        self._write("update", lambda: self._update_file.unlink(missing_ok=True))

    def _write(self, what: str, write: Callable[[], None]) -> None:
        """Write a file; with it, or in half a minute, what the disk did not take earlier."""
        self._owed.pop(what, None)
        if self._owed and time.monotonic() >= self._try_again_at:
            self._try_again_at = time.monotonic() + AGAIN_S
            self._owed = {name: owed for name, owed in self._owed.items() if not self._spare.write(name, owed)}
        if not self._spare.write(what, write):
            self._owed[what] = write

    @property
    def _update_file(self) -> Path:
        return self._folder / "update"

    @property
    def _steps_file(self) -> Path:
        return self._folder / "steps.json"

    @property
    def _spent_file(self) -> Path:
        return self._folder / "directions.json"

    def _mask_file(self, mask_hash: bytes) -> Path:
        return self._folder / f"mask-{mask_hash.hex()}.mkm"


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def encode_update(run: RunDescriptor, kept: KeptUpdate) -> bytes:
    """The file of an update that is not acknowledged yet."""
    frame = encode(kept.update)
    return _HEAD.pack(_MAGIC, run.run_id, len(frame)) + frame + kept.blob


def decode_update(data: bytes, run: RunDescriptor) -> KeptUpdate | None:
    """What `encode_update` wrote; None of another run. WireError: damaged."""
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
