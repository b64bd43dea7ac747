"""Hidden states of rows that stay the same for a whole run, kept in memory and on disk. NumPy only.

A mask that holds nothing below block k leaves a row's hidden state before block k as the base model makes it, whatever
theta is. So it is computed when the row is first seen, and kept: tokens × width numbers. Each row comes once an epoch,
in an order that is drawn anew each time. No rule for dropping one row for another does better, then, than dropping
none: with room for C of N rows, C ÷ N of all rows are found. What has no room is computed again each time.

A state belongs to its tokens, to the base model, and to what computed it: that is the store's `context`. On disk, each
state is a file with a hash of it all, so that a torn or damaged one is computed again instead of believed. A disk that
fails is left alone: nothing depends on it.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog

from meerkat_mq.config import PrefixConfig
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.path import HASH_BYTES, short_hash
from meerkat_mq.engines.prompts import Int64Array

State = npt.NDArray[np.integer]  # (tokens, width): the bits of floating-point numbers
FOLDER = "prefix"

_ENTRY_BYTES = 200  # of a row's place in memory, besides its numbers
_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Keep:
    """Where hidden states may be kept, and how much of them.

    Attributes:
        memory_bytes: in memory, at most.
        disk_bytes: in files, at most.
        folder: of these files; None: none are kept. It belongs to one process.
    """

    memory_bytes: int = 256 << 20
    disk_bytes: int = 0
    folder: Path | None = None


IN_MEMORY = Keep()


def keeping(config: PrefixConfig, state_dir: Path) -> Keep:
    """As the section `[prefix]` says, with the files in a state folder."""
    return Keep(config.memory_mib << 20, config.disk_mib << 20, state_dir / FOLDER)


class HiddenStates:
    """States by their tokens; used by one thread at a time."""

    def __init__(self, keep: Keep, context: bytes, dtype: npt.DTypeLike, width: int) -> None:
        """`context` is of all that decides a state but its tokens; states are (tokens, `width`), of an integer type."""
        self._context = short_hash(context)
        self._dtype, self._width = np.dtype(dtype), width
        self._memory_left = keep.memory_bytes
        self._memory: dict[bytes, State] = {}
        self._folder = keep.folder / self._context.hex() if keep.folder and keep.disk_bytes else None
        self._disk_left = keep.disk_bytes
        self._on_disk: dict[bytes, int] = {}
        self._full = False
        if keep.folder is not None:
            self._open(keep.folder)

    def find(self, tokens: Int64Array) -> State | None:
        """The state of these tokens, (tokens, width), or None where it is not kept."""
        key = self._key(tokens)
        if (state := self._memory.get(key)) is None and (state := self._read(key, len(tokens))) is not None:
            self._remember(key, state)
        return state

    def keep(self, tokens: Int64Array, state: State) -> None:
        """Keep the state of these tokens, in memory and on disk, where there is room."""
        key = self._key(tokens)
        if key in self._memory or key in self._on_disk:
            return
        kept = self._remember(key, state)
        kept = self._write(key, state) or kept
        if not kept and not self._full:
            self._full = True
            rows = len(self._memory.keys() | self._on_disk.keys())
            structlog.get_logger().info("no room for more hidden states: the other rows are computed anew", kept=rows)

    def _key(self, tokens: Int64Array) -> bytes:
        return short_hash(self._context + tokens.astype("<i8").tobytes())

    def _remember(self, key: bytes, state: State) -> bool:
        size = state.nbytes + _ENTRY_BYTES
        if size > self._memory_left:
            return False
        self._memory_left -= size
        self._memory[key] = state.copy()
        return True

    def _open(self, root: Path) -> None:
        """Look what is there; remove what another model or mask left, and what is over the limit."""
        try:
            for other in root.iterdir() if root.is_dir() else ():
                if other != self._folder and _NAME.fullmatch(other.name) and other.is_dir():
                    _remove(other)
            if self._folder is None:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in self._folder.iterdir():
                size = file.stat().st_size
                if _NAME.fullmatch(file.name) and size <= self._disk_left:
                    self._count(bytes.fromhex(file.name), size)
                else:
                    file.unlink()
        except OSError as error:
            self._give_up(error)

    def _count(self, key: bytes, size: int) -> None:
        self._on_disk[key] = size
        self._disk_left -= size

    def _read(self, key: bytes, tokens: int) -> State | None:
        if self._folder is None or key not in self._on_disk:
            return None
        file = self._folder / key.hex()
        try:
            data = file.read_bytes()
        except OSError:
            data = b""
        body = bytearray(data[HASH_BYTES:])
        whole = len(body) == tokens * self._width * self._dtype.itemsize
        if whole and short_hash(key + body) == data[:HASH_BYTES]:
            return np.frombuffer(body, self._dtype).reshape(tokens, self._width)
        self._disk_left += self._on_disk.pop(key)
        with suppress(OSError):
            file.unlink()
        return None

    def _write(self, key: bytes, state: State) -> bool:
        body = state.tobytes()
        size = HASH_BYTES + len(body)
        if self._folder is None or size > self._disk_left:
            return False
        try:
            write_atomically(self._folder / key.hex(), short_hash(key + body) + body, durable=False, secret=True)
        except OSError as error:
            self._give_up(error)
            return False
        self._count(key, size)
        return True

    def _give_up(self, error: OSError) -> None:
        """Write no more; what was written is still read."""
        self._disk_left = 0
        place, problem = str(self._folder), error.strerror
        structlog.get_logger().warning("hidden states are not kept on disk", folder=place, problem=problem)


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
