"""What a node keeps between starts: a lock, the step counter, masks. Losing it costs a `want`, never correctness."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.mask import Mask
from meerkat_mq.errors import ConfigError, MaskError


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
