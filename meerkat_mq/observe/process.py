"""The frame around a process: signals end it in order, errors become one line and an exit code."""

import asyncio
import contextlib
import os
import resource
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import structlog

from meerkat_mq.errors import (
    ConfigError,
    DataError,
    MaskError,
    MeerkatError,
    ModelError,
    TaskError,
    printable,
    without_credentials,
)
from meerkat_mq.observe import signals
from meerkat_mq.observe.start import SIGNALLED

PRIVATE = 0o077  # the systemd units' UMask
_FROM_CONFIG = (ConfigError, DataError, MaskError, ModelError, TaskError)


class Threads(ThreadPoolExecutor):
    """Threads that nobody waits for once a signal ends the process: what they write is whole, or not there."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads, after their work unless a signal came."""
        ending = signals.State.first is not None
        super().shutdown(wait and not ending, cancel_futures=cancel_futures or ending)


def run_process(command: Callable[[], object]) -> NoReturn:
    """Run a command to the end of this process.

    Its exit code is the command's, that of the MeerkatError that ended it, written on stderr as one line, or, where a
    signal cut it short, 128 + its number.
    """
    code = _outcome(command)
    if signals.State.first is not None:
        os._exit(code)  # threads may be deep in a model
    sys.exit(code)


def _outcome(command: Callable[[], object]) -> int:
    try:
        with signals.handled(signals.interrupt):
            command()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        number = signals.State.first
        if number is not None:  # whatever a library, half imported perhaps, made of Interrupted
            signals.say(number)
            return SIGNALLED + number
        if not isinstance(error, MeerkatError):
            raise
        say_error(error)
        return error.exit_code
    return 0


def run_service(main: Callable[[], Coroutine[Any, Any, None]], *, config: Path | None = None) -> int:
    """Run a service until it ends, SIGTERM or SIGINT; a second signal ends it at once.

    Args:
        main: makes the service.
        config: its TOML file, put before errors in what that file names.

    Returns:
        0, also where a signal ended it in order; or the exit code of the MeerkatError that ended it, which is written
        on stderr as one line.
    """
    signals.State.patience_s = signals.IN_ORDER_S
    try:
        _run(main)
    except MeerkatError as error:
        say_error(error, config)
        return error.exit_code
    structlog.get_logger().info("stopped")
    return 0


def run_task(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what has an end of its own, in the frame of `run_process`.

    Raises:
        MeerkatError: ended it.
        Interrupted: a signal did.
    """
    try:
        _run(main)
    finally:
        if (number := signals.State.first) is not None:
            raise signals.Interrupted(number)


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """What a service or a drill writes is its owner's alone: state folders hold what came of private rows."""
    before = os.umask(PRIVATE)
    try:
        asyncio.run(_until_signal(main()))
    except BaseExceptionGroup as caught:
        if (error := first_error(caught)) is None:
            raise
        raise error from None
    finally:
        os.umask(before)


def say_error(error: MeerkatError, config: Path | None = None) -> None:
    """Write an error on stderr, as one line."""
    file = "" if config is None else without_credentials(str(config))
    named = str(error).startswith(file) or not isinstance(error, _FROM_CONFIG)
    line = printable(str(error) if named else f"{file}: {error}")
    print(f"meerkat: {line}", file=sys.stderr)  # noqa: T201


async def _until_signal(main: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(Threads(thread_name_prefix="asyncio"))
    task = asyncio.ensure_future(main)

    def end(_: int) -> None:
        loop.call_soon_threadsafe(cancel)

    def cancel() -> None:
        signals.State.patience_s = signals.IN_ORDER_S  # the loop is not stuck: children are being ended, perhaps
        task.cancel()

    with signals.handled(end), contextlib.suppress(asyncio.CancelledError):
        await task


def first_error(error: BaseException) -> MeerkatError | None:
    """The first MeerkatError in a group, however deep; None where something else went wrong too."""
    if isinstance(error, BaseExceptionGroup):
        found = [first_error(inner) for inner in error.exceptions]
        return None if None in found else found[0]
    return error if isinstance(error, MeerkatError) else None


def peak_rss_mib() -> float:
    """The largest resident memory of this process so far, in MiB."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        kib = int(fields["VmHWM"].split()[0])
    except (OSError, KeyError):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux a child's starts at its parent's
    return round(kib / 1024, 1)
