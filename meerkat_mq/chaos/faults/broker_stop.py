"""The broker is stopped in order, and comes back empty."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class BrokerStop(Fault):
    """SIGTERM; without persistence, so retained messages are gone."""

    name: ClassVar[str] = "broker-stop"
    on: ClassVar[Place] = "broker"
    attachable: ClassVar[bool] = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Stop it, start it on the same port."""
        await stage.broker.stop()
        yield
        await stage.broker.start()
