"""Worker processes: one a job, from a server process that has imported torch once, so that a job starts at once."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running, set_forkserver_preload
from multiprocessing.process import BaseProcess
from typing import Any

from meerkat_mq.errors import MeerkatError

WORK = "meerkat_mq.sweep.cell"

_CONTEXT = multiprocessing.get_context("forkserver")
_LOOK_S = 0.5
_REPORT_S = 0.5
_TRACE_LINES = 12
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")


@dataclass(frozen=True)
class Job:
    """Work for a process of its own: `function(*arguments, report)`, where `report(share)` says how much is done.

    The function is one of `WORK`, by its name: who leads never imports torch.
    """

    name: str
    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What a job came to: its value, or the error that ended it.

    Attributes:
        error: in words.
        trace: the last lines of the traceback of an error that is not of our own tree.
    """

    job: Job
    value: Any = None
    error: str | None = None
    trace: str | None = None
    seconds: float = 0.0

    @property
    def failure(self) -> dict[str, str]:
        """What a row says of the error."""
        found = {"failed": self.error, "trace": self.trace}
        return {column: text for column, text in found.items() if text is not None}


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    connection: Connection
    began: float
    share: float = 0.0


class Workers:
    """Runs jobs, so many at a time; leaving the context ends those that still run."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._running: list[_Running] = []

    def __enter__(self) -> "Workers":
        """Start the server of processes, deaf to a terminal's Ctrl-C, with one thread for each process's sums."""
        os.environ.update(dict.fromkeys(_THREADS, "1") | {"TOKENIZERS_PARALLELISM": "false"})
        set_forkserver_preload(["__main__", WORK])
        resource_tracker.ensure_running()  # here, since it would let SIGINT through again
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        for running in self._running:
            running.process.kill()
        for running in self._running:
            running.process.join()
        self._running.clear()

    @property
    def shares(self) -> dict[str, float]:
        """How much is done of each job that runs, by name."""
        return {running.job.name: running.share for running in self._running}

    def run(self, jobs: Sequence[Job], look: Callable[[], None] = lambda: None) -> Iterator[Outcome]:
        """Run jobs in order; yields each outcome as it comes, and calls `look` twice a second at least."""
        waiting = deque(jobs)
        while waiting or self._running:
            while waiting and len(self._running) < self._processes:
                with _undisturbed():
                    self._running.append(_start(waiting.popleft()))
            ready = wait([running.connection for running in self._running], timeout=_LOOK_S)
            for running in [running for running in self._running if running.connection in ready]:
                outcome = _hear(running)
                if outcome is not None:
                    self._running.remove(running)
                    yield outcome
            look()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put SIGINT and SIGTERM off for a moment: a process that is half started would end with a traceback."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came[:1]:
            signal.raise_signal(late)


def _start(job: Job) -> _Running:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_work, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Running(job, process, ours, time.monotonic())


def _hear(running: _Running) -> Outcome | None:
    """The outcome, or None where the process only said how far it is."""
    try:
        kind, value = running.connection.recv()
    except (EOFError, OSError):
        kind, value = "error", None
    if kind == "share":
        running.share = value
        return None
    running.process.join()
    running.connection.close()
    seconds = time.monotonic() - running.began
    if kind == "value":
        return Outcome(running.job, value=value, seconds=seconds)
    if value is None:
        value = (f"its process ended with exit code {running.process.exitcode}; -9 is mostly for want of memory", None)
    error, trace = value
    return Outcome(running.job, error=error, trace=trace, seconds=seconds)


# --- in the worker's process ---


def _work(job: Job, connection: Connection) -> None:
    """Do the job; whatever goes wrong is told, and ends this process alone."""
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    _one_thread()
    last = 0.0

    def report(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_S:
            last = now
            connection.send(("share", share))

    try:
        work = getattr(importlib.import_module(WORK), job.function)
        answer = ("value", work(*job.arguments, report))
    except Exception as error:  # a cell may fail in any way; the grid goes on
        answer = ("error", in_words(error))
    with contextlib.suppress(OSError):
        connection.send(answer)


def _end_with(connection: Connection) -> None:
    """End this process when the one that wants its answer is gone."""
    with contextlib.suppress(EOFError, OSError):
        connection.poll(None)
        connection.recv()
    os._exit(1)


def _one_thread() -> None:
    from meerkat_mq.engines.torch.load import set_threads  # noqa: PLC0415 - the leader never imports torch

    set_threads(1)


def in_words(error: Exception) -> tuple[str, str | None]:
    """An error in one line, and the last lines of its traceback, where the one line does not say it all."""
    if isinstance(error, MeerkatError):
        return str(error), None
    text = str(error).strip().split("\n", 1)[0]
    trace = "".join(traceback.format_exception(error)).rstrip().split("\n")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__, "\n".join(trace[-_TRACE_LINES:])
