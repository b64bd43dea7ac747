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
def alive(folder: Path) -> Iterator[bool]:
    """Be seen running on a folder; gives whether no other process is.

    A hint: where the folder's file system has no locks one is not seen, and always alone. What keeps two servers apart
    is the term.
    """
    descriptor, alone = None, True
    with suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        alone = not _is_held(descriptor)
    try:
        yield alone
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
            held = _is_held(descriptor)
        finally:
            os.close(descriptor)
    except (OSError, AttributeError):
        return None
    if held:
        return True
    return False if host in ("", socket.gethostname()) else None


def _is_held(descriptor: int) -> bool:
    """Whether a lock stands on the folder that was not set through this descriptor."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return bool(struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)
