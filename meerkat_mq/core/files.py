"""Files that a crash cannot tear."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file so that a crash leaves the old one or the new one, whole.

    Args:
        path: the file.
        data: all of it.
        durable: wait until it would outlive a power cut.

    Raises:
        OSError: the folder is missing, read-only or full; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
