"""The broker is killed, and comes back empty."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class BrokerKill(Fault):
    """SIGKILL; without persistence, so retained messages and what was in flight are gone."""

    name: ClassVar[str] = "broker-kill"
    on: ClassVar[Place] = "broker"
    attachable: ClassVar[bool] = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Kill it, start it on the same port."""
        await stage.broker.kill()
        yield
        await stage.broker.start()
