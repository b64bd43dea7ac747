"""What is published arrives: whole, in order, once, and only within the limits."""

import asyncio
import os
import socket
import statistics
import time

import pytest

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import NotConnected, PayloadTooLarge
from meerkat_mq.wire.limits import packet_bytes
from tests.support.mosquitto import Mosquitto
from tests.support.peer import Peer, peer
from tests.support.proxy import CONNECT, PUBACK, PUBLISH, Packet, Proxy
from tests.support.waiting import until

FLOOD = 3000


def dialled(port: int) -> list[socket.socket]:
    """Our own sockets that are connected to a port."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  only the names
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                continue
            candidate = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            matches = candidate.family == socket.AF_INET and candidate.getpeername()[1] == port
        except OSError:
            matches = False
        if matches:
            found.append(candidate)
        else:
            candidate.close()
    return found


async def test_round_trip(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "a", [("x/+", 1)]) as a, peer(mosquitto.config, "b") as b:
        await b.session.publish("x/1", b"one")
        await b.session.publish("x/2", b"two", qos=0)
        await until(lambda: len(a.messages) == 2)
        assert [(m.topic, m.payload, m.retained, m.qos) for m in a.messages] == [
            ("x/1", b"one", False, 1),
            ("x/2", b"two", False, 0),
        ]


async def test_retained_messages_are_marked(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "a") as a:
        await a.session.publish("x/1", b"kept", retain=True)
    async with peer(mosquitto.config, "b", [("x/1", 1)]) as b:
        await until(lambda: b.messages)
        assert b.messages[0].retained


async def test_a_message_published_before_the_session_runs_is_sent(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "a", [("x", 1)]) as a:
        early = Peer(mosquitto.config, "b")
        await asyncio.wait_for(early.session.publish("x", b"early"), 10)
        await until(lambda: a.payloads == [b"early"])
        await early.leave()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")  # noqa: PTH112
async def test_tcp_nodelay_is_set(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "a"):
        sockets = dialled(mosquitto.port)
        assert sockets
        for ours in sockets:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            ours.close()


async def test_a_ping_pong_does_not_wait_for_delayed_acknowledgements(mosquitto: Mosquitto) -> None:
    """Without TCP_NODELAY on both sides a round trip takes 40 ms or more."""

    async with peer(mosquitto.config, "a", [("ping", 1), ("pong", 1)]) as a:
        taken = []
        for i in range(20):
            began = time.perf_counter()
            a.session.publish("ping", b"%d" % i)
            a.session.publish("pong", b"%d" % i)
            await until(lambda wanted=2 * (i + 1): len(a.messages) == wanted)  # type: ignore[misc]
            taken.append(time.perf_counter() - began)
        assert statistics.median(taken) < 0.035


async def test_connects_as_agreed(mosquitto: Mosquitto, proxy: Proxy) -> None:
    """MQTT 3.1.1, clean session, our client id, our keep-alive."""
    config = BrokerConfig(url=proxy.config.url, keep_alive_s=17)
    async with peer(config, "node-1"):
        (packet,) = [packet.data for packet in proxy.packets if packet.kind == CONNECT]
    assert packet[2:] == b"\0\x04MQTT\x04" + b"\x02" + (17).to_bytes(2, "big") + b"\0\x06node-1"


async def test_a_flood_arrives_whole_and_in_order(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "a", [("x", 1)]) as a, peer(mosquitto.config, "b") as b:
        for i in range(FLOOD):
            b.session.publish("x", i.to_bytes(2, "big"))
        await until(lambda: len(a.messages) >= FLOOD, within_s=30)
        await b.session.drain(5)
        assert a.payloads == [i.to_bytes(2, "big") for i in range(FLOOD)]


async def test_a_flood_waits_for_a_stalled_receiver(mosquitto: Mosquitto, proxy: Proxy) -> None:
    """Mosquitto's default drops all but 1,000 and acknowledges every one."""
    async with peer(proxy.config, "a", [("x", 1)]) as a, peer(mosquitto.config, "b") as b:
        proxy.freeze()
        for i in range(FLOOD):
            b.session.publish("x", i.to_bytes(2, "big"))
        await b.session.drain(30)
        proxy.thaw()
        await until(lambda: len(a.messages) >= FLOOD, within_s=30)
        assert a.payloads == [i.to_bytes(2, "big") for i in range(FLOOD)]


async def test_a_packet_over_the_limit_is_refused_before_sending(mosquitto: Mosquitto, proxy: Proxy) -> None:
    config = BrokerConfig(url=proxy.config.url, max_packet_bytes=2048)
    async with peer(config, "a") as a:
        fits = 2048 - packet_bytes("some/topic", b"", 1) - 1
        assert packet_bytes("some/topic", bytes(fits), 1) == 2048
        await a.session.publish("some/topic", bytes(fits))
        with pytest.raises(PayloadTooLarge, match=r"some/topic.*2049 bytes.*2048.*max_packet_bytes"):
            a.session.publish("some/topic", bytes(fits + 1))
        await a.session.drain(5)
        assert proxy.count(PUBLISH, up=True) == 1
        assert a.up


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b"])
async def test_a_topic_that_cannot_be_published_to_is_refused(mosquitto: Mosquitto, topic: str) -> None:
    async with peer(mosquitto.config, "a") as a:
        with pytest.raises(ValueError, match="cannot publish"):
            a.session.publish(topic, b"")


async def test_few_messages_are_in_flight_at_once(proxy: Proxy) -> None:
    async with peer(proxy.config, "a") as a:
        proxy.drop(PUBACK)
        for _ in range(100):
            a.session.publish("x", b"")
        await until(lambda: proxy.count(PUBACK, up=False) == 32)
        assert proxy.count(PUBLISH, up=True) == 32
        with pytest.raises(NotConnected, match="100 messages"):
            await a.session.drain(0.05)


async def test_filters_can_be_added_and_removed(mosquitto: Mosquitto, proxy: Proxy) -> None:
    async with peer(proxy.config, "a", [("x", 1)]) as a, peer(mosquitto.config, "b") as b:
        await b.session.publish("y", b"kept", retain=True)
        a.session.subscribe("y")
        await until(lambda: a.payloads == [b"kept"])
        proxy.reset()
        await until(lambda: len(a.messages) == 2)  # retained again: the filter holds on the next connection
        a.session.unsubscribe("y")
        await until(lambda: proxy.packets[-1].kind == 11)  # UNSUBACK
        await b.session.publish("y", b"unheard")
        await b.session.publish("x", b"heard")
        await until(lambda: a.payloads == [b"kept", b"kept", b"heard"])


async def test_traffic_is_counted_by_kind(mosquitto: Mosquitto) -> None:
    def kind_of(topic: str) -> str:
        return topic.partition("/")[0]

    async with peer(mosquitto.config, "a", [("x/#", 1), ("y", 1)], kind_of=kind_of) as a:
        for topic in ("x/1", "x/2", "y"):
            a.session.publish(topic, b"123")
        await until(lambda: len(a.messages) == 3)
        for counts in (a.session.sent, a.session.received):
            assert {kind: count.messages for kind, count in counts.items()} == {"x": 2, "y": 1}
            assert counts["x"].payload_bytes == 6
            assert counts["y"].packet_bytes == packet_bytes("y", b"123", 1)


async def test_a_lost_acknowledgement_means_sent_again(mosquitto: Mosquitto, proxy: Proxy) -> None:
    """At least once: the session cannot know that the broker has it."""
    lost: list[Packet] = []

    def swallow_first(packet: Packet) -> bytes | None:
        if packet.kind == PUBACK and not packet.up and not lost:
            lost.append(packet)
            return None
        return packet.data

    async with peer(mosquitto.config, "a", [("x", 1)]) as a, peer(proxy.config, "b") as b:
        proxy.alter = swallow_first
        done = b.session.publish("x", b"1")
        await until(lambda: lost)
        assert not done.done()
        proxy.reset()
        await asyncio.wait_for(done, 10)
        await until(lambda: a.payloads == [b"1", b"1"])
