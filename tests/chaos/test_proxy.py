"""Each fault of a link, on the bytes that come out at the other end."""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from meerkat_mq.chaos.faults import FAULTS
from meerkat_mq.chaos.proxy import Packet, Passage, Proxy, as_it_is
from meerkat_mq.errors import WireError
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Header, Update, Values
from tests.support.waiting import until

UPDATE = Update(Header(1, 2, 3, bytes(8)), 4, bytes(8), 0.5, (0.25, -1.5))
PUBACK = b"\x40\x02\x00\x01"
TOPIC = "meerkat/v1/f/up/node-0/update"


def publish(payload: bytes, topic: str = TOPIC, *, qos: int = 1) -> bytes:
    body = len(topic).to_bytes(2, "big") + topic.encode() + (b"\x00\x01" if qos else b"") + payload
    size, length = len(body), b""
    while True:
        size, digit = size >> 7, size & 127
        length += bytes([digit | (128 if size else 0)])
        if not size:
            return bytes([0x30 | qos << 1]) + length + body


def numbered(count: int) -> list[bytes]:
    return [publish(number.to_bytes(2, "big")) for number in range(count)]


class End:
    """One end of a TCP connection: what came, and how it ended."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came = b""
        self.ended = ""
        self.writer = writer
        self._task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(65536):
                self.came += data
            self.ended = "closed"
        except ConnectionResetError:
            self.ended = "reset"

    async def close(self) -> None:
        self.writer.transport.abort()
        await self._task


class Wire:
    """A client and a broker of raw bytes, the proxy between them."""

    def __init__(self, proxy: Proxy, far: list[End]) -> None:
        self.proxy = proxy
        self.far = far
        self.near: list[End] = []
        self.stage: Any = SimpleNamespace(links={"node-0": proxy})

    async def connect(self) -> End:
        known = len(self.far)
        end = End(*await asyncio.open_connection("127.0.0.1", self.proxy.port))
        self.near.append(end)
        await until(lambda: len(self.far) > known or end.ended)
        return end

    def strike(self, name: str, **parameters: Any) -> Any:
        return FAULTS[name](**parameters).strike(self.stage, "node-0", Random(7))

    def up(self, *packets: bytes) -> None:
        self.near[-1].writer.write(b"".join(packets))

    def down(self, *packets: bytes) -> None:
        self.far[-1].writer.write(b"".join(packets))

    async def arrives(self, data: bytes) -> None:
        await until(lambda: len(self.far[-1].came) >= len(data))
        assert self.far[-1].came == data


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    far: list[End] = []
    server = await asyncio.start_server(lambda reader, writer: far.append(End(reader, writer)), "127.0.0.1", 0)
    async with Proxy(server.sockets[0].getsockname()[1], random=Random(7)) as proxy:
        made = Wire(proxy, far)
        await made.connect()
        yield made
        for end in (*made.near, *far):
            await end.close()
    server.close()
    await server.wait_closed()


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("size", [0, 5, 90, 200, 20_000])
def test_a_packet_knows_its_topic_and_payload(qos: int, size: int) -> None:
    packet = Packet(True, 3, publish(bytes(range(5)) * (size // 5), "a/b", qos=qos))
    assert (packet.topic, packet.payload) == ("a/b", bytes(range(5)) * (size // 5))
    other = b"\xff" * len(packet.payload)
    assert packet.with_payload(other) == publish(other, "a/b", qos=qos)
    with pytest.raises(ValueError, match="take the place of"):
        packet.with_payload(other + b"x")
    assert (Packet(True, 4, PUBACK).topic, Packet(True, 4, PUBACK).payload) == ("", b"")


async def test_without_a_fault_bytes_go_through_both_ways(wire: Wire) -> None:
    wire.up(*numbered(3), PUBACK)
    wire.down(publish(bytes(20_000)), PUBACK)
    await wire.arrives(b"".join([*numbered(3), PUBACK]))
    await until(lambda: wire.near[0].came == publish(bytes(20_000)) + PUBACK)
    wire.near[0].writer.close()
    await until(lambda: wire.far[0].ended == "closed")


async def test_what_was_sent_before_closing_arrives_also_late(wire: Wire) -> None:
    async with wire.strike("latency", latency_s=0.1, jitter_s=0):
        wire.up(*numbered(2))
        wire.near[0].writer.close()
        await until(lambda: wire.far[0].ended == "closed")
        assert wire.far[0].came == b"".join(numbered(2))


async def test_latency_and_jitter_keep_the_order(wire: Wire) -> None:
    async with wire.strike("latency", latency_s=0.2, jitter_s=0.2):
        began = now()
        wire.up(*numbered(20))
        await until(lambda: wire.far[0].came)
        assert now() - began >= 0.19
        await wire.arrives(b"".join(numbered(20)))
        assert now() - began < 2  # all at once on the way, not one after the other
    assert (wire.proxy.latency_s, wire.proxy.jitter_s) == (0, 0)


async def test_bandwidth(wire: Wire) -> None:
    async with wire.strike("bandwidth", bytes_per_s=20_000):
        began = now()
        wire.up(publish(bytes(5000)), PUBACK)
        await until(lambda: wire.far[0].came.endswith(PUBACK))
        assert now() - began >= 0.24
    assert wire.proxy.bytes_per_s == math.inf


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("bandwidth", {"bytes_per_s": 1}), ("latency", {"latency_s": 60, "jitter_s": 60})],
)
async def test_healing_wakes_what_waits(wire: Wire, name: str, parameters: dict[str, Any]) -> None:
    seen = list[Packet]()
    wire.proxy.saw = seen.append  # type: ignore[method-assign, assignment]
    async with wire.strike(name, **parameters):
        wire.up(*numbered(3))
        await until(lambda: len(seen) == 3)
        assert len(wire.far[0].came) <= len(numbered(1)[0])
    await wire.arrives(b"".join(numbered(3)))


async def test_a_treatment_that_raises_resets_its_link_and_is_kept(wire: Wire) -> None:
    wire.proxy.treat = lambda packet: Passage(packet.data[1 // 0 :])
    wire.up(PUBACK)
    await until(lambda: wire.near[0].ended == wire.far[0].ended == "reset")
    assert [type(failure) for failure in wire.proxy.failures] == [ZeroDivisionError]
    wire.proxy.treat = lambda packet: None  # type: ignore[assignment, return-value]
    await wire.connect()
    wire.down(PUBACK)
    await until(lambda: wire.near[1].ended == "reset")
    assert [type(failure) for failure in wire.proxy.failures] == [ZeroDivisionError, AttributeError]
    wire.proxy.treat = as_it_is
    await wire.connect()
    wire.up(PUBACK)
    await wire.arrives(PUBACK)


async def test_refuse_breaks_what_is_open_and_lets_nobody_in(wire: Wire) -> None:
    async with wire.strike("refuse"):
        await until(lambda: wire.near[0].ended == "reset")
        assert (await wire.connect()).ended == "reset"
        assert len(wire.far) == 1
    await wire.connect()
    wire.up(PUBACK)
    await wire.arrives(PUBACK)


async def test_reset_breaks_what_is_open_only(wire: Wire) -> None:
    async with wire.strike("reset"):
        await until(lambda: wire.near[0].ended == wire.far[0].ended == "reset")
        await wire.connect()
        wire.up(PUBACK)
        await wire.arrives(PUBACK)


@pytest.mark.parametrize("way", ["up", "down", "both"])
async def test_freeze_one_way_or_both(wire: Wire, way: str) -> None:
    flows = {"up": way == "down", "down": way == "up"}
    async with wire.strike("freeze", way=way):
        wire.up(PUBACK)
        wire.down(PUBACK)
        await until(lambda: (wire.far[0].came != b"", wire.near[0].came != b"") == (flows["up"], flows["down"]))
        await wire.connect()  # a connection more makes sure that the others had their turn
        assert (wire.far[0].came != b"", wire.near[0].came != b"") == (flows["up"], flows["down"])
        assert not wire.near[0].ended
    await until(lambda: wire.far[0].came == wire.near[0].came == PUBACK)


async def test_cut_ends_the_connection_within_a_packet(wire: Wire) -> None:
    async with wire.strike("cut", share=1.0):
        wire.up(PUBACK, publish(b"x" * 100))
        await until(lambda: wire.far[0].ended and wire.near[0].ended)
        sent = PUBACK + publish(b"x" * 100)
        assert len(PUBACK) < len(wire.far[0].came) < len(sent)
        assert sent.startswith(wire.far[0].came)
        assert (wire.far[0].ended, wire.near[0].ended) == ("closed", "reset")


async def test_duplicate(wire: Wire) -> None:
    async with wire.strike("duplicate", share=1.0):
        wire.up(publish(b"x"), PUBACK)
        await wire.arrives(publish(b"x") * 2 + PUBACK)


async def test_reorder_lets_packets_overtake_and_loses_none(wire: Wire) -> None:
    async with wire.strike("reorder", share=0.5, hold_s=0.2):
        wire.up(*numbered(30), PUBACK)
        await until(lambda: len(wire.far[0].came) == len(b"".join(numbered(30)) + PUBACK))
    size = len(numbered(1)[0])
    came = wire.far[0].came.replace(PUBACK, b"")
    packets = [came[at : at + size] for at in range(0, len(came), size)]
    assert packets != numbered(30)
    assert sorted(packets) == numbered(30)


async def test_drop_by_topic_way_and_type(wire: Wire) -> None:
    status = publish(b"s", "meerkat/v1/f/up/node-0/status")
    async with wire.strike("drop", share=1.0, topic="/update", way="up"):
        wire.up(publish(b"x"), status, PUBACK)
        wire.down(publish(b"x"))
        await wire.arrives(status + PUBACK)
        await until(lambda: wire.near[0].came == publish(b"x"))
    async with wire.strike("drop", share=1.0, packets=("puback",)):
        wire.up(PUBACK, status)
        await wire.arrives(status + PUBACK + status)
    async with wire.strike("drop", share=0.5):
        wire.up(*numbered(100), PUBACK)
        await until(lambda: wire.far[0].came.endswith(PUBACK) and wire.far[0].came.count(TOPIC.encode()))
        assert 20 < wire.far[0].came.count(TOPIC.encode()) < 80


async def test_corrupt_flips_a_bit_that_the_checksum_finds(wire: Wire) -> None:
    whole, control = encode(UPDATE), publish(b'{"status": "online"}')
    async with wire.strike("corrupt", share=1.0):
        wire.up(control, publish(whole))
        await until(lambda: len(wire.far[0].came) == len(control + publish(whole)))
    assert wire.far[0].came.startswith(control)
    packet = Packet(True, 3, wire.far[0].came[len(control) :])
    assert packet.topic == TOPIC
    flipped = int.from_bytes(packet.payload, "big") ^ int.from_bytes(whole, "big")
    assert flipped.bit_count() == 1
    with pytest.raises(WireError):
        decode(packet.payload)


async def test_corrupt_the_length(wire: Wire) -> None:
    packet = publish(encode(UPDATE))
    async with wire.strike("corrupt", share=1.0, part="length"):
        wire.up(packet)
        await until(lambda: len(wire.far[0].came) == len(packet))
    assert wire.far[0].came[1] != packet[1]
    assert wire.far[0].came[:1] + wire.far[0].came[2:] == packet[:1] + packet[2:]


@pytest.mark.parametrize(
    ("parameters", "scalars"),
    [
        ({"how": "nan"}, (math.nan, math.nan)),
        ({"how": "huge"}, (1e9, 1e9)),
        ({"how": "flip", "scale": 4.0}, (-1.0, 6.0)),
        ({"how": "flip", "scale": 1e300}, (-math.inf, math.inf)),
    ],
)
async def test_poison_is_a_valid_update_with_other_scalars(
    wire: Wire, parameters: dict[str, Any], scalars: tuple[float, ...]
) -> None:
    other = publish(b"x", "meerkat/v1/f/up/node-0/want")
    packet = publish(encode(UPDATE))
    async with wire.strike("poison", **parameters):
        wire.up(packet, other, publish(b"nonsense"))
        wire.down(packet)
        await until(lambda: len(wire.far[0].came) == len(packet + other + publish(b"nonsense")))
        await until(lambda: wire.near[0].came == packet)
    found = decode(Packet(True, 3, wire.far[0].came[: len(packet)]).payload)
    assert isinstance(found, Update)
    assert found.scalars == pytest.approx(scalars, nan_ok=True)
    assert (found.header, found.boot, found.base) == (UPDATE.header, UPDATE.boot, UPDATE.base)
    assert wire.far[0].came.endswith(other + publish(b"nonsense"))


@pytest.mark.parametrize("how", ["nan", "huge", "flip"])
async def test_poison_leaves_a_values_node_alone(wire: Wire, how: str) -> None:
    displacement = replace(UPDATE, scalars=(), values=Values(bytes(16), 3, 2))
    chunk = Chunk(UPDATE.header, bytes(16), 0, 1, 3, b"abc")
    packets = [publish(encode(frame)) for frame in (displacement, chunk)]
    async with wire.strike("poison", how=how):
        wire.up(*packets)
        await wire.arrives(b"".join(packets))
    assert wire.proxy.failures == []
    assert not FAULTS["poison"].model_validate({"how": how}).may_be(())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["cut", "duplicate", "reorder", "drop", "corrupt", "poison"])
async def test_a_healed_link_treats_nothing(wire: Wire, name: str) -> None:
    async with wire.strike(name):
        pass
    wire.up(*[publish(encode(UPDATE))] * 20)
    await wire.arrives(publish(encode(UPDATE)) * 20)
