"""A log that takes no more lines for a while."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar, Literal

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class LogFull(Fault):
    """Standard error of a process is a pipe that nobody empties.

    Attributes:
        how: "left": its reader ended, and writes fail; "stalled": its reader stands still, and writes wait once the
            pipe is full.
    """

    name: ClassVar[str] = "log-full"
    on: ClassVar[Place] = "process"
    attachable: ClassVar[bool] = False

    how: Literal["left", "stalled"] = "left"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Stop reading, read again."""
        log = stage.services[target].log_pipe
        (log.leave if self.how == "left" else log.stand_still)()
        try:
            yield
        finally:
            log.read()
