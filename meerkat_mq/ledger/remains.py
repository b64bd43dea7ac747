"""What a run left in its folder besides the ledger: where the ledger is older than that, part of it was lost.

An empty ledger is a new run only in a folder that holds nothing of a run. A copy of `ledger.sqlite` alone, without what
SQLite still kept in `ledger.sqlite-wal`, is an older ledger; taken for the whole, it would begin or go on in silence
with rounds missing.
"""

from pathlib import Path

from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.files import DIFFERENCE_FILE
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.stamp import stamp_of

_PUT_BACK = "put back the whole ledger, with its -wal file, or a backup"


def check_remains(ledger: Path, run: RunDescriptor | None, version: int) -> None:
    """Refuse a ledger that is older than the files beside it, before anything of them is changed.

    Args:
        ledger: its file, which may be missing.
        run: that it holds; None where it holds none, or is missing.
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
