"""One connection to the broker, used once. The only module that knows aiomqtt and paho."""

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import aiomqtt

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import ConfigError
from meerkat_mq.mqtt.certificate import certificate_flaws, user_flaws
from meerkat_mq.mqtt.ends import Lost, Refused, Words
from meerkat_mq.mqtt.message import Message, Will
from meerkat_mq.mqtt.timeouts import Timeouts
from meerkat_mq.mqtt.tls import Context, client_context

_NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_DISCONNECT = b"\xe0\x00"
_REFUSED_SUBSCRIPTION = 0x80
_MESSAGES_A_WAKE_UP = 64


class _Client(aiomqtt.Client):
    """aiomqtt's client, and what its public surface lacks: a bounded connect, and an end without DISCONNECT."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connector_done = asyncio.Event()
        self.pending_calls_threshold = 2**16
        self.taken = 0
        self.heard_at = 0.0  # when bytes came from the broker, on the loop's clock

    @property
    def refused(self) -> bool:
        """The broker answered CONNECT with a refusal, which `__aenter__` raises."""
        answer = self._connected
        return answer.done() and not answer.cancelled() and answer.exception() is not None

    def drop(self) -> None:
        """Close the socket, and end what waits for the connection's end."""
        self._client._sock_close()
        if not self._disconnected.done():
            self._disconnected.set_result(None)
        elif not self._disconnected.cancelled():
            self._disconnected.exception()  # nobody else may ask, and asyncio would log it as never retrieved

    async def leave(self) -> None:
        """Send DISCONNECT, and read on until the broker closes.

        paho closes at once, which with anything unread resets the connection: the broker might never read the
        DISCONNECT, and publish the will.
        """
        sock = self._client.socket()
        if sock is None or self._client.want_write():
            await self.__aexit__(None, None, None)
        else:
            sock.send(_DISCONNECT)
            await asyncio.wait({self._disconnected}, timeout=self.timeout)

    def tell_end(self, tell: Callable[[str, bool], None]) -> None:
        """Hook into paho's end of a connection: aiomqtt is deaf to it before CONNACK.

        Args:
            tell: takes the reason, and whether the broker had answered CONNECT.
        """
        told = cast("Callable[..., None]", self._client.on_disconnect)

        def on_disconnect(*args: Any) -> None:
            told(*args)
            if not self.refused:
                reason = str(args[3])
                closed = "the broker closed the connection"
                tell(closed if reason == "Unspecified error" else reason, self._connected.done())

        self._client.on_disconnect = on_disconnect

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        """As aiomqtt does, but a wake-up reads all that a burst of answers brought."""

        def read() -> None:
            self.heard_at = self._loop.time()
            for number in itertools.count(1):
                taken = self.taken
                client.loop_read()
                if not _decrypted(client.socket()) and (self.taken == taken or number >= _MESSAGES_A_WAKE_UP):
                    break

        def attend() -> None:
            self._attend(sock, self._loop.add_reader, read)
            self._misc_task = self._loop.create_task(self._misc_loop())

        self._loop.call_soon_threadsafe(attend)

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        """As aiomqtt does, but see `_attend`."""
        self._loop.call_soon_threadsafe(self._attend, sock, self._loop.add_writer, client.loop_write)

    def _attend(self, sock: Any, add: Callable[[int, Callable[[], None]], object], work: Callable[[], object]) -> None:
        """Do this whenever the socket is ready; it may have been closed before the loop came to it."""

        def attempt() -> None:
            try:
                work()
            except Exception as error:  # a broken connection, whatever it says
                if not self._disconnected.done():
                    self._disconnected.set_exception(error)

        if sock.fileno() >= 0:
            add(sock.fileno(), attempt)

    def _client_connect(self) -> None:  # runs in a thread that nothing can interrupt
        self._client.connect_timeout = self.timeout
        try:
            super()._client_connect()
        finally:
            self._loop.call_soon_threadsafe(self.connector_done.set)


def _decrypted(sock: Any) -> bool:
    """Whether bytes are there that no wake-up would come for: TLS has taken them off the socket."""
    return hasattr(sock, "pending") and sock.pending() > 0


class _Handover(asyncio.Queue[aiomqtt.Message]):
    """aiomqtt's inbox, without the inbox: messages go on as they come."""

    def __init__(self, take: Callable[[aiomqtt.Message], None], maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self._take = take

    def put_nowait(self, item: aiomqtt.Message) -> None:
        self._take(item)


class _LastWords(logging.Handler):
    """Keeps paho's last complaint, which its exceptions lack."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class Connection:
    """A fresh client object, from CONNECT to the end.

    Every method may hang when the connection dies: race it against `ended`.

    Args:
        name: the user that rights are given to; see `certificate_flaws`.

    Attributes:
        ended: resolved with the cause as soon as the connection has ended: Lost, or what `on_message` raised.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        *,
        will: Will | None,
        on_message: Callable[[Message], None],
        timeouts: Timeouts,
        name: str | None = None,
    ) -> None:
        self.ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._broker = broker
        self._client_id = client_id
        self._name = name
        self._words = Words(broker, client_id)
        self._will = will
        self._on_message: Callable[[Message], None] | None = on_message
        self._timeouts = timeouts
        self._client: _Client | None = None
        self._context: Context | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._owed: dict[int, tuple[str, float]] = {}  # answers, and since when; the oldest first
        self._numbers = itertools.count()
        self._check: asyncio.TimerHandle | None = None
        self._last_words = _LastWords()

    async def open(self) -> None:
        """Connect, with certificate, key and CA as their files are now.

        Raises:
            Lost: no connection, or no answer.
            Refused: the broker refuses user, password, certificate or client id; its certificate does not verify; a
                file cannot be used.
        """
        await asyncio.to_thread(self._read_files)
        client = self._client = self._make_client()
        entering = asyncio.create_task(client.__aenter__())
        try:
            await asyncio.shield(entering)
        except aiomqtt.MqttCodeError as error:
            raise self._words.refusal(_number(error.rc), str(error)) from None
        except (aiomqtt.MqttError, ValueError) as error:
            raise self._words.failure(str(error)) from None
        finally:
            if not entering.done():
                await client.connector_done.wait()
                entering.cancel()
                await asyncio.gather(entering, return_exceptions=True)
        self._watcher = asyncio.create_task(self._watch(client))

    def _read_files(self) -> None:
        self._words.flaws = certificate_flaws(self._broker, self._name)
        try:
            self._context = client_context(self._broker) if self._broker.tls else None
        except ConfigError as error:
            raise Refused(error) from None

    @property
    def flaws(self) -> tuple[str, ...]:
        """What is wrong with our own certificate or user name, as far as we can see; known when `open` has begun."""
        return (*user_flaws(self._broker, self._name), *self._words.flaws)

    async def subscribe(self, filters: Mapping[str, int]) -> None:
        """Subscribe and wait for the answer.

        Raises:
            Lost: not sent.
            Refused: by the broker.
        """
        with self._owing("answer to SUBSCRIBE"):
            codes = await self._ready().subscribe(list(filters.items()))
        _heed_cancellation()
        for topic, code in zip(filters, codes, strict=True):
            if _number(code) >= _REFUSED_SUBSCRIPTION:
                raise self._words.subscription(topic)

    async def unsubscribe(self, topic: str) -> None:
        """Unsubscribe and wait for the answer, which the broker sends after all that it sent before.

        Raises:
            Lost: not sent.
        """
        with self._owing("answer to UNSUBSCRIBE"):
            await self._ready().unsubscribe(topic)
        _heed_cancellation()

    async def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Publish and wait until the broker acknowledged it (QoS 0: until it is written).

        Raises:
            Lost: not sent.
        """
        with self._owing(f"acknowledgement for {topic}"):
            await self._ready().publish(topic, payload, qos, retain)

    @contextlib.contextmanager
    def _owing(self, answer: str) -> Iterator[None]:
        """The broker owes an answer; where it does not come in time, that is the connection's end."""
        number = next(self._numbers)
        self._owed[number] = answer, self._now()
        if self._check is None:
            self._check_after(self._timeouts.answer_s)
        try:
            yield
        except aiomqtt.MqttError as error:
            raise Lost(f"no {answer} ({error})") from None
        finally:
            del self._owed[number]

    def _check_after(self, seconds: float) -> None:
        self._check = asyncio.get_running_loop().call_later(seconds, self._check_the_oldest)

    def _check_the_oldest(self) -> None:
        self._check = None
        if not self._owed or self._client is None:
            return
        answer, since = next(iter(self._owed.values()))
        quiet_since, longest_s = max(since, self._client.heard_at), self._timeouts.longest_answer_s
        left_s = min(quiet_since + self._timeouts.answer_s, since + longest_s) - self._now()
        if left_s <= 0:
            self._end(Lost(f"no {answer} within {self._now() - since:.0f} s"))
        else:
            self._check_after(left_s)

    def mute(self) -> None:
        """Hand over no more messages."""
        self._on_message = None

    async def end(self, *, orderly: bool) -> None:
        """End at once. Orderly: with DISCONNECT, so the broker forgets the will; otherwise it publishes it."""
        self.mute()
        if self._check is not None:
            self._check.cancel()
        try:
            if orderly and self._watcher is not None and self._client is not None:
                self._client.timeout = self._timeouts.flush_s
                with contextlib.suppress(aiomqtt.MqttError, OSError):  # a dead link
                    await self._client.leave()
        finally:  # also when cancelled
            if self._client is not None:
                self._client.drop()
            if self._context is not None:
                self._context.drop_socket()
        if self._watcher is not None:
            await asyncio.wait({self._watcher})

    def _make_client(self) -> _Client:
        will = self._will and aiomqtt.Will(self._will.topic, self._will.payload, qos=1, retain=True)
        logger = logging.Logger("paho", logging.WARNING)
        logger.addHandler(self._last_words)
        client = _Client(
            self._broker.host,
            self._broker.port,
            username=self._broker.username,
            password=self._broker.password,
            identifier=self._client_id,
            protocol=aiomqtt.ProtocolVersion.V311,
            clean_session=True,
            keepalive=self._broker.keep_alive_s,
            timeout=self._timeouts.connect_s,
            will=will,
            tls_context=self._context,
            logger=logger,
            queue_type=cast("type[asyncio.Queue[aiomqtt.Message]]", functools.partial(_Handover, self._take)),
            max_inflight_messages=2**16 - 1,
            socket_options=[_NODELAY],
        )
        client.tell_end(self._closed)
        return client

    def _closed(self, reason: str, answered: bool) -> None:
        lost = self._words.failure(self._last_words.text or reason)
        lost.closed, lost.unanswered = True, not answered
        self._end(lost)

    def _take(self, raw: aiomqtt.Message) -> None:
        """Runs inside paho's read: must not raise, nor call into paho."""
        if self._client is not None:
            self._client.taken += 1
        if self._on_message is None:
            return
        try:
            self._on_message(Message(raw.topic.value, bytes(raw.payload), bool(raw.retain), raw.qos))
        except Exception as error:
            self.mute()
            self._end(error)

    async def _watch(self, client: _Client) -> None:
        """The one reader; it gets no message, for they went past it, only the end."""
        try:
            await anext(client.messages)
        except aiomqtt.MqttError as error:
            self._end(Lost(str(error.__cause__ or error)))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _end(self, cause: Exception) -> None:
        if not self.ended.done():
            self.ended.set_result(cause)

    def _ready(self) -> _Client:
        if self._client is None:
            raise Lost("not open")
        self._client.timeout = math.inf  # see `_owing`
        return self._client


def _heed_cancellation() -> None:
    """Until Python 3.12, asyncio.wait_for swallows a cancellation that comes together with what it waits for."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _number(code: object) -> int:
    """paho gives reason codes now as numbers, now as objects."""
    return code if isinstance(code, int) else int(getattr(code, "value", 0))
