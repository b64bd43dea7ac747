"""Standard error of a drill's service: a pipe whose reader writes the log file.

A service that writes its log into a file never meets what a log collector does to it: the reader ends (each write then
fails with EPIPE), or it stands still (the pipe fills up, and a write that waits stops its process). The drill keeps the
pipe's writing end, by which Linux lets it open a reading end again: so both heal, as when a log collector comes back.
"""

import asyncio
import contextlib
import fcntl
import os
from pathlib import Path

_READ_BYTES = 65_536
_SMALL_BYTES = 4096  # of a pipe whose reader stands still: the kernel's least, so that it is full within seconds


class LogPipe:
    """The pipe, whose writing end processes get, and its reader, on the event loop that calls these methods."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._reader: int | None = None
        reader, self.writer = os.pipe()
        os.close(reader)

    def read(self) -> None:
        """Read, at first and after `leave` and `stand_still`."""
        if self._reader is None:
            self._reader = os.open(f"/proc/self/fd/{self.writer}", os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _READ_BYTES)
        asyncio.get_running_loop().add_reader(self._reader, self.drain)

    def stand_still(self) -> None:
        """Read no more; a small pipe fills up."""
        if self._reader is not None:
            asyncio.get_running_loop().remove_reader(self._reader)
            with contextlib.suppress(OSError):  # it holds more than that already
                fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _SMALL_BYTES)

    def leave(self) -> None:
        """End the reader: writes fail with EPIPE."""
        if self._reader is not None:
            self.drain()
            self.stand_still()
            os.close(self._reader)
            self._reader = None

    def close(self) -> None:
        """Give both ends back."""
        self.leave()
        os.close(self.writer)

    def drain(self) -> None:
        """Write down all that has come."""
        if self._reader is None:
            return
        with contextlib.suppress(BlockingIOError), self._log.open("ab") as file:
            while data := os.read(self._reader, _READ_BYTES):
                file.write(data)
