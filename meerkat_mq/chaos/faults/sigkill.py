"""A process is killed, and started again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class Sigkill(Fault):
    """SIGKILL; started again when it heals, as a service manager would."""

    name: ClassVar[str] = "sigkill"
    on: ClassVar[Place] = "process"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Kill it, start it."""
        process = stage.processes[target]
        await process.kill()
        yield
        await process.start()
