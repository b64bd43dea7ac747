"""A slow link."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Annotated, ClassVar

from pydantic import Field

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class Latency(Fault):
    """Packets take longer, each way.

    Attributes:
        latency_s: every packet.
        jitter_s: up to so much more, drawn for each packet; their order stays, as on every TCP connection.
    """

    name: ClassVar[str] = "latency"
    on: ClassVar[Place] = "link"

    latency_s: Annotated[float, Field(ge=0, le=60)] = 0.2
    jitter_s: Annotated[float, Field(ge=0, le=60)] = 0.2

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Slow it, restore it."""
        link = stage.links[target]
        before = link.latency_s, link.jitter_s
        link.latency_s, link.jitter_s = before[0] + self.latency_s, before[1] + self.jitter_s
        try:
            yield
        finally:
            link.latency_s, link.jitter_s = before
