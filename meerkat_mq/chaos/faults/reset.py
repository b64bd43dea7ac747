"""A connection that breaks, once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class Reset(Fault):
    """RST to both sides of what is open; new connections get through."""

    name: ClassVar[str] = "reset"
    on: ClassVar[Place] = "link"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Reset it."""
        stage.links[target].reset()
        yield
