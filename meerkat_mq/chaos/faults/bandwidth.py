"""A narrow link."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Annotated, ClassVar

from pydantic import Field

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class Bandwidth(Fault):
    """So many bytes a second, each way.

    Attributes:
        bytes_per_s: of MQTT, without TCP and IP.
    """

    name: ClassVar[str] = "bandwidth"
    on: ClassVar[Place] = "link"

    bytes_per_s: Annotated[float, Field(ge=1)] = 4000.0

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Narrow it, widen it."""
        link = stage.links[target]
        link.bytes_per_s = self.bytes_per_s
        try:
            yield
        finally:
            link.bytes_per_s = None
