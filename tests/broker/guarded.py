"""A broker with what `broker/` and `meerkat certs` make for a network, and raw connections to it."""

import asyncio
import os
import signal
import ssl
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest

from meerkat_mq.broker.certs import Authority, revoke_certificates, write_certificates
from meerkat_mq.config import BrokerConfig
from tests.server.federation import NAME
from tests.support.broker import HOST, Broker
from tests.support.mosquitto import ShippedMosquitto
from tests.support.nats import Nats
from tests.support.peer import Peer, peer
from tests.support.rabbitmq import HardenedRabbitMQ
from tests.support.resident import resident_mib
from tests.support.waiting import until

BROKERS = Path(__file__).parents[2] / "broker"
NODES = ("node-0", "node-1")
STOLEN = "node-2"  # who holds this certificate does what it should not

without_rabbitmq = pytest.mark.not_on(rabbitmq="its rights are users that rabbitmqctl makes (broker/README.md)")
own_words = pytest.mark.not_on(nats="its rights are no ACL file")


Kind = Literal["mosquitto", "nats", "rabbitmq"]


class Guarded:
    """A broker with a configuration of ours for a network, and the way to it for each user."""

    def __init__(self, folder: Path, kind: Kind = "mosquitto") -> None:
        self.kind = kind
        self.certificates = folder / "certificates"
        *_, last = write_certificates(self.certificates, federation=NAME, hosts=[HOST], nodes=[*NODES, STOLEN])
        assert last.folder.name == STOLEN
        make = {"mosquitto": self._mosquitto, "nats": self._nats, "rabbitmq": self._rabbitmq}
        self.broker = make[kind](folder)
        self.port = self.broker.port

    def _mosquitto(self, folder: Path) -> Broker:
        shipped = BROKERS / "mosquitto-tls.conf"
        words = {
            "listener 8883": "listener {port} {host}",
            "/etc/mosquitto/meerkat": str(self.certificates / "broker"),
            "user mosquitto": "user {user}",
        }
        return ShippedMosquitto(folder, shipped, words)

    def _nats(self, folder: Path) -> Broker:
        words = {
            "/etc/nats/meerkat": str(self.certificates / "broker"),
            "v1.field": f"v1.{NAME}",
            "gateway-07": NODES[0],
            "gateway-08": NODES[1],
        }
        return Nats(folder, "nats-tls.conf", "0.0.0.0:8883", **words)

    def _rabbitmq(self, folder: Path) -> Broker:
        return HardenedRabbitMQ(folder, self.certificates / "broker", NAME, NODES)

    def way(self, place: str | Path) -> BrokerConfig:
        """With the certificate in this folder."""
        folder = self.certificates / place
        return BrokerConfig(
            url=f"mqtts://{HOST}:{self.port}",
            ca_file=folder / "ca.pem",
            cert_file=folder / "cert.pem",
            key_file=folder / "key.pem",
        )

    def table(self, place: str | Path) -> dict[str, str]:
        """The same for a TOML file."""
        return {key: str(value) for key, value in self.way(place).model_dump(exclude_unset=True).items()}

    def issue(self, place: str, *, days: int, ago: int = 0, hosts: Sequence[str] = ()) -> str:
        """Write a certificate that is valid from some days ago for so many days."""
        authority = Authority.load(self.certificates / "ca")
        now = datetime.now(UTC) - timedelta(days=ago)
        authority.issue(self.certificates / place, Path(place).name, days=days, hosts=hosts, now=now)
        return place

    def memory_mib(self) -> float:
        """What the broker's process holds."""
        return resident_mib(self.broker.pid)

    async def deaf(self, place: str, topic: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that has subscribed to a topic, and reads no more."""
        raw = await Raw.connected(self, place, "x")
        assert await raw.subscribed(topic)
        return raw.reader, raw.writer

    async def revoke(self, node: str) -> None:
        """What broker/README.md says of this broker."""
        if isinstance(self.broker, HardenedRabbitMQ):
            self.broker.delete_user(node)
        elif isinstance(self.broker, Nats):
            self.broker.replace(f'"CN={node}"', '"CN=nobody"')
            os.kill(self.broker.pid, signal.SIGHUP)
            await until(lambda: "Reloaded server configuration" in self.broker.log)
        else:
            revoke_certificates(self.certificates, [node])
            self.broker.stop()
            self.broker.start()

    def replace(self, old: str, new: str) -> None:
        """Start again with another line in the configuration."""
        assert isinstance(self.broker, ShippedMosquitto)
        self.broker.kill()
        self.broker.replace(old, new)
        self.broker.start()

    def reload(self) -> None:
        """SIGHUP: certificates and the ACL are read again."""
        os.kill(self.broker.pid, signal.SIGHUP)


class Raw:
    """An MQTT connection by hand: what our own client would never send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connected(cls, broker: Guarded, place: str, client: str, will: str = "", *, clean: bool = True) -> "Raw":
        """Past CONNACK, or OSError; with a retained will on this topic, or a session that outlives the connection."""
        way = broker.way(place)
        tls = ssl.create_default_context(cafile=way.ca_file)
        tls.load_cert_chain(way.cert_file or "", way.key_file)
        reader, writer = await asyncio.open_connection(HOST, broker.port, ssl=tls, limit=1024)
        raw = cls(reader, writer)
        last = _text(will) + _text("forged") if will else b""
        flags = bytes([0x02 * clean | 0x2C * bool(will)])  # clean session; a retained will of QoS 1
        raw.send(packet(0x10, b"\0\4MQTT\4" + flags + b"\0\x3c" + _text(client) + last))
        if (await raw.answer(4))[-1:] != b"\0":
            raw.drop()
            raise ConnectionRefusedError
        return raw

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, size: int) -> bytes:
        """So many bytes; fewer where the broker closes the connection."""
        try:
            return await asyncio.wait_for(self.reader.readexactly(size), 20)
        except (asyncio.IncompleteReadError, OSError):  # an SSLError is one
            return b""

    async def subscribed(self, *topics: str) -> bool:
        """Whether the broker takes all these filters, at most a hundred."""
        self.send(packet(0x82, b"\0\1" + b"".join(_text(topic) + b"\1" for topic in topics)))
        answer = await self.answer(4 + len(topics))
        return bool(answer) and not any(code & 0x80 for code in answer[4:])

    async def lives(self) -> bool:
        """Whether the broker answers a PINGREQ."""
        self.send(b"\xc0\0")
        return await self.answer(2) == b"\xd0\0"

    def drop(self) -> None:
        """Without DISCONNECT."""
        self.writer.transport.abort()


def publish(topic: str, payload: bytes, number: int = 0, *, retain: bool = False) -> bytes:
    """A PUBLISH packet, of QoS 1 where it has a number."""
    qos, mid = (0b10, number.to_bytes(2, "big")) if number else (0, b"")
    return packet(0x30 | qos | retain, _text(topic) + mid + payload)


def packet(first: int, body: bytes) -> bytes:
    """An MQTT packet."""
    length, rest = b"", len(body)
    while rest > 127:
        length, rest = length + bytes([rest % 128 | 128]), rest // 128
    return bytes([first]) + length + bytes([rest]) + body


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def node(broker: Guarded, number: int, *filters: str) -> AbstractAsyncContextManager[Peer]:
    return peer(broker.way(f"nodes/node-{number}"), f"client-{number}", [(topic, 1) for topic in filters])
