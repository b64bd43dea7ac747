"""A disk that takes nothing for a while."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class DiskFull(Fault):
    """Every write to a file fails: the kernel's limit on the size of the process's files is 0 (EFBIG)."""

    name: ClassVar[str] = "disk-full"
    on: ClassVar[Place] = "process"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Set the limit, lift it."""
        process = stage.processes[target]
        process.limit_files(0)
        try:
            yield
        finally:
            process.limit_files(None)
