"""The frame around a service: signals end it in order, errors become one line and an exit code."""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from meerkat_mq.errors import ConfigError, DataError, MaskError, MeerkatError, ModelError, TaskError
from meerkat_mq.observe.figures import printable

_FROM_CONFIG = (ConfigError, DataError, MaskError, ModelError, TaskError)


def run_service(main: Callable[[], Coroutine[Any, Any, None]], *, config: Path | None = None) -> int:
    """Run a service until it ends, SIGTERM or SIGINT; a second signal ends it at once.

    Args:
        main: makes the service.
        config: its TOML file, put before errors in what that file names.

    Returns:
        0, or the exit code of the MeerkatError that ended it; the error is written on stderr as one line.
    """
    try:
        asyncio.run(_until_signal(main()))
    except (MeerkatError, BaseExceptionGroup) as caught:
        error = first_error(caught)
        if error is None:
            raise
        print(f"meerkat: {_one_line(error, config)}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


def _one_line(error: MeerkatError, config: Path | None) -> str:
    named = config is None or str(error).startswith(str(config)) or not isinstance(error, _FROM_CONFIG)
    return printable(str(error) if named else f"{config}: {error}")


async def _until_signal(main: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main)

    def end(number: signal.Signals) -> None:
        if task.cancelling():  # asked twice: a worker thread may be deep in a model
            os._exit(128 + number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    with contextlib.suppress(asyncio.CancelledError):
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
