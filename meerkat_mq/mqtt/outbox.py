"""What is on its way to the broker: bounded, in order, kept until the broker acknowledged it."""

import asyncio
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from meerkat_mq.errors import MeerkatError, NotConnected
from meerkat_mq.wire.limits import packet_bytes

_JUST_NOW_S = 0.1
_OVERHEAD_BYTES = 512  # what one waiting message costs besides its payload


@dataclass(eq=False, slots=True)
class Outgoing:
    """A message that the broker has not acknowledged yet."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    done: asyncio.Future[None]

    @property
    def packet_bytes(self) -> int:
        """Of its PUBLISH packet."""
        return packet_bytes(self.topic, self.payload, self.qos)

    @property
    def cost(self) -> int:
        """Bytes that it holds."""
        return len(self.payload) + _OVERHEAD_BYTES

    def settle(self, error: MeerkatError | None = None) -> None:
        """Tell whoever waits; an error that nobody waits for stays silent."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
            self.done.exception()


_Line = dict[Hashable, Outgoing]  # by topic where retained: the newest, in the place of the first


class Outbox:
    """Waiting messages and the ones in flight.

    A retained message takes the place of an older one on its topic, so that what is said again and again is not put
    off again and again.

    Args:
        limit_bytes: how much it holds; a retained message it takes even when full, since of these it holds the newest
            on a topic.
        retained_first: whether what is retained, which all nodes wait for, goes before answers to one of them.
        window_messages, window_bytes: how many and how much may be in flight, always at least one message.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        retained_first: bool = False,
        window_messages: int = 32,
        window_bytes: int = 256 * 1024,
    ) -> None:
        self._one_by_one = False
        self._last: tuple[Outgoing, float] | None = None
        self._limit_bytes = limit_bytes
        self._window_messages = window_messages
        self._window_bytes = window_bytes
        self._retained_first = retained_first
        self._first: _Line = {}
        self._rest: _Line = {}
        self._in_flight = dict[Outgoing, None]()
        self._bytes = 0
        self._closed: MeerkatError | None = None
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._first) + len(self._rest) + len(self._in_flight)

    @property
    def suspects(self) -> tuple[Outgoing, ...]:
        """What a connection may have ended at: the messages in flight, oldest first, or the one acknowledged just now.

        Some brokers acknowledge what they refuse, and then close the connection.
        """
        last, at = self._last or (None, 0.0)
        return tuple(self._in_flight) or ((last,) if last and time.monotonic() - at < _JUST_NOW_S else ())

    def put(self, out: Outgoing) -> None:
        """Add a message; a retained one takes the place of an older one on its topic.

        Raises:
            NotConnected: the outbox is full, and the message is not retained.
        """
        if self._closed is not None:
            out.settle(self._closed)
            return
        if not out.retain and self._bytes + out.cost > self._limit_bytes:
            problem = f"{len(self)} messages ({self._bytes} bytes) already wait for the broker"
            raise NotConnected(out.topic, problem, "publish less at once")
        self._bytes += out.cost
        self._append(out)
        self._changed.set()

    async def take(self) -> Outgoing:
        """Move the next message into flight, once there is one and the window has room."""
        while (line := self._first or self._rest) == {} or self._window_full(next(iter(line.values()))):
            await self._change()
            if self._one_by_one:
                await asyncio.sleep(_JUST_NOW_S / 2)
        out = line.pop(next(iter(line)))
        self._in_flight[out] = None
        return out

    def acknowledge(self, out: Outgoing) -> None:
        """The broker has it."""
        self._last = out, time.monotonic()
        if self._closed is None:
            del self._in_flight[out]
            self._drop(out)

    def rewind(self) -> None:
        """The connection ended: what was in flight waits again, before all else."""
        pending = [*self._in_flight, *self._take_out()]
        self._in_flight.clear()
        for out in pending:
            self._append(out)

    def narrow(self, one_by_one: bool) -> None:
        """Whether only one message may be in flight, and the next has to wait, so that it is known which one ends a
        connection."""
        self._one_by_one = one_by_one
        self._changed.set()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """What is put inside goes before what waits already."""
        earlier = self._take_out()
        try:
            yield
        finally:
            for out in earlier:
                if _place(out) in self._line_of(out):
                    self._drop(out)
                else:
                    self._append(out)

    async def drained(self) -> None:
        """Wait until nothing is left."""
        while len(self):
            await self._change()

    def open(self) -> None:
        """Take messages again after `close`."""
        self._closed = None

    def close(self, error: MeerkatError) -> None:
        """Drop everything, now and until `open`; futures raise `error`."""
        self._closed = error
        for out in (*self._in_flight, *self._take_out()):
            out.settle(error)
        self._in_flight.clear()
        self._bytes = 0
        self._changed.set()

    def _take_out(self) -> list[Outgoing]:
        """All that waits, which no longer does."""
        waiting = [*self._first.values(), *self._rest.values()]
        self._first.clear()
        self._rest.clear()
        return waiting

    def _line_of(self, out: Outgoing) -> _Line:
        return self._first if self._retained_first and out.retain else self._rest

    def _append(self, out: Outgoing) -> None:
        line = self._line_of(out)
        if (older := line.get(_place(out))) is not None:
            self._drop(older)
        line[_place(out)] = out

    def _drop(self, out: Outgoing) -> None:
        self._bytes -= out.cost
        out.settle()
        self._changed.set()

    def _window_full(self, out: Outgoing) -> bool:
        bytes_then = sum(found.cost for found in (*self._in_flight, out))
        full = len(self._in_flight) >= self._window_messages or bytes_then > self._window_bytes
        return bool(self._in_flight) and (self._one_by_one or full)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _place(out: Outgoing) -> Hashable:
    """Where it waits: of what is retained, one a topic."""
    return out.topic if out.retain else out
