"""A process stands still, and goes on."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class Sigstop(Fault):
    """SIGSTOP, then SIGCONT."""

    name: ClassVar[str] = "sigstop"
    on: ClassVar[Place] = "process"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Stop it, let it go on."""
        process = stage.processes[target]
        process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.signal(signal.SIGCONT)
