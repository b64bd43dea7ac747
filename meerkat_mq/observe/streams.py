"""Standard output and standard error of a process, from its first moment on.

Diagnostics (log lines, progress, errors in words) end nobody: what cannot be written is dropped and counted. Answers
(what a command was asked for) end the command that cannot give them.
"""

import io
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TextIO

from meerkat_mq.errors import ConfigError
from meerkat_mq.observe import signals

PIECE = 4096  # a pipe that is ready takes so many bytes without making us wait
PATIENCE_MS = 250  # of a reader that is slow, not stuck


class _Stream(io.RawIOBase):
    """What a text stream writes to: another file, of which only the descriptor is used."""

    def __init__(self, file: IO[Any]) -> None:
        super().__init__()
        self._file = file

    def fileno(self) -> int:
        """The other file's."""
        return self._file.fileno()

    def isatty(self) -> bool:
        """Whether somebody looks at it; not where it is closed."""
        with suppress(OSError, ValueError):
            return os.isatty(self.fileno())
        return False

    def writable(self) -> bool:
        """Always."""
        return True


class Diagnostics(_Stream):
    """Writes what it can: a full disk, a reader that left or stands still costs lines, never the caller.

    Attributes:
        dropped: lines since the last that was written.
        notice: words `dropped` for the line that goes before the first one that is written again.
    """

    def __init__(self, file: IO[Any]) -> None:
        super().__init__(file)
        self.dropped = 0
        self.notice: Callable[[int], str] = lambda count: f"meerkat: {count} lines dropped\n"
        self._torn = False
        self._stuck = False

    def write(self, data: Any) -> int:
        """Write all of it, or drop it and count its lines."""
        lost = self.notice(self.dropped).encode() if self.dropped else b""
        whole = memoryview(b"\n" * self._torn + lost + bytes(data))
        rest = whole
        try:
            while rest:
                rest = rest[self._write_piece(rest[:PIECE]) :]
        except (OSError, ValueError):
            self._torn |= len(rest) < len(whole)
            self.dropped += max(1, bytes(data).count(b"\n"))
        else:
            self.dropped, self._torn = 0, False
        return len(data)

    def _write_piece(self, piece: memoryview) -> int:
        descriptor = self._file.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        self._stuck = not poll.poll(0 if self._stuck else PATIENCE_MS)
        if self._stuck:
            raise BlockingIOError
        return os.write(descriptor, piece)


class Answers(_Stream):
    """Standard output: once it cannot be written, the command ends, and what it still says is for nobody.

    A reader that left wants no more: that ends the command as a signal would, without a word.

    Raises:
        ConfigError: the disk is full, the descriptor closed.
    """

    _over = False

    def write(self, data: Any) -> int:
        """Write all of it."""
        rest = memoryview(bytes(data))
        while rest and not self._over:
            try:
                rest = rest[os.write(self._file.fileno(), rest) :]
            except BlockingIOError:
                select.select([], [self._file], [])
            except OSError as error:
                self._over = True
                if isinstance(error, BrokenPipeError):
                    (signals.State.handler or signals.leave)(signal.SIGPIPE)
                    break
                problem, remedy = f"cannot be written ({error.strerror})", "free space there, or send it elsewhere"
                raise ConfigError("standard output", problem, remedy) from error
        return len(data)


def lossy(file: TextIO) -> TextIO:
    """The same file as Diagnostics; one without a descriptor, in memory, as it is."""
    if isinstance(getattr(file, "buffer", None), Diagnostics):
        return file
    try:
        file.fileno()
    except (OSError, ValueError):
        return file
    return _text(Diagnostics(file), file.encoding, "backslashreplace")


def guard_standard_streams() -> None:
    """Make standard error lossy, and standard output honest; call it first of all in a process.

    A closed one is opened on nothing: else the next file that is opened, a ledger perhaps, would have its descriptor,
    and get what others write there.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY)  # to read: what is written there fails, as on what is closed
            os.set_inheritable(opened, True)
    encoding = getattr(sys.stdout, "encoding", "utf-8")
    answers, diagnostics = (io.FileIO(descriptor, "w", closefd=False) for descriptor in (1, 2))
    sys.stdout = _text(Answers(answers), encoding, getattr(sys.stdout, "errors", "strict"))
    sys.stderr = _text(Diagnostics(diagnostics), encoding, "backslashreplace")


def _text(raw: Any, encoding: str, errors: str) -> TextIO:
    return io.TextIOWrapper(raw, encoding, errors, write_through=True)
