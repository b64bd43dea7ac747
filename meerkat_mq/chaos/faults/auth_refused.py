"""A broker that knows nobody for a while."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class AuthRefused(Fault):
    """The broker's password store is empty: it ends the connections of all its users, and refuses them."""

    name: ClassVar[str] = "auth-refused"
    on: ClassVar[Place] = "broker"
    attachable: ClassVar[bool] = False
    secured: ClassVar[bool] = True

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Empty it, fill it again."""
        stage.credentials.store(empty=True)
        stage.broker.reload()
        try:
            yield
        finally:
            stage.credentials.store()
            stage.broker.reload()
