"""Connections break; the session does not."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import BrokerConfig
from meerkat_mq.mqtt import Timeouts
from meerkat_mq.mqtt.trouble import BackOff
from tests.support.mosquitto import HOST, Mosquitto, free_port
from tests.support.peer import FAST, Peer, peer
from tests.support.proxy import CONNACK, CONNECT, PUBACK, PUBLISH, Packet, Proxy
from tests.support.waiting import until

SLOW_TO_GIVE_UP = Timeouts(connect_s=30, answer_s=30, flush_s=1, back_off_first_s=0.05, back_off_cap_s=0.2)


def published(proxy: Proxy) -> list[bytes]:
    """Payloads of the QoS 1 messages that went up, on topics of one character."""
    return [packet.data[7:] for packet in proxy.packets if packet.up and packet.kind == PUBLISH]


async def test_a_message_in_flight_when_the_broker_dies_is_sent_again(mosquitto: Mosquitto, proxy: Proxy) -> None:
    """And at once: not when its own time-out, 30 s here, is over."""
    async with peer(proxy.config, "b", timeouts=SLOW_TO_GIVE_UP) as b:
        proxy.drop(PUBACK)
        done = b.session.publish("x", b"1")
        await until(lambda: proxy.count(PUBACK, up=False))
        mosquitto.kill()
        await until(lambda: b.reasons, within_s=2)
        assert not done.done()
        proxy.pass_all()
        mosquitto.start()
        async with peer(mosquitto.config, "a", [("x", 1)]) as a:
            await asyncio.wait_for(done, 10)
            assert a.payloads in ([b"1"], [])  # it may have come before a subscribed
    assert len(published(proxy)) == 2


async def test_what_waits_is_delivered_once_after_refused_attempts(mosquitto: Mosquitto, proxy: Proxy) -> None:
    """A client object that is used again delivers twice what had raised an error."""
    async with peer(mosquitto.config, "a", [("x", 1)]) as a, peer(proxy.config, "b") as b:
        proxy.refuse = True
        proxy.reset()
        await until(lambda: b.reasons)
        futures = [b.session.publish("x", b"%d" % i) for i in range(5)]
        attempts = proxy.connections
        await until(lambda: proxy.connections >= attempts + 3)
        proxy.refuse = False
        await asyncio.wait_for(asyncio.gather(*futures), 10)
        await b.session.publish("x", b"last")
        await until(lambda: b"last" in a.payloads)
        assert a.payloads == [b"0", b"1", b"2", b"3", b"4", b"last"]


async def test_birth_goes_first_then_the_unacknowledged_in_order_then_the_rest(proxy: Proxy) -> None:
    b = Peer(proxy.config, "b", greet=lambda link: b.session.publish("s", b"birth", retain=True))
    await b.connected()
    await b.session.drain(5)
    proxy.drop(PUBACK)
    for i in range(3):
        b.session.publish("x", b"%d" % i)
    await until(lambda: proxy.count(PUBACK, up=False) == 4)
    proxy.refuse = True
    proxy.reset()
    await until(lambda: b.reasons)
    b.session.publish("x", b"3")
    proxy.packets.clear()
    proxy.pass_all()
    proxy.refuse = False
    await b.session.drain(10)
    assert published(proxy) == [b"birth", b"0", b"1", b"2", b"3"]
    await b.leave()


async def test_newer_state_replaces_what_was_in_flight(proxy: Proxy) -> None:
    async with peer(proxy.config, "b") as b:
        proxy.drop(PUBACK)
        old = b.session.publish("s", b"old", retain=True)
        await until(lambda: proxy.count(PUBACK, up=False))
        b.session.publish("s", b"new", retain=True)
        await until(lambda: proxy.count(PUBACK, up=False) == 2)
        proxy.packets.clear()
        proxy.pass_all()
        proxy.reset()
        await asyncio.wait_for(old, 10)
        await b.session.drain(10)
        assert published(proxy) == [b"new"]


async def test_subscriptions_hold_on_every_connection(mosquitto: Mosquitto, proxy: Proxy) -> None:
    async with peer(proxy.config, "a", [("x", 1)]) as a, peer(mosquitto.config, "b") as b:
        for times in (1, 2, 3):
            await a.connected(times)
            await b.session.publish("x", b"%d" % times)
            await until(lambda wanted=times: len(a.messages) == wanted)  # type: ignore[misc]
            proxy.reset()
            await until(lambda wanted=times: len(a.reasons) == wanted)  # type: ignore[misc]
    assert len(set(a.links)) == len(a.links)


async def test_a_peer_that_never_answers_is_given_up_and_tried_again(proxy: Proxy) -> None:
    proxy.drop(CONNACK)
    with capture_logs() as logs:
        a = Peer(proxy.config, "a", timeouts=Timeouts(connect_s=0.2, back_off_first_s=0.05, back_off_cap_s=0.1))
        await until(lambda: proxy.connections >= 3)
        await until(lambda: proxy.open <= 1)  # the old sockets are closed, so no zombie can kick us out later
        proxy.pass_all()
        await a.connected()
        await a.leave()
    assert {entry["log_level"] for entry in logs if entry["event"] == "broker unreachable"} == {"warning"}


async def test_a_peer_that_hangs_up_before_answering_is_tried_again_at_once(mosquitto: Mosquitto, proxy: Proxy) -> None:
    proxy.refuse = True
    a = Peer(proxy.config, "a", timeouts=SLOW_TO_GIVE_UP)
    await until(lambda: proxy.connections >= 3, within_s=5)
    proxy.refuse = False
    await a.connected()
    await a.leave()


async def test_an_unreachable_broker_is_named_and_tried_until_it_is_there(mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    with capture_logs() as logs:
        a = Peer(mosquitto.config, "a")
        await until(lambda: len(logs) >= 3)
        assert not a.task.done()
        mosquitto.start()
        await a.connected()
        await a.leave()
    for entry in logs[:3]:
        assert (entry["event"], entry["log_level"]) == ("broker unreachable", "warning")
        assert entry["broker"] == f"{HOST}:{mosquitto.port}"
        assert "refused" in entry["problem"]
        assert 0 < entry["retry_in_s"] <= 0.2


async def test_a_host_that_does_not_exist_is_tried_again() -> None:
    with capture_logs() as logs:
        a = Peer(BrokerConfig(url="mqtt://no-such-host.invalid"), "a")
        await until(lambda: len(logs) >= 2)
        await a.leave()
    assert logs[0]["broker"] == "no-such-host.invalid:1883"


async def test_a_half_open_link_is_noticed_by_the_missing_acknowledgement(mosquitto: Mosquitto, proxy: Proxy) -> None:
    timeouts = Timeouts(connect_s=1, answer_s=0.4, back_off_first_s=0.05, back_off_cap_s=0.1)
    async with peer(mosquitto.config, "a", [("x", 1)]) as a, peer(proxy.config, "b", timeouts=timeouts) as b:
        proxy.freeze()
        done = b.session.publish("x", b"1")
        await until(lambda: b.reasons, within_s=2)
        assert "acknowledgement" in b.reasons[0]
        proxy.thaw()
        await asyncio.wait_for(done, 10)
        await until(lambda: b"1" in a.payloads)


async def test_an_answer_that_stands_in_line_on_a_slow_link_is_waited_for(mosquitto: Mosquitto, proxy: Proxy) -> None:
    timeouts = Timeouts(answer_s=0.5, back_off_first_s=0.05, back_off_cap_s=0.1)
    async with peer(mosquitto.config, "a") as a, peer(proxy.config, "b", [("y", 1)], timeouts=timeouts) as b:
        for _ in range(30):
            a.session.publish("y", bytes(4096))
        await a.session.drain(10)
        await until(lambda: len(b.payloads) == 30)
        proxy.bytes_per_s = 60_000.0
        for _ in range(30):
            a.session.publish("y", bytes(4096))
        await a.session.drain(10)
        await b.session.publish("x", b"1")  # its acknowledgement comes behind two seconds of messages
        assert b.reasons == []


async def test_no_answer_is_waited_for_without_end(mosquitto: Mosquitto, proxy: Proxy) -> None:
    timeouts = Timeouts(answer_s=0.5, longest_answer_s=1.0, back_off_first_s=0.05, back_off_cap_s=0.1)
    async with peer(mosquitto.config, "a") as a, peer(proxy.config, "b", [("y", 1)], timeouts=timeouts) as b:
        proxy.drop(PUBACK)
        done = b.session.publish("x", b"1")
        while not b.reasons:
            a.session.publish("y", b"2")
            await asyncio.sleep(0.05)
        assert b.reasons[0].startswith("no acknowledgement for x within")
        proxy.pass_all()
        await asyncio.wait_for(done, 10)


@pytest.mark.not_on(nats="closes a silent connection before its client can notice anything")
async def test_a_half_open_link_is_noticed_by_keep_alive(proxy: Proxy) -> None:
    config = BrokerConfig(url=proxy.config.url, keep_alive_s=2)
    async with peer(config, "a") as a:
        proxy.freeze()
        await until(lambda: a.reasons, within_s=7)
        assert "Keep alive" in a.reasons[0]
        proxy.thaw()
        await a.connected(2)


async def test_a_frozen_broker_is_left_and_found_again(mosquitto: Mosquitto) -> None:
    timeouts = Timeouts(connect_s=0.2, answer_s=0.3, flush_s=0.3, back_off_first_s=0.05, back_off_cap_s=0.1)
    async with peer(mosquitto.config, "a", [("x", 1)], timeouts=timeouts) as a:
        mosquitto.freeze()
        done = a.session.publish("x", b"1")
        await until(lambda: a.reasons, within_s=3)
        mosquitto.thaw()
        await asyncio.wait_for(done, 10)
        await until(lambda: b"1" in a.payloads)


async def test_a_connection_uses_a_fresh_client_every_time(proxy: Proxy) -> None:
    async with peer(proxy.config, "a") as a:
        for times in (2, 3):
            proxy.reset()
            await a.connected(times)
        assert proxy.count(CONNECT, up=True) == 3
        assert a.session.connects == 3


async def test_a_publish_that_ends_every_connection_is_explained(proxy: Proxy) -> None:
    """Some brokers close the connection of whoever publishes where it may not."""

    def deny(packet: Packet) -> bytes | None:
        if packet.kind == PUBLISH and packet.up and b"denied/topic" in packet.data:
            proxy.reset()
            return None
        return packet.data

    proxy.alter = deny
    with capture_logs() as logs:
        async with peer(proxy.config, "a") as a:
            a.session.publish("denied/topic", b"1")
            await until(lambda: any("hint" in entry for entry in logs))
    told = next(entry for entry in logs if "hint" in entry)
    assert told["sending"] == ("denied/topic",)
    assert "ACL" in told["hint"]
    assert told["short_lived"] == 3


def test_pauses_double_up_to_the_cap_with_jitter_and_start_afresh() -> None:
    back_off = BackOff(1.0, 4.0)
    for _ in range(3):
        for step in (1.0, 2.0, 4.0, 4.0):
            assert 0.1 * step <= back_off.pause_s() <= step
        back_off.reset()
    assert len({back_off.pause_s() for _ in range(20)}) > 10


async def test_a_lasting_connection_starts_the_back_off_afresh_and_a_short_one_does_not(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, draw = list[float](), BackOff.pause_s

    def pause_s(back_off: BackOff, *, refused: bool = False) -> float:
        pauses.append(draw(back_off, refused=refused))
        return pauses[-1]

    monkeypatch.setattr(BackOff, "pause_s", pause_s)
    timeouts = Timeouts(connect_s=1, back_off_first_s=0.01, back_off_cap_s=0.64, stable_s=1.0)
    a = Peer(proxy.config, "a", timeouts=timeouts)
    for times in range(1, 6):
        await a.connected(times)
        proxy.reset()
        await until(lambda wanted=times: len(a.reasons) == wanted)  # type: ignore[misc]
    await a.connected(6)
    await asyncio.sleep(1.05)
    proxy.reset()
    await until(lambda: len(a.reasons) == 6)
    await a.leave()
    assert pauses[4] >= 0.01  # drawn from a step of 0.16 s
    assert pauses[5] <= 0.01


@pytest.mark.parametrize("state", ["no answer", "unreachable", "no route", "connected"])
async def test_cancelled_in_any_state_it_ends_cleanly_and_soon(proxy: Proxy, state: str) -> None:
    """`nothing_left_behind` looks for what is left."""
    config, expected = proxy.config, {"no answer": 1, "connected": 1}.get(state, 0)
    with contextlib.ExitStack() as stack:
        if state == "no answer":
            proxy.drop(CONNACK)
        if state == "unreachable":
            config = BrokerConfig(url=f"mqtt://{HOST}:{free_port()}")
        if state == "no route":
            config = BrokerConfig(url=stack.enter_context(deaf_listener()))
        a = Peer(config, "a", timeouts=FAST)
        await until(lambda: proxy.connections >= expected)
        await asyncio.sleep(0.1)
        waiting = a.session.publish("x", b"")
        began = asyncio.get_running_loop().time()
        await a.leave()
        assert a.task.cancelled()
        assert asyncio.get_running_loop().time() - began < 2
        assert waiting.done()
        await until(lambda: proxy.open == 0)


async def test_cancelled_while_a_thread_connects_it_leaves_no_zombie(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread cannot be stopped; what it opens later would kick out the next session with our client id."""
    entered = threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> socket.socket:
        entered.set()
        time.sleep(0.2)
        return create_connection(*args, **kwargs)

    create_connection = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", slowly)
    a = Peer(proxy.config, "a")
    await until(entered.is_set)
    await a.leave()
    monkeypatch.undo()
    assert proxy.connections == 1
    await until(lambda: proxy.open == 0, within_s=1)


@contextlib.contextmanager
def deaf_listener() -> Iterator[str]:
    """A port whose queue of connections is full: connecting hangs."""
    with socket.socket() as listener, contextlib.ExitStack() as fillers:
        listener.bind((HOST, 0))
        listener.listen(0)
        for _ in range(2):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        yield f"mqtt://{HOST}:{listener.getsockname()[1]}"
