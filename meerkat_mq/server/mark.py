"""A mark in a server's folder that lasts as long as its process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "server.lock"


@contextmanager
def marked(folder: Path) -> Iterator[bool]:
    """Leave a mark in the folder; gives whether no other process has one there.

    A hint, and where the file system has no locks always True: what keeps two servers apart is the term.
    """
    try:
        descriptor = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield True
        return
    try:
        yield _is_alone(descriptor)
    finally:
        os.close(descriptor)


def _is_alone(descriptor: int) -> bool:
    """Whether an exclusive lock could be had; it becomes a shared one, for the next process to run into."""
    alone = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        pass
    return alone
