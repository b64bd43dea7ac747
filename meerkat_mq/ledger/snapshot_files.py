"""Snapshots as files beside a ledger."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.files import snapshot_file
from meerkat_mq.ledger.rows import KeptSnapshot


class SnapshotFiles:
    """The snapshot files of one folder, whose ledger knows their hashes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen_whole: tuple[bytes, int] | None = None

    def name(self, version: int) -> str:
        """The path of one."""
        return str(snapshot_file(self._folder, version))

    def write(self, version: int, blob: bytes) -> None:
        """Write one, whole or not at all.

        Raises:
            LedgerError: the folder is full or read-only.
        """
        try:
            write_atomically(snapshot_file(self._folder, version), blob)
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise LedgerError(
                self.name(version), problem, "free space, and start the server again: it goes on"
            ) from error

    def read(self, version: int) -> bytes | None:
        """Its bytes, whatever became of them; None where there is no such file.

        Raises:
            LedgerError: it cannot be read.
        """
        try:
            return snapshot_file(self._folder, version).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(self.name(version), f"cannot be read ({error.strerror})") from error

    def has_whole(self, kept: KeptSnapshot) -> bool:
        """Whether it is there and undamaged; read once, and again where it was written since."""
        try:
            seen = (kept.hash, snapshot_file(self._folder, kept.version).stat().st_mtime_ns)
            if self._seen_whole != seen and short_hash(self.read(kept.version) or b"") == kept.hash:
                self._seen_whole = seen
        except (OSError, LedgerError):
            return False
        return self._seen_whole == seen

    def sweep(self, known: Iterable[KeptSnapshot]) -> None:
        """Remove all that are not known, and what an interrupted write left."""
        files = {snapshot_file(self._folder, kept.version) for kept in known}
        for file in (*self._folder.glob("snapshot-*.mks"), *self._folder.glob(".snapshot-*.mks.*")):
            if file not in files:
                with suppress(OSError):
                    file.unlink()
