"""One session with the broker: connects, reconnects, keeps what was not acknowledged, announces its owner."""

import asyncio
import contextlib
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BrokerError, MeerkatError, NotConnected, PayloadTooLarge
from meerkat_mq.mqtt.connection import Connection, takes_without_will
from meerkat_mq.mqtt.ends import Lost, Refused, Sending
from meerkat_mq.mqtt.expiry import watch_expiry
from meerkat_mq.mqtt.marker import Marker
from meerkat_mq.mqtt.message import Message, MessageCount, Will
from meerkat_mq.mqtt.outbox import Outbox, Outgoing
from meerkat_mq.mqtt.own_topic import OwnTopic
from meerkat_mq.mqtt.timeouts import Timeouts
from meerkat_mq.mqtt.trouble import Trouble, bound
from meerkat_mq.wire.limits import packet_bytes

_TIMEOUTS = Timeouts()


class Session:
    """A broker session that outlives connections.

    All calls and callbacks happen on the thread of the event loop; callbacks must not block. An exception from a
    callback ends `run()` with that exception, without DISCONNECT, so that the broker publishes the will.

    Each connection goes: draw `link`, ask `will(link)`, connect, subscribe to the will's topic, subscribe to the rest,
    wait until the broker has answered all that. By then what was retained on the will's topic has gone through
    `on_message`. Then `on_connected(link)`; what it publishes goes out first; then, in order, what earlier connections
    left unacknowledged; then the rest. Delivery is at least once: receivers tell duplicates by what is in the frames.

    Args:
        client_id: fixed; the broker closes an older connection with the same one.
        subscriptions: (filter, qos) that hold on every connection; the will's topic is added, first.
        on_message: takes each message, in order.
        on_connected: takes the link; re-publish state here.
        on_disconnected: takes the reason, for people; called once after each `on_connected`, unless `run()` ends.
        will: the state that the broker publishes when this link breaks.
        farewell: the state to publish at an orderly end, when `run()` is cancelled; None: what stands there is right.
        kind_of: what to count a topic's traffic under in `sent` and `received`.
        outbox_bytes: how much may wait for the broker; retained messages may always.
        retained_first: whether those go before all else.
        name: the user that the federation's rights are given to; where our certificate names another, hints say so.
        marker: says whether this client was connected in an earlier process.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        *,
        subscriptions: Sequence[tuple[str, int]] = (),
        on_message: Callable[[Message], None],
        on_connected: Callable[[int], None] = lambda link: None,
        on_disconnected: Callable[[str], None] = lambda reason: None,
        will: Callable[[int], Will] | None = None,
        farewell: Callable[[int], Will | None] | None = None,
        timeouts: Timeouts = _TIMEOUTS,
        kind_of: Callable[[str], str] = lambda topic: "all",
        outbox_bytes: int = 64 * 2**20,
        retained_first: bool = False,
        name: str | None = None,
        marker: Marker | None = None,
    ) -> None:
        self.link: int | None = None  # of the current connection
        self.connects = 0  # connections that got as far as `on_connected`
        self.sent = defaultdict[str, MessageCount](MessageCount)  # per kind; what is sent again counts again
        self.received = defaultdict[str, MessageCount](MessageCount)  # per kind
        self._broker = broker
        self._client_id = client_id
        self._filters = dict(subscriptions)
        self._filters_changed = asyncio.Event()
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._will = will
        self._farewell = farewell
        self._timeouts = timeouts
        self._kind_of = kind_of
        self._outbox = Outbox(outbox_bytes, retained_first=retained_first)
        self._name = name
        self._marker = marker
        self._is_marked = False
        self._own: OwnTopic | None = None
        self._disowned = False
        self._is_leaving = False
        self._renewal: asyncio.Future[None] | None = None
        self._log = structlog.get_logger().bind(broker=broker.address, client=client_id)
        self._trouble = Trouble(self._log, timeouts)

    async def run(self) -> None:
        """Keep a connection until cancelled. What a broker refuses is tried again, unless `broker.give_up` says else.

        Cancelled: sends what waits and the farewell (at most `flush_s`), then DISCONNECT, so no will; where it has only
        begun to connect, the farewell alone. It may be called again then: subscriptions and counts stay; what is
        published in between is dropped.

        Raises:
            BadCredentials: given up: the broker refuses us.
            BrokerError: given up: it refuses a subscription or the client id, or its certificate does not verify.
            ConfigError: given up: a TLS file cannot be used.
            Exception: whatever a callback raised.
        """
        if self._broker.shows_password:
            means = "everybody between this machine and the broker can read it: use mqtts:// in broker.url"
            self._log.warning("password sent without encryption", means=means)
        self._outbox.open()
        self._trouble.begin()
        self._is_leaving = False
        try:
            while True:
                pause_s = await self._connect_once()
                if self._trouble.asks_why:
                    self._trouble.will_refused = await takes_without_will(self._broker, self._client_id, self._timeouts)
                await asyncio.sleep(pause_s)
        finally:
            self._outbox.close(NotConnected(self._broker.address, "the session has ended"))

    async def part(self, within_s: float) -> None:
        """After `run()`, connect only to leave the farewell; where that takes too long, what stands there stays."""
        self._is_leaving = True
        with contextlib.suppress(TimeoutError, MeerkatError):
            async with asyncio.timeout(within_s):
                while True:
                    if not (pause_s := await self._connect_once()):
                        return
                    await asyncio.sleep(pause_s)

    async def _gives_up(self) -> bool:
        """Whether a refusal ends the session."""
        if self._broker.give_up != "first-start":
            return self._broker.give_up == "always"
        if self.connects or self._marker is None:
            return not self.connects
        try:
            return not await asyncio.to_thread(self._marker.is_there)
        except OSError as error:
            self._trouble.say("marker not read", file=str(self._marker.file), problem=str(error))
            return False

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> asyncio.Future[None]:
        """Put a message into the outbox; may be called before `run()` and while disconnected.

        A retained message takes the place of one that still waits on the same topic.

        Returns:
            A future, done when the broker acknowledged the message (QoS 0: when it was written) or a newer retained
            message took its place. It raises NotConnected where the session ended first; nobody has to await it.

        Raises:
            PayloadTooLarge: the packet would be larger than `max_packet_bytes`.
            NotConnected: the outbox is full, and the message is not retained.
        """
        size = packet_bytes(topic, payload, qos)
        if size > self._broker.max_packet_bytes:
            problem = f"a packet of {size} bytes is over the limit of {self._broker.max_packet_bytes}"
            raise PayloadTooLarge(topic, problem, "raise broker.max_packet_bytes, where the broker takes it")
        if not topic or any(sign in topic for sign in "+#\0"):
            raise ValueError(f"cannot publish to topic {topic!r}")
        out = Outgoing(topic, payload, qos, retain, asyncio.get_running_loop().create_future())
        self._outbox.put(out)
        return out.done

    def subscribe(self, topic: str, qos: int = 1) -> None:
        """Add a filter, from now on and on every later connection."""
        self._filters[topic] = qos
        self._filters_changed.set()

    def unsubscribe(self, topic: str) -> None:
        """Remove a filter."""
        self._filters.pop(topic, None)
        self._filters_changed.set()

    async def drain(self, deadline_s: float) -> None:
        """Wait until all that was published is acknowledged.

        Raises:
            NotConnected: something still waits after `deadline_s`.
        """
        try:
            await asyncio.wait_for(self._outbox.drained(), deadline_s)
        except TimeoutError:
            problem = f"{len(self._outbox)} messages were not acknowledged within {deadline_s:g} s"
            raise NotConnected(self._broker.address, problem) from None

    def disown(self) -> None:
        """Another process owns our topics now: drop what waits, publish no more, leave without will and farewell."""
        self._disowned = True
        self._outbox.close(NotConnected(self._broker.address, "another process owns the topics of this session"))

    def renew(self) -> None:
        """Leave the present connection in order and make another at once, with the will as it is then."""
        if self._renewal is not None and not self._renewal.done():
            self._renewal.set_result(None)

    async def _connect_once(self) -> float:
        """Go through one connection, from CONNECT to its end; seconds to wait before the next."""
        link = secrets.randbits(32)
        will = self._will(link) if self._will else None
        connection = Connection(
            self._broker, self._client_id, will=will, on_message=self._take, timeouts=self._timeouts, name=self._name
        )
        self._outbox.narrow(self._trouble.sends_one_by_one)
        began, connects = asyncio.get_running_loop().time(), self.connects
        lost = await self._go_through(connection, link, will.topic if will else None)
        announced = self.connects > connects
        if lost is None:
            if announced:
                self._on_disconnected("renewed")
            return 0.0
        if isinstance(lost, Refused) and await self._gives_up():
            raise lost.error
        lived_s = asyncio.get_running_loop().time() - began if announced else None
        pause_s = self._trouble.ended(lost, lived_s, connection.flaws)
        if announced:
            self._on_disconnected(str(lost))
        return pause_s

    async def _go_through(self, connection: Connection, link: int, own: str | None) -> Lost | None:
        """Talk until the connection ends, and how it did; None where it was left in order."""
        talk = asyncio.create_task(self._talk(connection, link, own))
        orderly = False
        renewal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._renewal = renewal
        try:
            await _first(talk, connection.ended, renewal)
            orderly = not connection.ended.done() and (not talk.done() or talk.exception() is None)
            if not orderly:
                cause = connection.ended.result() if connection.ended.done() else talk.exception()
        except asyncio.CancelledError:
            orderly = True
            await self._flush(connection, talk)
            raise
        finally:
            sending = tuple(Sending(out.topic, out.packet_bytes, out.retain) for out in self._outbox.suspects)
            talk.cancel()
            try:
                await asyncio.gather(talk, return_exceptions=True)
            finally:  # whoever cancels again need not wait, and finds nothing left behind
                try:
                    await connection.end(orderly=orderly or self._disowned)
                finally:
                    self.link = None
                    self._outbox.rewind()
        if orderly:
            return None
        if not isinstance(cause, Lost):
            raise cause or AssertionError("a connection never ends by itself")
        cause.sending = sending
        return cause

    async def _talk(self, connection: Connection, link: int, own: str | None) -> None:
        """Everything that we say on a connection; raced as a whole against the connection's end."""
        await connection.open()
        filters: dict[str, int] = {}
        if own is not None:
            filters = {own: 1}
            await connection.subscribe(filters)  # first and apart: its retained message must not wait behind others
        filters = await self._match_filters(connection, filters, own)
        if own is not None:
            await connection.unsubscribe(f"{own}/fence")  # answered behind all that was retained; no ACL forbids it
        if self._is_leaving:
            if (last := self._last_words(link)) is not None:
                await connection.publish(last.topic, last.payload, 1, retain=True)
            return
        self.link = link
        self.connects += 1
        self._trouble.connected(link)
        if own is not None and (self._own is None or not self._own.is_known):
            self._own = OwnTopic(own)
        with self._outbox.ahead():
            self._on_connected(link)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_filters(connection, filters, own))
                works = (self._leave_marker(), self._look_at_own_topic(connection), self._widen())
                for work in (*works, self._watch_expiry(connection)):
                    tasks.create_task(work)
                while True:
                    tasks.create_task(self._send(connection, await self._outbox.take()))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _send(self, connection: Connection, out: Outgoing) -> None:
        self.sent[self._kind_of(out.topic)].add(out.topic, out.payload, out.qos)
        await connection.publish(out.topic, out.payload, out.qos, retain=out.retain)
        self._outbox.acknowledge(out)
        if self._own is not None:
            self._own.acknowledged(out)

    async def _leave_marker(self) -> None:
        """Remember over restarts that this client was connected; not being able to ends nobody."""
        if self._marker is None or self._is_marked:
            return
        try:
            await asyncio.to_thread(self._marker.leave)
            self._is_marked = True
        except OSError as error:
            self._trouble.say("marker not written", file=str(self._marker.file), problem=str(error))

    async def _look_at_own_topic(self, connection: Connection) -> None:
        if self._own is not None and not self._own.is_known:
            problem = await self._own.ask(connection, self._timeouts.echo_s)
            if problem is not None:
                self._trouble.say(problem, topic=self._own.topic, **bound(connection.flaws))

    async def _watch_expiry(self, connection: Connection) -> None:
        if self._broker.tls:
            folder = None if self._marker is None else self._marker.file.parent
            await watch_expiry(self._broker, connection.broker_until, folder, self._trouble.say)

    async def _widen(self) -> None:
        """A connection that lasts need not be watched message by message."""
        await asyncio.sleep(self._timeouts.stable_s)
        self._outbox.narrow(False)

    async def _follow_filters(self, connection: Connection, filters: dict[str, int], own: str | None) -> None:
        while True:
            await self._filters_changed.wait()
            filters = await self._match_filters(connection, filters, own)

    async def _match_filters(self, connection: Connection, have: dict[str, int], own: str | None) -> dict[str, int]:
        """Make the broker's subscriptions equal to ours; the will's topic stays."""
        self._filters_changed.clear()
        want = {**self._filters, own: 1} if own is not None else dict(self._filters)
        if new := {topic: qos for topic, qos in want.items() if have.get(topic) != qos}:
            await connection.subscribe(new)
        for topic in have.keys() - want.keys():
            await connection.unsubscribe(topic)
        return want

    async def _flush(self, connection: Connection, talk: asyncio.Task[None]) -> None:
        """Send what waits and the farewell, while `talk` goes on."""
        connection.mute()
        if self._disowned:
            return
        if self.link is None:
            self._is_leaving = True
            if self._farewell is not None:  # the broker may hold the will already: `talk` goes on to the farewell
                await _first(talk, connection.ended, within_s=self._timeouts.flush_s)
            return
        if (last := self._last_words(self.link)) is not None:
            with contextlib.suppress(BrokerError):  # too large a packet: the state will stand as it is
                self.publish(last.topic, last.payload, retain=True)
        drained = asyncio.create_task(self._outbox.drained())
        await _first(drained, talk, connection.ended, within_s=self._timeouts.flush_s)
        drained.cancel()

    def _last_words(self, link: int) -> Will | None:
        return None if self._farewell is None else self._farewell(link)

    def _take(self, message: Message) -> None:
        self.received[self._kind_of(message.topic)].add(message.topic, message.payload, message.qos)
        if not self._is_leaving and (self._own is None or not self._own.is_answer(message)):
            self._on_message(message)


async def _first(*futures: asyncio.Future[Any], within_s: float | None = None) -> None:
    """Wait until one of them is done."""
    await asyncio.wait(futures, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
