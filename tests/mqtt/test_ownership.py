"""Topics with a will: late wills, deaths, farewells, and two processes with one id."""

import asyncio
import contextlib
import json
from typing import Any

import pytest

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import NodeReplaced
from meerkat_mq.mqtt import Message, Session, Timeouts, Will
from meerkat_mq.rounds.presence import Ownership, Presence
from tests.support.mosquitto import Mosquitto
from tests.support.peer import Peer, peer
from tests.support.proxy import CONNECT, PUBACK, PUBLISH, Proxy
from tests.support.waiting import until

STATUS = "f/up/node-1/status"


class Owner:
    """A node in miniature: it does with the presence rule what services do."""

    def __init__(self, broker: BrokerConfig, boot: int, host: str, **options: Any) -> None:
        self.boot, self.host = boot, host
        self.presence = Presence(boot)
        self.republished = 0
        self.session = Session(
            broker,
            "node-1",
            subscriptions=[("f/run", 1)],
            on_message=self.on_message,
            on_connected=self.on_connected,
            on_disconnected=lambda reason: self.presence.disconnected(),
            will=lambda link: Will(STATUS, self.state("lost", link)),
            farewell=lambda link: Will(STATUS, self.state("stopped", link)),
            **options,
        )
        self.task = asyncio.create_task(self.session.run())

    def state(self, status: str, link: int) -> bytes:
        return json.dumps({"status": status, "boot": self.boot, "link": link, "host": self.host}).encode()

    def on_connected(self, link: int) -> None:
        self.presence.connected(link)
        self.session.publish(STATUS, self.state("online", link), retain=True)

    def on_message(self, message: Message) -> None:
        if message.topic != STATUS:
            return
        found = json.loads(message.payload)
        online = found["status"] == "online"
        verdict = self.presence.judge(found["boot"], found["link"], online=online, retained=message.retained)
        if verdict is Ownership.REPLACED:
            self.session.disown()
            raise NodeReplaced("node-1", f"another process with this id runs on {found['host']}", "give it its own id")
        if verdict is Ownership.OVERWRITTEN and self.session.link is not None:
            self.republished += 1
            self.session.publish(STATUS, self.state("online", self.session.link), retain=True)

    async def leave(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class Observer(Peer):
    """Sees the status topic as everybody else does."""

    def __init__(self, broker: BrokerConfig) -> None:
        super().__init__(broker, "observer", [(STATUS, 1)])

    @property
    def states(self) -> list[tuple[str, int]]:
        return [(state["status"], state["boot"]) for state in map(json.loads, self.payloads)]

    async def sees(self, status: str, boot: int) -> None:
        await until(lambda: self.states[-1:] == [(status, boot)])


@contextlib.asynccontextmanager
async def observing(broker: BrokerConfig):  # type: ignore[no-untyped-def]
    observer = Observer(broker)
    await observer.connected()
    yield observer
    await observer.leave()


async def test_birth_death_and_rebirth(mosquitto: Mosquitto, proxy: Proxy) -> None:
    async with observing(mosquitto.config) as observer:
        owner = Owner(proxy.config, 1, "here", timeouts=Timeouts(back_off_first_s=0.1))
        await observer.sees("online", 1)
        proxy.reset()
        await until(lambda: ("lost", 1) in observer.states)
        await observer.sees("online", 1)
        links = [json.loads(payload)["link"] for payload in observer.payloads]
        assert links[0] == links[1] != links[2]
        await owner.leave()


async def test_an_orderly_end_says_farewell_and_leaves_no_will(mosquitto: Mosquitto) -> None:
    async with observing(mosquitto.config) as observer:
        owner = Owner(mosquitto.config, 1, "here")
        await observer.sees("online", 1)
        for _ in range(50):
            owner.session.publish("f/up/node-1/update", bytes(50))
        await owner.leave()
        await observer.sees("stopped", 1)
        await observer.session.publish("unrelated", b"")  # a will would have come before this is acknowledged
        assert observer.states == [("online", 1), ("stopped", 1)]


@pytest.mark.parametrize("again", [False, True])
async def test_whoever_stops_while_it_connects_says_farewell_and_leaves_no_will(
    mosquitto: Mosquitto, proxy: Proxy, again: bool
) -> None:
    async with observing(mosquitto.config) as observer:
        proxy.pause_s = 0.0 if again else 0.1
        owner = Owner(proxy.config, 1, "here", timeouts=Timeouts(back_off_first_s=0.1))
        if again:
            await observer.sees("online", 1)
            proxy.pause_s = 0.1
            proxy.reset()
            await observer.sees("lost", 1)
        before = observer.states
        await until(lambda: proxy.count(CONNECT, up=True) == 1 + again)
        await owner.leave()
        await observer.sees("stopped", 1)
        await observer.session.publish("unrelated", b"")  # a will would have come before this is acknowledged
        assert observer.states == [*before, ("stopped", 1)]


async def test_what_waits_is_flushed_before_the_farewell(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "a", [("x", 1), (STATUS, 1)]) as a:
        owner = Owner(mosquitto.config, 1, "here")
        await until(lambda: owner.session.link is not None)
        for i in range(200):
            owner.session.publish("x", b"%d" % i)
        await owner.leave()
        await until(lambda: b"stopped" in a.payloads[-1])
        assert [m.payload for m in a.messages if m.topic == "x"] == [b"%d" % i for i in range(200)]


@pytest.mark.parametrize("size", [0, 8_000_000])
async def test_an_orderly_end_over_a_dead_link_takes_little_longer_than_the_flush(proxy: Proxy, size: int) -> None:
    """Also when the system's buffers are full, so that not even DISCONNECT can be written."""
    config = BrokerConfig(url=proxy.config.url, max_packet_bytes=16_000_000)
    owner = Owner(config, 1, "here", timeouts=Timeouts(flush_s=0.3))
    await until(lambda: owner.session.link is not None)
    await owner.session.drain(5)
    proxy.freeze()
    owner.session.publish("x", bytes(size))
    began = asyncio.get_running_loop().time()
    await owner.leave()
    assert 0.3 <= asyncio.get_running_loop().time() - began < 1.5
    proxy.thaw()


async def test_an_exception_in_a_callback_ends_the_session_loudly_and_fires_the_will(mosquitto: Mosquitto) -> None:
    def react(message: Message) -> None:
        raise ZeroDivisionError(message.topic)

    async with peer(mosquitto.config, "a", [("st", 1), ("x", 1)]) as a:
        b = Peer(mosquitto.config, "b", [("x", 1)], react=react, will=lambda link: Will("st", b"dead"))
        await b.connected()
        for _ in range(3):
            a.session.publish("x", b"")
        with pytest.raises(ZeroDivisionError, match="x"):
            await asyncio.wait_for(b.task, 5)
        await until(lambda: b"dead" in a.payloads)
        assert len(b.messages) == 1


async def test_an_exception_on_connecting_ends_the_session_loudly(mosquitto: Mosquitto) -> None:
    def greet(link: int) -> None:
        raise ZeroDivisionError(link)

    b = Peer(mosquitto.config, "b", greet=greet)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(b.task, 5)


async def test_a_late_will_is_overwritten_again(mosquitto: Mosquitto) -> None:
    async with observing(mosquitto.config) as observer:
        owner = Owner(mosquitto.config, 1, "here")
        await observer.sees("online", 1)
        await observer.session.publish(STATUS, owner.state("lost", link=12345), retain=True)
        await until(lambda: observer.states == [("online", 1), ("lost", 1), ("online", 1)])
        assert owner.republished == 1
        await owner.leave()


async def test_a_quick_succession_of_states_is_not_mistaken_for_a_late_will(mosquitto: Mosquitto) -> None:
    async with observing(mosquitto.config) as observer:
        owner = Owner(mosquitto.config, 1, "here")
        await observer.sees("online", 1)
        assert owner.session.link is not None
        for _ in range(5):
            await owner.session.publish(STATUS, owner.state("online", owner.session.link), retain=True)
        await owner.leave()
        await observer.sees("stopped", 1)
        assert owner.republished == 0


async def test_state_on_our_topic_comes_before_on_connected(mosquitto: Mosquitto) -> None:
    """Even behind hundreds of other retained messages, which come over time."""
    async with peer(mosquitto.config, "a") as a:
        for i in range(300):
            a.session.publish(f"st/{i:03}", bytes(1000), retain=True)
        await a.session.drain(10)
    seen: list[list[str]] = []
    b = Peer(
        mosquitto.config,
        "b",
        [("st/+", 1)],
        will=lambda link: Will("st/222", b"dead"),
        greet=lambda link: seen.append([message.topic for message in b.messages]),
    )
    await b.connected()
    assert seen[0][0] == "st/222"
    await b.leave()


async def test_state_on_our_topic_comes_before_on_connected_over_a_slow_link(
    mosquitto: Mosquitto, proxy: Proxy
) -> None:
    """Mosquitto answers SUBSCRIBE before it sends what is retained."""
    async with peer(mosquitto.config, "a") as a:
        await a.session.publish("st", b"old", retain=True)
    proxy.pause_s = 0.05
    seen: list[list[bytes]] = []
    b = Peer(proxy.config, "b", will=lambda link: Will("st", b"dead"), greet=lambda link: seen.append(list(b.payloads)))
    await b.connected()
    assert seen == [[b"old"]]
    await b.leave()


async def test_two_processes_with_one_id(mosquitto: Mosquitto, proxy: Proxy) -> None:
    """The older one ends and names the newer one's host; the newer one works on; no more than 5 connections."""
    async with observing(mosquitto.config) as observer:
        old = Owner(proxy.config, 1, "old-host")
        await observer.sees("online", 1)
        new = Owner(proxy.config, 2, "new-host")
        with pytest.raises(NodeReplaced, match="new-host"):
            await asyncio.wait_for(old.task, 10)
        await until(lambda: new.session.link is not None)
        await observer.sees("online", 2)
        await asyncio.wait_for(new.session.publish("x", b"works on"), 5)
        assert not new.task.done()
        assert proxy.connections <= 5
        wills = observer.states.count(("lost", 1))  # when it was closed; leaving for good it fired none
        assert wills == 1 or (wills == 0 and not mosquitto.wills_at_takeover)
        await new.leave()


async def test_the_newer_one_survives_even_where_the_older_ones_will_comes_last(mosquitto: Mosquitto) -> None:
    async with observing(mosquitto.config) as observer:
        old = Owner(mosquitto.config, 1, "old-host", timeouts=Timeouts(back_off_first_s=30, back_off_cap_s=30))
        await observer.sees("online", 1)
        new = Owner(mosquitto.config, 2, "new-host", timeouts=Timeouts(back_off_first_s=0.1))
        await observer.sees("online", 2)
        async with peer(mosquitto.config, "node-1", will=lambda link: Will(STATUS, old.state("lost", link))):
            await until(lambda: new.session.link is None)
        await until(lambda: new.session.connects == 2)
        await observer.sees("online", 2)
        await old.leave()
        await new.leave()


async def test_after_disown_nothing_is_said_any_more(mosquitto: Mosquitto, proxy: Proxy) -> None:
    async with observing(mosquitto.config) as observer:
        owner = Owner(proxy.config, 1, "here")
        await observer.sees("online", 1)
        await owner.session.drain(5)
        proxy.drop(PUBACK)
        unanswered = owner.session.publish("x", b"")
        await until(lambda: proxy.count(PUBACK, up=False) == 2)
        owner.session.disown()
        late = owner.session.publish("x", b"")
        publishes = proxy.count(PUBLISH, up=True)
        await owner.leave()
        await observer.session.publish("unrelated", b"")
        assert observer.states == [("online", 1)]
        assert proxy.count(PUBLISH, up=True) == publishes
        for future in (unanswered, late):
            with pytest.raises(Exception, match="another process owns"):
                await future
