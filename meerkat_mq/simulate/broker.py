"""A broker in memory: topics, retained messages, wills, clean sessions, at least once; and bad links to it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from meerkat_mq.simulate.world import Clock
from meerkat_mq.wire.frames import Frame, decode, encode

KEEP_ALIVE_S = 1.5
BACK_OFF_S = (0.2, 0.5, 1.0)
RECENT_S = 0.1  # what was sent so shortly before a connection broke may go twice

Topic = tuple[str, str]  # kind, node ("" where there is one for all)


@dataclass(slots=True)
class Weather:
    """How bad a link is: probabilities, and seconds of delay."""

    lose: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """What is published."""

    topic: Topic
    payload: Any
    retain: bool


@dataclass(slots=True, eq=False)
class Client:
    """A process's session with the broker.

    Attributes:
        hears: whether it subscribes to a topic.
        deliver: takes (topic, payload).
        greeted: a connection stands, and what was retained is delivered.
        will: makes the last words of the present connection.
        link: number of the connection.
        closed: the process has ended: no more connections.
    """

    hears: Callable[[Topic], bool]
    deliver: Callable[[Topic, Any], None]
    greeted: Callable[[int], None]
    will: Callable[[int], Message]
    latency_s: float
    connected: bool = False
    cut: bool = False
    closed: bool = False
    link: int = 0
    weather: Weather | None = None
    ready_at: float = 0.0
    tries: int = 0
    outbox: list[Message] = field(default_factory=list)
    recent: deque[tuple[float, Message]] = field(default_factory=lambda: deque(maxlen=3))


class Broker:
    """Routes at once; links take time, and break.

    Attributes:
        up: False while it is down.
        retained: by topic.
        passed: messages routed, for replays.
    """

    def __init__(self, clock: Clock, *, wire: bool = False) -> None:
        self.up = True
        self.retained: dict[Topic, Message] = {}
        self.passed: deque[Message] = deque(maxlen=4000)
        self._clock = clock
        self._wire = wire
        self._clients: list[Client] = []
        self._links = 0

    # --- connections ---

    def join(self, client: Client) -> None:
        """A process opens its session."""
        self._clients.append(client)
        self._clock.at(self._clock.now + 0.001, self._connect, client)

    def _connect(self, client: Client) -> None:
        if client.closed or client.connected:
            return
        if not self.up or client.cut:
            self._try_again(client)
            return
        self._links += 1
        client.link, client.connected, client.tries = self._links, True, 0
        for message in list(self.retained.values()):
            if client.hears(message.topic):
                self._down(client, message)
        self._clock.at(max(self._clock.now + client.latency_s, client.ready_at), self._greet, client, client.link)

    def _try_again(self, client: Client) -> None:
        wait = BACK_OFF_S[min(client.tries, len(BACK_OFF_S) - 1)]
        client.tries += 1
        self._clock.at(self._clock.now + wait, self._connect, client)

    def _greet(self, client: Client, link: int) -> None:
        if client.connected and client.link == link:
            earlier, client.outbox = client.outbox, []
            client.greeted(link)
            for message in earlier:
                self.publish(client, message)

    def break_link(self, client: Client, *, will_s: float = 0.0) -> None:
        """The connection is gone: what is on its way is lost, the will goes out, the client tries again."""
        if not client.connected:
            return
        client.connected = False
        since = self._clock.now - RECENT_S
        client.outbox = [message for sent, message in client.recent if sent >= since] + client.outbox
        client.recent.clear()
        self._clock.at(self._clock.now + will_s, self._route, client.will(client.link))
        self._try_again(client)

    def leave(self, client: Client, *, will_s: float = 0.0, farewell: Message | None = None) -> None:
        """The process has ended: killed, or with a farewell."""
        if client.connected:
            client.connected = False
            self._clock.at(self._clock.now + will_s, self._route, farewell or client.will(client.link))
        client.closed = True
        if client in self._clients:
            self._clients.remove(client)

    def part(self, client: Client) -> None:
        """Cut the client off, silently, until `rejoin`."""
        client.cut = True
        self._clock.at(self._clock.now + KEEP_ALIVE_S, self._miss, client, client.link)

    def _miss(self, client: Client, link: int) -> None:
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
        for client in self._clients:
            if client.connected:
                client.connected = False
                self._try_again(client)

    # --- messages ---

    def publish(self, client: Client, message: Message) -> None:
        """A client publishes, now or once it is connected."""
        if self._wire and isinstance(message.payload, Frame):
            message = replace(message, payload=decode(encode(message.payload)))
        if not client.connected:
            client.outbox.append(message)
            return
        client.recent.append((self._clock.now, message))
        if client.cut:
            return
        if client.weather is None:
            self._route(message)
            return
        for delay in self._fate(client.weather):
            self._clock.at(self._clock.now + delay, self._arrive, client, client.link, message)

    def _arrive(self, client: Client, link: int, message: Message) -> None:
        if client.connected and client.link == link and not client.cut:
            self._route(message)

    def _route(self, message: Message) -> None:
        if not self.up:
            return
        self.passed.append(message)
        if message.retain:
            self.retained[message.topic] = message
        self.spread(message)

    def spread(self, message: Message) -> None:
        """Give a message to everybody who listens."""
        topic = message.topic
        for client in self._clients:
            if client.connected and client.hears(topic):
                self._down(client, message)

    def _down(self, client: Client, message: Message) -> None:
        now, weather = self._clock.now, client.weather
        if client.cut:
            return
        for delay in (0.0,) if weather is None else self._fate(weather):
            time = now + delay + client.latency_s
            if weather is None or self._clock.random.random() >= weather.reorder:
                time = client.ready_at = max(client.ready_at, time)
            self._clock.at(time, self._land, client, client.link, message)

    def _land(self, client: Client, link: int, message: Message) -> None:
        if client.connected and client.link == link and not client.cut:
            client.deliver(message.topic, message.payload)

    def _fate(self, weather: Weather) -> list[float]:
        chance = self._clock.random.random
        if chance() < weather.lose:
            return []
        copies = 2 if chance() < weather.duplicate else 1
        return [weather.delay * chance() for _ in range(copies)]
