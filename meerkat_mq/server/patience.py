"""What a disk can do to a ledger for a while, and how long a server waits for it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import LedgerFailing, LedgerUnavailable

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
FAILING_S = 20.0  # of reading and writing, not of a full disk: then the disk is broken

Result = TypeVar("Result")


async def patiently(work: Callable[[], Awaitable[Result]]) -> Result:
    """Do what reads or writes the ledger, again and again while its disk cannot take it.

    Args:
        work: changes nothing where it raises.

    Raises:
        LedgerFailing: its disk has given errors for 20 s.
        MeerkatError: whatever else `work` raises.
    """
    log, seldom, pause, loop = structlog.get_logger(), Seldom(), FIRST_PAUSE_S, asyncio.get_running_loop()
    began = loop.time()
    while True:
        try:
            result = await work()
        except LedgerUnavailable as error:
            if isinstance(error, LedgerFailing) and loop.time() - began > FAILING_S:
                raise
            seldom.say(log.warning, "ledger not available, trying again", problem=str(error))
        else:
            if pause > FIRST_PAUSE_S:
                log.info("ledger available again", after_s=round(loop.time() - began, 1))
            return result
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
