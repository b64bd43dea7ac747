"""A half-open link."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar, Literal

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class Freeze(Fault):
    """Connections stay, nothing goes through; what waits goes through when it heals.

    Attributes:
        way: "up" to the broker, "down" from it, or "both".
    """

    name: ClassVar[str] = "freeze"
    on: ClassVar[Place] = "link"

    way: Literal["up", "down", "both"] = "both"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Freeze it, thaw it."""
        link = stage.links[target]
        link.freeze(up=self.way != "down", down=self.way != "up")
        try:
            yield
        finally:
            link.thaw()
