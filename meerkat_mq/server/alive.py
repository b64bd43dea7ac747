"""Whether a server runs on a state folder: it holds a lock on the folder, which ends with its process.

A killed server leaves nothing behind, and the folder gets no file. Who asks takes no lock, so any number may ask at a
time. It needs no broker.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_FLOCK: Final = (
    "hhqqi"  # struct flock: type, whence, start, length (0: to the end), pid (0: as open file locks want it)
)


@contextmanager
def alive(folder: Path) -> Iterator[None]:
    """Be seen running on a folder. Where its file system has no locks, one is not seen."""
    descriptor = None
    with suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_alive(folder: Path, host: str) -> bool | None:
    """Whether a server runs on a folder.

    Args:
        folder: its state_dir.
        host: of its newest term; "" before the first.

    Returns:
        None where that cannot be known: the server is of another host, or there are no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
        finally:
            os.close(descriptor)
    except (OSError, AttributeError):
        return None
    if found[0] != fcntl.F_UNLCK:
        return True
    return False if host in ("", socket.gethostname()) else None
