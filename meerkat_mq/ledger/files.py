"""What lies in a server's state_dir beside the ledger: snapshots, the mask, the difference file.

They tell of a run too: where the ledger is older than they are, a part of it was lost. An empty ledger is a new run
only in a folder that holds nothing of a run. A copy of `ledger.sqlite` alone, without what SQLite still kept in
`ledger.sqlite-wal`, is an older ledger; taken for the whole, it would begin or go on in silence with rounds missing.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from meerkat_mq.core.files import write_atomically, writing
from meerkat_mq.core.foreign import read_regular
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import short_hash
from meerkat_mq.engines.registry import ENGINES
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.store import KeptSnapshot
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.snapshot import stamp_of

DIFFERENCE_FILE = "difference.mkd"
_PUT_BACK = "put back the whole ledger, with its -wal file, or a backup"
_FREE_SPACE = "free space, and start the server again: it goes on"


def snapshot_file(folder: Path, version: int) -> Path:
    """theta of a version, as a blob of `wire.snapshot`."""
    return folder / f"snapshot-{version}.mks"


def mask_file(folder: Path, mask_hash: bytes) -> Path:
    """The server's copy of the run's mask: with it, the folder is all that verification needs."""
    return folder / f"mask-{mask_hash.hex()}.mkm"


def made_mask(run: RunDescriptor) -> Mask | None:
    """The mask of an engine of this package whose masks are made from their size alone; None of any other."""
    engine = ENGINES.get(run.engine)
    return None if engine is None or engine.mask is None else engine.mask(run.weights)


def keep_mask(folder: Path, run: RunDescriptor, mask: Mask) -> None:
    """Write that copy, unless it is there; once a run is begun, since without a ledger it tells of a lost one.

    Raises:
        LedgerError: the folder is full or read-only.
    """
    file = mask_file(folder, run.mask_hash)
    with writing(str(file), _FREE_SPACE, LedgerError):
        if made_mask(run) is None and not file.exists():
            mask.save(file)


class SnapshotFiles:
    """The snapshot files of one folder, whose ledger knows their hashes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen_whole: tuple[bytes, int] | None = None

    def name(self, version: int) -> str:
        """The path of one."""
        return str(snapshot_file(self._folder, version))

    def write(self, version: int, blob: bytes) -> None:
        """Write one, whole or not at all; LedgerError where the folder is full or read-only."""
        with writing(self.name(version), _FREE_SPACE, LedgerError):
            write_atomically(snapshot_file(self._folder, version), blob)

    def read(self, version: int) -> bytes | None:
        """Its bytes, whatever became of them; None where there is no such file; LedgerError where it is unreadable."""
        try:
            return read_regular(snapshot_file(self._folder, version))
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


def check_remains(ledger: Path, run: RunDescriptor | None, version: int) -> None:
    """Refuse a ledger that is older than the files beside it, before anything of them is changed.

    Args:
        ledger: its file, which may be missing.
        run: that it holds; None where it holds none.
        version: where it ends.

    Raises:
        LedgerError: names the file beside it, and a remedy that loses nothing.
    """
    if run is None:
        _check_nothing_remains(ledger)
        return
    for file, run_id, its_version in _thetas(ledger.parent):
        if run_id != run.run_id:
            problem = f"is of run {run.run[:8]}, but {file.name} beside it is of run {run_id.hex()[:8]}"
            raise LedgerError(str(ledger), problem, f"put back the ledger of that run, or move {file.name} elsewhere")
        if its_version > version:
            problem = f"ends at version {version}, but {file.name} beside it is of version {its_version}"
            remedy = f"{_PUT_BACK} that is newer; to go on from this one, move {file.name} elsewhere"
            raise LedgerError(str(ledger), problem, remedy)


def _check_nothing_remains(ledger: Path) -> None:
    missing = not ledger.exists()
    found = [*(file for file, *_ in _thetas(ledger.parent)), *sorted(ledger.parent.glob("mask-*.mkm"))]
    if missing and (wal := ledger.with_name(f"{ledger.name}-wal")).exists():
        found.append(wal)
    if found:
        problem = f"{'is missing' if missing else 'holds no run'}, but {found[0].name} beside it is of one"
        raise LedgerError(str(ledger), problem, f"{_PUT_BACK}; for a new run, name another state_dir")


def _thetas(folder: Path) -> list[tuple[Path, bytes, int]]:
    """Snapshots and the difference file, with run id and version, the newest first; what is torn tells nothing."""
    files = (*folder.glob("snapshot-*.mks"), folder / DIFFERENCE_FILE)
    found = [(file, *stamp) for file in files if (stamp := stamp_of(file)) is not None]
    return sorted(found, key=lambda theta: theta[2], reverse=True)
