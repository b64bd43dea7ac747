"""Waiting for a ledger's disk on the event loop, before there is a driver."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from meerkat_mq.errors import LedgerUnavailable
from meerkat_mq.runtime.patience import Patience

Result = TypeVar("Result")


async def patiently(job: Callable[[], Awaitable[Result]]) -> Result:
    """Do what reads or writes the ledger, again and again while its disk cannot take it.

    Args:
        job: changes nothing where it raises.

    Raises:
        LedgerFailing: its disk has given errors for 20 s.
        MeerkatError: whatever else `job` raises.
    """
    now = asyncio.get_running_loop().time
    patience = Patience(now())
    while True:
        try:
            result = await job()
        except LedgerUnavailable as error:
            await asyncio.sleep(patience.after(error, now()))
        else:
            patience.worked(now())
            return result
