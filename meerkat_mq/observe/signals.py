"""SIGINT and SIGTERM, at any moment of a process's life: one word, 128 + number, within two seconds.

The one place for this rule. `listen` comes first in a process, before anything that takes long to import. Then:

- while it starts, a signal ends it at once: nothing is at stake yet;
- a command is interrupted: `Interrupted` is raised wherever it is, and files stay whole;
- a service ends in order (`handled`), and has `IN_ORDER_S` for it.

A second signal, or the end of that patience, ends the process on the spot: no worse than a power cut, which costs
nothing.
"""

import _thread
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from meerkat_mq.observe.start import SIGNALLED, WORDS

IN_ORDER_S = 10.0
AT_ONCE_S = 1.5
_IMPORTER = "<frozen importlib._bootstrap>"


class Interrupted(BaseException):
    """SIGINT or SIGTERM ends a command; or SIGPIPE, as it were: nobody reads what it says."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)

    @property
    def word(self) -> str:
        """What is said of it."""
        return WORDS.get(self.number, "")

    @property
    def exit_code(self) -> int:
        """As of a process that the signal ended."""
        return SIGNALLED + self.number


class State:
    """What this process knows of signals.

    Attributes:
        first: the first one that came.
        patience_s: the time that what it ends has, from then on.
        handler: what is called when the first one comes; None: the process ends.
    """

    first: int | None = None
    patience_s = AT_ONCE_S
    handler: Callable[[int], None] | None = None


def listen() -> None:
    """From now on, signals count; also for a process 1, for which the kernel does nothing by itself."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in WORDS:
        signal.signal(number, lambda number, _: leave(number))
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WORDS)  # the thread takes none: they wait for the main thread
    _thread.start_new_thread(_end_late, (reading,))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def say(number: int) -> None:
    """Say the one word."""
    if number in WORDS:
        with suppress(Exception):
            sys.stderr.write(f"{WORDS[number]}\n")


def leave(number: int) -> NoReturn:
    """End this process on the spot, in a word."""
    say(number)
    os._exit(SIGNALLED + number)


@contextmanager
def handled(action: Callable[[int], None]) -> Iterator[None]:
    """Within, the first signal calls `action`, in the main thread, wherever that is; a second one ends the process."""

    def heard(number: int, _: FrameType | None = None) -> None:
        if State.first is not None:
            leave(number)
        State.first = number
        action(number)

    outer, State.handler = State.handler, heard
    before = {number: signal.signal(number, heard) for number in WORDS}
    try:
        yield
    finally:
        State.handler = outer
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int) -> NoReturn:
    """Raise Interrupted: the action of commands.

    In the middle of an import, leave instead: compiled libraries abort where what they import raises.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTER:
            leave(number)
        frame = frame.f_back
    raise Interrupted(number)


def _end_late(reading: int) -> None:
    """End this process where a signal did not: a library holds the main thread, or the loop is stuck."""
    while (number := os.read(reading, 1)[0]) not in WORDS:
        pass
    began = time.monotonic()
    while (left := began + State.patience_s - time.monotonic()) > 0:
        time.sleep(left)
    leave(number)
