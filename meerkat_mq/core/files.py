"""Files that a crash cannot tear."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, durable: bool = True, secret: bool = False) -> None:
    """Write a file so that a crash leaves the old one or the new one, whole.

    Args:
        path: the file.
        data: all of it.
        durable: wait until it would outlive a power cut.
        secret: only its owner can read it, from the first moment.

    Raises:
        OSError: the folder is missing, read-only or full; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        mode = 0o600 if secret else 0o666
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            keep_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def keep_names(folder: Path) -> None:
    """Wait until the names in a folder would outlive a power cut.

    Raises:
        OSError: there is no such folder, or its device fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
