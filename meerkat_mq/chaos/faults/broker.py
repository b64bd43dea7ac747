"""Faults of the broker. It keeps nothing on a disk, so it comes back without retained messages."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from meerkat_mq.chaos.faults.fault import Fault
from meerkat_mq.chaos.stage import Stage


class BrokerStop(Fault):
    """SIGTERM; started again on the same port."""

    name = "broker-stop"
    on = "broker"
    attachable = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        await stage.broker.stop()
        yield
        await stage.broker.start()


class BrokerKill(Fault):
    """SIGKILL, so that what was in flight is gone too; started again on the same port."""

    name = "broker-kill"
    on = "broker"
    attachable = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        await stage.broker.kill()
        yield
        await stage.broker.start()


class AuthRefused(Fault):
    """The broker's password store is empty: it ends the connections of all its users, and refuses them."""

    name = "auth-refused"
    on = "broker"
    attachable = False
    secured = True

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        stage.credentials.store(empty=True)
        stage.broker.reload()
        try:
            yield
        finally:
            stage.credentials.store()
            stage.broker.reload()
