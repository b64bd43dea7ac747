"""The frame around a service: signals end it in order, errors become one line and an exit code."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from meerkat_mq.errors import MeerkatError


def run_service(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run a service until it ends, SIGTERM or SIGINT.

    Returns:
        0, or the exit code of the MeerkatError that ended it; the error is written on stderr as one line.
    """
    try:
        asyncio.run(_until_signal(main()))
    except (MeerkatError, BaseExceptionGroup) as caught:
        error = first_error(caught)
        if error is None:
            raise
        print(f"meerkat: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


async def _until_signal(main: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def first_error(error: BaseException) -> MeerkatError | None:
    """The first MeerkatError in a group, however deep; None where something else went wrong too."""
    if isinstance(error, BaseExceptionGroup):
        found = [first_error(inner) for inner in error.exceptions]
        return None if None in found else found[0]
    return error if isinstance(error, MeerkatError) else None
