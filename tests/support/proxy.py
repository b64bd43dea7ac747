"""A TCP proxy between clients and broker that injects faults; it knows where an MQTT packet begins and ends."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from meerkat_mq.config import BrokerConfig
from tests.support.mosquitto import HOST

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, DISCONNECT = 1, 2, 3, 4, 8, 9, 14


@dataclass(frozen=True)
class Packet:
    """One MQTT packet, as it went over the wire."""

    up: bool
    kind: int
    data: bytes


class Proxy:
    """Forwards to a broker's port.

    Attributes:
        connections: accepted so far.
        open: now.
        packets: all that came, in order, also what was dropped.
        refuse: reset new connections.
        delay_s: each packet down to the client takes so long after the one before.
        alter: takes each packet, gives what to forward: the same bytes, others, or None for nothing.
    """

    def __init__(self, target_port: int) -> None:
        self.connections = 0
        self.packets: list[Packet] = []
        self.refuse = False
        self.delay_s = 0.0
        self.alter: Callable[[Packet], bytes | None] = lambda packet: packet.data
        self.port = 0
        self._target_port = target_port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.thaw()
        while self._links:
            self.reset()
            await asyncio.sleep(0.001)
        await self._server.wait_closed()

    @property
    def open(self) -> int:
        return len(self._links)

    @property
    def config(self) -> BrokerConfig:
        return BrokerConfig(url=f"mqtt://{HOST}:{self.port}")

    def count(self, kind: int, *, up: bool) -> int:
        return sum(packet.kind == kind and packet.up == up for packet in self.packets)

    def drop(self, *kinds: int, up: bool = False) -> None:
        """From now on swallow packets of these kinds in one direction."""
        self.alter = lambda packet: None if packet.kind in kinds and packet.up == up else packet.data

    def pass_all(self) -> None:
        self.alter = lambda packet: packet.data

    def freeze(self) -> None:
        """Half-open: connections stay, nothing goes through."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def reset(self) -> None:
        """RST to both sides of every open connection."""
        for writer in self._writers:
            _reset(writer)

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
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            await self._close(writer)
            return
        self._writers.add(far_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, up=True)),
            asyncio.create_task(self._pump(far_reader, writer, up=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, far_writer):
                await self._close(end)

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        while True:
            data = await _read_packet(reader)
            packet = Packet(up, data[0] >> 4, data)
            self.packets.append(packet)
            await self._flowing.wait()
            if self.delay_s and not up:
                await asyncio.sleep(self.delay_s)
            altered = self.alter(packet)
            if altered is not None:
                writer.write(altered)
                await writer.drain()


async def _read_packet(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(2)
    length, shift = head[1] & 127, 7
    while head[-1] & 128:
        head += await reader.readexactly(1)
        length |= (head[-1] & 127) << shift
        shift += 7
    return head + await reader.readexactly(length)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
