"""A connection for nothing but to see whether the broker takes it."""

import asyncio
from typing import Any

from meerkat_mq.config import BrokerConfig
from meerkat_mq.mqtt.connection import Connection
from meerkat_mq.mqtt.timeouts import Timeouts


async def takes_without_will(broker: BrokerConfig, client_id: str, timeouts: Timeouts) -> bool:
    """Whether the broker takes this client when it leaves no will behind; the connection is ended again."""
    connection = Connection(broker, client_id, will=None, on_message=lambda message: None, timeouts=timeouts)
    opening = asyncio.create_task(connection.open())
    try:
        ends: set[asyncio.Future[Any]] = {opening, connection.ended}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return opening.done() and opening.exception() is None
    finally:
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await connection.end(orderly=True)
