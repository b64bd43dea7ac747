"""A TCP proxy before a broker that injects faults; it knows where an MQTT packet begins and ends."""

import asyncio
import contextlib
import math
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Self

from meerkat_mq.config import BrokerConfig

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, DISCONNECT = 1, 2, 3, 4, 8, 9, 14
KINDS = {
    "connect": CONNECT, "connack": CONNACK, "publish": PUBLISH, "puback": PUBACK, "subscribe": SUBSCRIBE,
    "suback": SUBACK, "disconnect": DISCONNECT,
}  # fmt: skip

_HOST = "127.0.0.1"
_MOST_WAITING = 256
_DISCARDED_BYTES = 65_536
_LOOK_S = 0.05  # a packet that waits notices within this time that its link has healed
_TLS_END_S = 1.0  # a client that stands still does not answer the end of TLS


@dataclass(frozen=True)
class Packet:
    """One MQTT packet, as it went over the wire, up to the broker or down from it; its kind is 1 to 14."""

    up: bool
    kind: int
    data: bytes

    @property
    def topic(self) -> str:
        """Of a PUBLISH; of others the empty text."""
        if self.kind != PUBLISH:
            return ""
        at = self._body
        length = int.from_bytes(self.data[at : at + 2], "big")
        return self.data[at + 2 : at + 2 + length].decode(errors="replace")

    @property
    def payload(self) -> bytes:
        """Of a PUBLISH; of others nothing."""
        return self.data[self._payload :] if self.kind == PUBLISH else b""

    def with_payload(self, payload: bytes) -> bytes:
        """This PUBLISH with a payload of the same length."""
        if len(payload) != len(self.payload):
            raise ValueError(f"{len(payload)} bytes take the place of {len(self.payload)}")
        return self.data[: self._payload] + payload

    @property
    def _body(self) -> int:
        return next(at for at in range(1, len(self.data)) if not self.data[at] & 128) + 1

    @property
    def _payload(self) -> int:
        at, quality = self._body, self.data[0] >> 1 & 3
        return at + 2 + int.from_bytes(self.data[at : at + 2], "big") + (2 if quality else 0)


@dataclass(frozen=True)
class Passage:
    """How a packet goes on.

    Attributes:
        data: what is forwarded; nothing where the packet is lost.
        hold_s: later packets overtake it for so long.
        cut: the connection ends after it: orderly where the packet went, by a reset where it came from.
    """

    data: bytes
    hold_s: float = 0.0
    cut: bool = False


def as_it_is(packet: Packet) -> Passage:
    """The treatment without a fault."""
    return Passage(packet.data)


class Proxy:
    """Forwards to a broker.

    Args:
        port: to listen on, on 127.0.0.1; 0 chooses a free one.
        random: draws each packet's share of the jitter.
        tls: clients must speak TLS with this context; to the broker the proxy speaks plain MQTT, so it sees packets.

    Attributes:
        connections: accepted so far.
        refuse: reset new connections.
        latency_s: that a packet takes longer, each way; `jitter_s`: up to so much more. Their order stays.
        bytes_per_s: bandwidth each way.
        treat: takes each packet, says how it goes on; where it raises, the connection is reset.
        failures: what it raised.
    """

    def __init__(
        self,
        target_port: int,
        *,
        target_host: str = _HOST,
        port: int = 0,
        random: Random | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.connections = 0
        self.refuse = False
        self.latency_s = 0.0
        self.jitter_s = 0.0
        self.bytes_per_s = math.inf
        self.treat: Callable[[Packet], Passage] = as_it_is
        self.failures: list[Exception] = []
        self.port = port
        self._target = (target_host, target_port)
        self.random = random or Random(0)  # noqa: S311 - a schedule that can be repeated, no secret
        self.tls = tls
        self._abandoned = asyncio.Event()  # of the connections that are open now
        self.flowing = {True: asyncio.Event(), False: asyncio.Event()}
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.thaw()

    async def __aenter__(self) -> Self:
        """Listen; OSError where the port is taken."""
        end_s = None if self.tls is None else _TLS_END_S
        self._server = await asyncio.start_server(
            self._accept, _HOST, self.port, ssl=self.tls, ssl_shutdown_timeout=end_s
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop listening and reset what is open."""
        assert self._server is not None
        self._server.close()
        self.thaw()
        while self._links:
            self.reset()
            await asyncio.sleep(0.001)
        await self._server.wait_closed()

    @property
    def open(self) -> int:
        """Connections now."""
        return len(self._links)

    @property
    def config(self) -> BrokerConfig:
        """The way to the broker through this proxy."""
        scheme = "mqtt" if self.tls is None else "mqtts"
        return BrokerConfig(url=f"{scheme}://{_HOST}:{self.port}")

    def freeze(self, *, up: bool = True, down: bool = True) -> None:
        """Half-open: connections stay, nothing goes through in these directions."""
        for frozen in (way for way, chosen in ((True, up), (False, down)) if chosen):
            self.flowing[frozen].clear()

    def thaw(self) -> None:
        """Let what waits go through again."""
        for flowing in self.flowing.values():
            flowing.set()

    def reset(self) -> None:
        """RST to both sides of every open connection."""
        for writer in self._writers:
            _reset(writer)

    def abandon(self) -> None:
        """The client's host loses power: to the broker every open connection stays, and nothing comes from it."""
        self._abandoned.set()
        self._abandoned = asyncio.Event()

    def saw(self, packet: Packet) -> None:
        """Called with each packet that comes, also with what is then lost."""

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuse:
            _reset(writer)
            return
        link = asyncio.create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        abandoned = self._abandoned
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            await self._close(writer)
            return
        self._writers.add(far_writer)
        ways = [_Way(self, reader, writer, far_writer, up=True), _Way(self, far_reader, far_writer, writer, up=False)]
        senders = [asyncio.create_task(way.send()) for way in ways]
        receivers = [asyncio.create_task(way.receive()) for way in ways]
        power = asyncio.create_task(abandoned.wait())
        try:
            await asyncio.wait({*senders, power}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*senders, *receivers, power):
                task.cancel()
            await asyncio.gather(*senders, *receivers, power, return_exceptions=True)
            await self._close(writer)
            if abandoned.is_set():
                await _until_it_closes(far_reader)
            await self._close(far_writer)

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def delay_s(self, share: float) -> float:
        """How long a packet takes over the link, as it is now."""
        return self.latency_s + share * self.jitter_s

    def narrow_s(self, size: int) -> float:
        """How long so many bytes keep the link busy, as it is now."""
        return size / self.bytes_per_s


class _Way:
    """One direction of one connection: packets wait until they are due, and go on in order, the held ones apart."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, source: asyncio.StreamWriter, target: asyncio.StreamWriter, *,
        up: bool,
    ) -> None:  # fmt: skip
        self._proxy = proxy
        self._reader = reader
        self._source = source
        self._target = target
        self._up = up
        self._queue: asyncio.Queue[tuple[float, float, Passage | None]] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MOST_WAITING)
        self._now = asyncio.get_running_loop().time

    async def receive(self) -> None:
        """Take packets from one side until it closes."""
        with self._until_it_ends():
            while True:
                await self._room.acquire()
                data = await _read_packet(self._reader)
                packet = Packet(self._up, data[0] >> 4, data)
                self._proxy.saw(packet)
                await self._proxy.flowing[self._up].wait()
                passage, share = self._proxy.treat(packet), self._proxy.random.random()
                if passage.hold_s:
                    held_s = self._proxy.delay_s(share) + passage.hold_s
                    asyncio.get_running_loop().call_later(held_s, self._queue.put_nowait, (0.0, 0.0, passage))
                else:
                    self._queue.put_nowait((self._now(), share, passage))
        self._queue.put_nowait((0.0, 0.0, None))

    async def send(self) -> None:
        """Give packets to the other side when they are due; returns at the end of the connection."""
        with self._until_it_ends():
            while True:
                came, share, passage = await self._queue.get()
                if passage is None:
                    return
                await self._wait(came, partial(self._proxy.delay_s, share))
                left = passage.data
                while left:  # a narrow link brings a packet bit by bit
                    size = math.ceil(min(len(left), self._proxy.bytes_per_s * _LOOK_S))
                    await self._proxy.flowing[self._up].wait()
                    self._target.write(left[:size])
                    await self._target.drain()
                    left = left[size:]
                    if not passage.cut:
                        await self._wait(self._now(), partial(self._proxy.narrow_s, size))
                if passage.cut:
                    _reset(self._source)
                    return
                self._room.release()

    async def _wait(self, since: float, lasts_s: Callable[[], float]) -> None:
        """Until a time has passed that changes with the link."""
        while True:
            left = since + lasts_s() - self._now()
            if left <= 0:
                return
            await asyncio.sleep(min(left, _LOOK_S))

    @contextlib.contextmanager
    def _until_it_ends(self) -> Iterator[None]:
        try:
            yield
        except (OSError, asyncio.IncompleteReadError):
            pass
        except Exception as error:  # a fault is anybody's code, and the drill's verdict tells
            self._proxy.failures.append(error)
            _reset(self._source)
            _reset(self._target)


async def _until_it_closes(reader: asyncio.StreamReader) -> None:
    """Take what the broker sends to a host that is gone, until it gives the connection up."""
    with contextlib.suppress(OSError):
        while await reader.read(_DISCARDED_BYTES):
            pass


async def _read_packet(reader: asyncio.StreamReader) -> bytes:
    """One whole packet."""
    head = await reader.readexactly(2)
    length, shift = head[1] & 127, 7
    while head[-1] & 128 and shift < 28:
        head += await reader.readexactly(1)
        length |= (head[-1] & 127) << shift
        shift += 7
    return head + await reader.readexactly(length)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):  # closed already; then TLS has no socket
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
