"""A folder that one process uses at a time: a lock that ends with its process, and who holds it.

The kernel keeps the lock (flock), so a killed process, or a container that is no more, leaves none behind. The file
says who holds it. Some volumes know no locks (ENOSYS, ENOLCK, …). There, the file is believed where it names a process
of this host that still runs; nothing else keeps a second process out.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from meerkat_mq.core.foreign import parse_json
from meerkat_mq.errors import ConfigError

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a disk can do for a while


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    boot: str
    started: str  # when the process began, in the kernel's own figures; with `boot` it tells processes of one id apart
    since: str  # when it took the lock, as people write it

    @classmethod
    def here(cls) -> Self:
        """This process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(os.getpid(), socket.gethostname(), _boot(), _started(os.getpid()), now)

    @property
    def runs(self) -> bool:
        """Whether it is a process of this host that still runs, and not this one."""
        ours = self.host == socket.gethostname() and self.boot == _boot() and self.pid != os.getpid()
        return ours and self.started != "" and self.started == _started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"


@contextmanager
def locked(file: Path, where: str, user: str) -> Iterator[bool]:
    """Hold a lock on a file, which is made where it is missing; gives whether the volume has locks.

    Args:
        where: what it stands for, for an error.
        user: what may hold it, in words: "node process".

    Raises:
        ConfigError: another process holds it; names that.
        OSError: the folder cannot be read or written.
    """
    descriptor = _open(file)
    try:
        has_locks = _take(descriptor, where, user)
        _write(descriptor, Holder.here())
        yield has_locks
        _write(descriptor, None)
    finally:
        os.close(descriptor)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in PASSING or not file.exists():
            raise
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC)  # it worked before, and a lock needs no more


def _take(descriptor: int, where: str, user: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read(descriptor)
        held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        if held or (holder is not None and holder.runs):
            raise ConfigError(where, f"is in use by another {user}: {holder or 'unknown'}", _remedy(holder)) from None
        return False
    return True


def _remedy(holder: Holder | None) -> str:
    end = "end it" if holder is None or holder.host == socket.gethostname() else f"end it on {holder.host}"
    return f"{end}, or give each its own folder"


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**parse_json(os.pread(descriptor, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None


def _write(descriptor: int, holder: Holder | None) -> None:
    """Best effort: on a full disk the lock is one all the same."""
    try:
        os.ftruncate(descriptor, 0)
        if holder is not None:
            os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)
    except OSError:
        return


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since boot; empty where it is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
