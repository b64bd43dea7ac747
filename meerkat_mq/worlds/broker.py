"""A broker in memory: topics, retained messages, wills, clean sessions, at least once; and bad links to it.

A client is the Transport port of one process. As on MQTT, what was retained on the topic of its will comes before
`connected`; what was retained elsewhere comes before it or after it, as it happens. What waits for a connection goes
out in order, after what `connected` publishes.
"""

import random
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, Protocol

from meerkat_mq.errors import PayloadTooLarge
from meerkat_mq.wire.limits import packet_bytes
from meerkat_mq.worlds.clock import VirtualClock, VirtualProcess

KEEP_ALIVE_S = 1.5
BACK_OFF_S = (0.2, 0.5, 1.0)
RECENT_S = 0.1  # what was sent so shortly before a connection broke may go twice
LARGEST_PACKET = 2**28


@dataclass(slots=True)
class LinkConditions:
    """How bad a link is: probabilities, and seconds of delay; with `only`, it loses just what goes up or down."""

    lose: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0
    only: Literal["up", "down"] | None = None


@dataclass(frozen=True, slots=True)
class VirtualMessage:
    """What is published; `sent` is when, by whoever published it."""

    topic: str
    payload: bytes
    retain: bool = False
    sent: float = 0.0


@lru_cache(65_536)
def matches(pattern: str, topic: str) -> bool:
    """Whether a topic lies in a filter, which may have `+` levels."""
    if "+" not in pattern:
        return pattern == topic
    wanted, found = pattern.split("/"), topic.split("/")
    return len(wanted) == len(found) and all(want in ("+", level) for want, level in zip(wanted, found, strict=True))


class Driver(Protocol):
    """Who is told what comes by a session."""

    def received(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """A message came."""

    def connected(self, link: int) -> None:
        """A connection stands, and what was retained on the topic of the will has been received."""

    def disconnected(self) -> None:
        """The connection is gone."""


class Client:
    """One process's session with the broker.

    Args:
        broker: to connect to.
        process: everything that comes is its to do.
        filters: what it subscribes to.
        own: the topic of its will.
        will: makes the payload of the last words, for a link.
        latency_s: of its link, one way.
        largest: MQTT packet, in bytes.

    Attributes:
        cut: its link carries nothing, and neither side knows.
        closed: the process has ended: no more connections.
    """

    def __init__(
        self,
        broker: "Broker",
        process: VirtualProcess,
        *,
        filters: Collection[str],
        own: str,
        will: Callable[[int], bytes],
        latency_s: float = 0.001,
        largest: int = LARGEST_PACKET,
    ) -> None:
        self.link: int | None = None
        self.own = own
        self.process = process
        self.filters = set(filters) | {own}
        self.latency_s = latency_s
        self.will = will
        self.cut = self.closed = self.disowned = False
        self.conditions: LinkConditions | None = None
        self.ready_at = 0.0
        self.tries = 0
        self.outbox: list[VirtualMessage] = []
        self.recent: deque[tuple[float, VirtualMessage]] = deque(maxlen=3)
        self.last_words = b""  # for the present connection
        self._broker = broker
        self._driver: Driver | None = None
        self._largest = largest

    # --- the port ---

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send a message, now or on the next connection.

        Raises:
            PayloadTooLarge: it does not fit a packet.
        """
        self.process.step()
        if self.disowned:
            return
        size = packet_bytes(topic, payload, 1)
        if size > self._largest:
            problem = f"a packet of {size} bytes is over the limit of {self._largest}"
            raise PayloadTooLarge(topic, problem, "raise broker.max_packet_bytes, where the broker takes it")
        self._broker.publish(self, VirtualMessage(topic, payload, retain, self.process.now()))

    def subscribe(self, topic: str) -> None:
        """Add a filter."""
        self.filters.add(topic)
        self._broker.filters_changed()
        if self.link is not None:
            self._broker.send_retained(self, topic)

    def unsubscribe(self, topic: str) -> None:
        """Remove a filter."""
        if topic in self.filters:
            self.filters.remove(topic)
            self._broker.filters_changed()

    def renew(self) -> None:
        """Make another connection, with the will as it is then."""
        self._broker.renew(self)

    def disown(self) -> None:
        """Publish no more, and leave no will."""
        self.disowned = True
        self.outbox.clear()

    # --- what becomes of it ---

    def join(self, driver: Driver) -> None:
        """Connect, from now on, for this driver."""
        self._driver = driver
        self._broker.join(self)

    def hears(self, topic: str) -> bool:
        """Whether it subscribes to a topic."""
        return topic in self.filters or any(matches(pattern, topic) for pattern in self.filters if "+" in pattern)

    @property
    def driver(self) -> Driver:
        """Whose session it is."""
        assert self._driver is not None
        return self._driver

    def lose(self) -> None:
        """The connection is gone."""
        self.link = None
        self.process.call(self.driver.disconnected)


class Broker:
    """Routes at once; links take time, and break.

    Attributes:
        up: False while it is down.
        retained: by topic.
        passed: messages routed, for replays.
        routed: is told of each message that reaches the broker.
        delivered: is told of each message that reaches a client.
    """

    def __init__(
        self,
        clock: VirtualClock,
        chance: random.Random,
        *,
        routed: Callable[[VirtualMessage], None] = lambda message: None,
        delivered: Callable[[VirtualMessage], None] = lambda message: None,
    ) -> None:
        self.up = True
        self.retained: dict[str, VirtualMessage] = {}
        self.passed: deque[VirtualMessage] = deque(maxlen=4000)
        self._clock = clock
        self._chance = chance
        self._routed = routed
        self._delivered = delivered
        self._clients: list[Client] = []
        self._hearers: dict[str, list[Client]] = {}  # by topic
        self._links = 0

    # --- connections ---

    def join(self, client: Client) -> None:
        """A process opens its session."""
        client.closed = False
        self._clients.append(client)
        self.filters_changed()
        self._clock.at(self._clock.now() + 0.001, partial(self._connect, client))

    def _connect(self, client: Client) -> None:
        if client.closed or client.link is not None:
            return
        if not self.up or client.cut:
            self._try_again(client)
            return
        self._links += 1
        client.link, client.tries, client.last_words = self._links, 0, client.will(self._links)
        if (own := self.retained.get(client.own)) is not None:
            self._down(client, own, retained=True)
        others = [
            message for topic, message in self.retained.items() if topic != client.own and client.hears(topic)
        ]  # fmt: skip
        early = bool(others) and self._chance.random() < 0.5
        for message in others if early else ():
            self._down(client, message, retained=True)
        greet_at = max(self._clock.now() + client.latency_s, client.ready_at)
        self._clock.at(greet_at, partial(self._greet, client, client.link))
        for message in () if early else others:
            self._down(client, message, retained=True)

    def send_retained(self, client: Client, pattern: str) -> None:
        """A client has subscribed."""
        for message in [message for topic, message in self.retained.items() if matches(pattern, topic)]:
            self._down(client, message, retained=True)

    def _try_again(self, client: Client) -> None:
        wait = BACK_OFF_S[min(client.tries, len(BACK_OFF_S) - 1)]
        client.tries += 1
        self._clock.at(self._clock.now() + wait, partial(self._connect, client))

    def _greet(self, client: Client, link: int) -> None:
        if client.link == link:
            earlier, client.outbox = client.outbox, []
            client.process.call(partial(client.driver.connected, link))
            for message in earlier:
                self.publish(client, message)

    def break_link(self, client: Client, *, will_s: float = 0.0) -> None:
        """The connection is gone: what is on its way is lost, the will goes out, the client tries again."""
        if client.link is None:
            return
        since = self._clock.now() - RECENT_S
        client.outbox = [message for sent, message in client.recent if sent >= since] + client.outbox
        client.recent.clear()
        self._say_will(client, will_s)
        client.lose()
        self._try_again(client)

    def _say_will(self, client: Client, will_s: float) -> None:
        if client.link is not None and not client.disowned:
            will = VirtualMessage(client.own, client.last_words, retain=True, sent=self._clock.now())
            self._clock.at(self._clock.now() + will_s, partial(self._route, will))

    def renew(self, client: Client) -> None:
        """The client leaves in order, and connects again at once."""
        if client.link is not None:
            client.recent.clear()
            client.lose()
            self._clock.at(self._clock.now() + 0.001, partial(self._connect, client))

    def leave(self, client: Client, *, will_s: float = 0.0, farewell: bytes | None = None) -> None:
        """The process has ended, killed or with a farewell, or does not want to be connected until it joins again."""
        if farewell is None or client.cut:
            self._say_will(client, will_s)
        elif client.link is not None and not client.disowned:
            self._route(VirtualMessage(client.own, farewell, retain=True, sent=self._clock.now()))
        client.link, client.closed = None, True
        if client in self._clients:
            self._clients.remove(client)
            self.filters_changed()

    def part(self, client: Client) -> None:
        """Cut the client off, silently, until `rejoin`."""
        client.cut = True
        self._clock.at(self._clock.now() + KEEP_ALIVE_S, partial(self._miss, client, client.link))

    def _miss(self, client: Client, link: int | None) -> None:
        if client.cut and client.link == link:
            self.break_link(client)

    def rejoin(self, client: Client) -> None:
        """The link carries again; what TCP could not repair breaks the connection."""
        client.cut = False
        self.break_link(client)

    def crash(self) -> None:
        """The broker dies: no wills, and nothing retained is kept."""
        self.up = False
        self.retained.clear()
        for client in list(self._clients):
            if client.link is not None:
                client.lose()
                self._try_again(client)

    # --- messages ---

    def publish(self, client: Client, message: VirtualMessage) -> None:
        """A client publishes, now or once it is connected."""
        if client.link is None:
            if message.retain:
                client.outbox = [waiting for waiting in client.outbox if waiting.topic != message.topic]
            client.outbox.append(message)
            return
        client.recent.append((self._clock.now(), message))
        if client.cut:
            return
        if client.conditions is None:
            self._route(message)
            return
        for delay in self._fate(client.conditions, "up"):
            self._clock.at(self._clock.now() + delay, partial(self._arrive, client, client.link, message))

    def _arrive(self, client: Client, link: int, message: VirtualMessage) -> None:
        if client.link == link and not client.cut:
            self._route(message)

    def _route(self, message: VirtualMessage) -> None:
        if not self.up:
            return
        self.passed.append(message)
        self._routed(message)
        if message.retain:
            self.retained[message.topic] = message
        self.spread(message)

    def spread(self, message: VirtualMessage) -> None:
        """Give a message to everybody who listens."""
        hearers = self._hearers.get(message.topic)
        if hearers is None:
            hearers = [client for client in self._clients if client.hears(message.topic)]
            self._hearers[message.topic] = hearers
        for client in hearers:
            if client.link is not None:
                self._down(client, message, retained=False)

    def filters_changed(self) -> None:
        """Somebody subscribes to something else now."""
        self._hearers.clear()

    def _down(self, client: Client, message: VirtualMessage, *, retained: bool) -> None:
        now, conditions = self._clock.now(), client.conditions
        if client.cut or client.link is None:
            return
        for delay in (0.0,) if conditions is None else self._fate(conditions, "down"):
            time = now + delay + client.latency_s
            if conditions is None or self._chance.random() >= conditions.reorder:
                time = client.ready_at = max(client.ready_at, time)
            self._clock.at(time, partial(self._land, client, client.link, message, retained))

    def _land(self, client: Client, link: int, message: VirtualMessage, retained: bool) -> None:
        if client.link == link and not client.cut:
            self._delivered(message)
            topic, payload = message.topic, message.payload
            client.process.call(partial(client.driver.received, topic, payload, retained=retained))

    def _fate(self, conditions: LinkConditions, way: str) -> list[float]:
        chance = self._chance.random
        if chance() < conditions.lose and conditions.only in (None, way):
            return []
        copies = 2 if chance() < conditions.duplicate else 1
        return [conditions.delay * chance() for _ in range(copies)]
