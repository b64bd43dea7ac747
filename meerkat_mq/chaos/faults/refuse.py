"""A link that nobody gets through."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class Refuse(Fault):
    """Connections are reset, new ones too."""

    name: ClassVar[str] = "refuse"
    on: ClassVar[Place] = "link"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Close the door, open it."""
        link = stage.links[target]
        link.refuse = True
        link.reset()
        try:
            yield
        finally:
            link.refuse = False
