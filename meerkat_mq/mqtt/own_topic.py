"""Whether the broker lets us publish on our own topic, and keeps what is retained there."""

import asyncio
import contextlib

from meerkat_mq.mqtt.connection import Connection
from meerkat_mq.mqtt.message import Message
from meerkat_mq.mqtt.outbox import Outgoing


class OwnTopic:
    """Asks, on one connection, whether what was published on the topic of our will comes back, as it should.

    Some brokers acknowledge what their ACL denies, and drop it; some forget that a message was to be retained.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.is_known = False
        self._payload: bytes | None = None
        self._acknowledged, self._kept = asyncio.Event(), asyncio.Event()
        self._came_back = self._asks = False
        self._heard = asyncio.Event()

    def acknowledged(self, out: Outgoing) -> None:
        """The broker acknowledged this message."""
        if out.topic == self.topic and out.retain:
            self._payload = out.payload
            self._acknowledged.set()

    def is_answer(self, message: Message) -> bool:
        """Look at a message that came; whether it came because we asked, and is news to nobody."""
        self._heard.set()
        if message.topic != self.topic:
            return False
        self._came_back |= not message.retained
        if not (self._asks and message.retained):
            return False
        self._kept.set()
        return message.payload == self._payload

    async def ask(self, connection: Connection, quiet_s: float) -> str | None:
        """Wait until the broker has acknowledged a message of ours, then ask for it: what it does not do, or None.

        An answer is waited for until nothing has come for `quiet_s`.
        """
        await self._acknowledged.wait()
        self._asks = True
        await connection.subscribe({self.topic: 1})
        with contextlib.suppress(TimeoutError):
            while not self._kept.is_set():
                self._heard.clear()
                async with asyncio.timeout(quiet_s):
                    await self._heard.wait()
        self._asks, self.is_known = False, True
        if self._kept.is_set():
            return None
        if self._came_back:
            return "the broker keeps no retained messages: who comes later does not learn what was said before"
        return "the broker acknowledges what is sent to this topic, but does not pass it on: see its ACL"
