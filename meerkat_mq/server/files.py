"""What lies in a server's state_dir, beside the ledger."""

from pathlib import Path

DIFFERENCE_FILE = "difference.mkd"


def snapshot_file(folder: Path, version: int) -> Path:
    """theta of a version, as a blob of `wire.snapshot`."""
    return folder / f"snapshot-{version}.mks"


def mask_file(folder: Path, mask_hash: bytes) -> Path:
    """The server's copy of the run's mask: with it, the folder is all that verification needs."""
    return folder / f"mask-{mask_hash.hex()}.mkm"
