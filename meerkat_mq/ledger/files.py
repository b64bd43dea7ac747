"""What lies in a server's state_dir, beside the ledger."""

from pathlib import Path

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.registry import ENGINES
from meerkat_mq.errors import LedgerError
from meerkat_mq.wire.descriptor import RunDescriptor

DIFFERENCE_FILE = "difference.mkd"


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
    try:
        if made_mask(run) is None and not file.exists():
            mask.save(file)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise LedgerError(str(file), problem, "free space, and start the server again: it goes on") from error
