"""A host that loses power."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class HostPowerCut(Fault):
    """SIGKILL, and the broker does not notice: no FIN, no reset, no last will until the keep-alive runs out.

    Started again when it heals, the process finds its own retained "online" of before.
    """

    name: ClassVar[str] = "host-power-cut"
    on: ClassVar[Place] = "process"
    attachable: ClassVar[bool] = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Cut it, restore it."""
        process = stage.processes[target]
        stage.links[target].abandon()
        await process.kill()
        yield
        await process.start()
