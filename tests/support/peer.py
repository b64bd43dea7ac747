"""A session that keeps the history of its callbacks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from meerkat_mq.config import BrokerConfig
from meerkat_mq.mqtt import Message, Session, Timeouts
from tests.support.waiting import until

FAST = Timeouts(connect_s=1.0, answer_s=10.0, flush_s=1.0, back_off_first_s=0.05, back_off_cap_s=0.2)


class Peer:
    """A running session; `react` is called with each message after it is recorded."""

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        subscriptions: Sequence[tuple[str, int]] = (),
        *,
        react: Callable[[Message], object] = lambda message: None,
        greet: Callable[[int], object] = lambda link: None,
        timeouts: Timeouts = FAST,
        **options: Any,
    ) -> None:
        self.messages: list[Message] = []
        self.links: list[int] = []
        self.reasons: list[str] = []
        self._react = react
        self._greet = greet
        self.session = Session(
            broker,
            client_id,
            subscriptions=subscriptions,
            on_message=self._on_message,
            on_connected=self._on_connected,
            on_disconnected=self.reasons.append,
            timeouts=timeouts,
            **options,
        )
        self.task = asyncio.create_task(self.session.run())

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]

    @property
    def up(self) -> bool:
        return self.session.link is not None

    async def connected(self, times: int = 1) -> "Peer":
        await until(lambda: len(self.links) >= times or self.task.done())
        if self.task.done():
            await self.task
        return self

    async def leave(self) -> None:
        """Orderly end."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    def _on_message(self, message: Message) -> None:
        self.messages.append(message)
        self._react(message)

    def _on_connected(self, link: int) -> None:
        self.links.append(link)
        self._greet(link)


@contextlib.asynccontextmanager
async def peer(broker: BrokerConfig, client_id: str, *args: Any, **options: Any) -> AsyncIterator[Peer]:
    """A connected peer that leaves in order at the end."""
    made = Peer(broker, client_id, *args, **options)
    try:
        yield await made.connected()
    finally:
        if not made.task.done():
            await made.leave()
