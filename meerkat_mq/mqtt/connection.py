"""One connection to the broker, used once. The only module that knows paho.

paho runs on the event loop: it tells when its socket is open and when it has something to write, and it reads and
writes when the socket is ready. Only the way to the socket is made in a thread: name, TCP and TLS block.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import ConfigError
from meerkat_mq.mqtt.ends import Lost, Refused, Words
from meerkat_mq.mqtt.message import Message, Will
from meerkat_mq.mqtt.timeouts import Timeouts
from meerkat_mq.mqtt.tls import Context, certificate_flaws, client_context, user_flaws

_NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_DISCONNECT = b"\xe0\x00"
_MESSAGES_A_WAKE_UP = 64
_KEEP_ALIVE_CHECK_S = 1.0


class _LastWords(logging.Handler):
    """Keeps paho's last complaint, which it tells nobody else."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class _Owed(NamedTuple):
    """An answer that the broker owes, and since when."""

    name: str
    since: float
    codes: asyncio.Future[list[ReasonCode]]


class Connection:
    """A fresh client object, from CONNECT to the end.

    Every method may hang when the connection dies: race it against `ended`, which is resolved with the cause as soon as
    it has ended: Lost, or what `on_message` raised. What cannot be sent raises Lost too.

    Args:
        name: the user that rights are given to; see `certificate_flaws`.
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
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Exception] = self._loop.create_future()
        self._broker = broker
        self._client_id = client_id
        self._name = name
        self._words = Words(broker, client_id)
        self._will = will
        self._on_message: Callable[[Message], None] | None = on_message
        self._timeouts = timeouts
        self._client: paho.Client | None = None
        self._context: Context | None = None
        self._connack: asyncio.Future[ReasonCode] = self._loop.create_future()
        self._closed = asyncio.Event()
        self._owed: dict[int | None, _Owed] = {}  # by packet id, the oldest first
        self._check: asyncio.TimerHandle | None = None
        self._keep_alive: asyncio.TimerHandle | None = None
        self._taken = 0
        self._heard_at = 0.0  # when bytes came from the broker, on the loop's clock
        self._last_words = _LastWords()

    async def open(self) -> None:
        """Connect, with certificate, key and CA as their files are now.

        Raises:
            Lost: no connection, or no answer.
            Refused: the broker refuses user, password, certificate or client id; its certificate does not verify; a
                file cannot be used.
        """
        await asyncio.to_thread(self._read_files)
        client, broker = self._make_client(), self._broker
        self._client = client
        connecting = self._loop.run_in_executor(None, client.connect, broker.host, broker.port, broker.keep_alive_s)
        try:
            await asyncio.shield(connecting)
        except (OSError, ValueError) as error:
            raise self._words.failure(str(error)) from None
        finally:  # nothing can interrupt that thread
            await asyncio.gather(connecting, return_exceptions=True)
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                answer = await asyncio.shield(self._connack)
        except TimeoutError:
            raise Lost("no answer to CONNECT") from None
        if answer.is_failure:
            raise self._words.refusal(answer.value, str(answer))

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

    @property
    def broker_until(self) -> datetime | None:
        """The end of the validity of the broker's certificate; None without TLS, and once the socket is closed."""
        sock = self._context.last_socket if self._context is not None else None
        try:
            certificate = sock.getpeercert() if sock is not None else None
        except (OSError, ValueError, AttributeError):  # closed; what it raises then depends on how far that has come
            return None
        if not certificate:
            return None
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)

    async def subscribe(self, filters: Mapping[str, int]) -> None:
        """Subscribe and wait for the answer; Refused where it is a refusal."""
        codes = await self._answer("answer to SUBSCRIBE", lambda client: client.subscribe(list(filters.items())))
        for topic, code in zip(filters, codes, strict=True):
            if code.is_failure:
                raise self._words.subscription(topic)

    async def unsubscribe(self, topic: str) -> None:
        """Unsubscribe and wait for the answer, which the broker sends after all that it sent before."""
        await self._answer("answer to UNSUBSCRIBE", lambda client: client.unsubscribe(topic))

    async def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Publish and wait until the broker acknowledged it (QoS 0: until it is written)."""

        def send(client: paho.Client) -> tuple[int, int]:
            info = client.publish(topic, payload, qos, retain)
            return info.rc, info.mid

        await self._answer(f"acknowledgement for {topic}", send)

    async def _answer(self, name: str, send: Callable[[paho.Client], tuple[int, int | None]]) -> list[ReasonCode]:
        """Send a packet, and wait for its answer: where that does not come in time, the connection ends."""
        if self._client is None:
            raise Lost("not open")
        code, number = send(self._client)
        if code != paho.MQTT_ERR_SUCCESS:
            raise Lost(f"no {name} ({paho.error_string(code)})")
        owed = self._owed[number] = _Owed(name, self._loop.time(), self._loop.create_future())
        if self._check is None:
            self._check_after(self._timeouts.answer_s)
        try:
            return await owed.codes
        finally:
            del self._owed[number]

    def _answered(self, number: int, codes: list[ReasonCode] | None = None) -> None:
        owed = self._owed.get(number)
        if owed is not None and not owed.codes.done():
            owed.codes.set_result(codes or [])

    def _check_after(self, seconds: float) -> None:
        self._check = self._loop.call_later(seconds, self._check_the_oldest)

    def _check_the_oldest(self) -> None:
        self._check = None
        if not self._owed:
            return
        answer, since, _ = next(iter(self._owed.values()))
        quiet_since, longest_s = max(since, self._heard_at), self._timeouts.longest_answer_s
        left_s = min(quiet_since + self._timeouts.answer_s, since + longest_s) - self._loop.time()
        if left_s <= 0:
            self._end(Lost(f"no {answer} within {self._loop.time() - since:.0f} s"))
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
            if orderly and self._connack.done():
                with contextlib.suppress(OSError):  # a dead link
                    async with asyncio.timeout(self._timeouts.flush_s):
                        await self._leave()
        finally:  # also when cancelled
            if self._client is not None:
                self._client._sock_close()
            if self._context is not None:
                self._context.drop_socket()

    async def _leave(self) -> None:
        """Send DISCONNECT, and read on until the broker closes.

        paho closes at once, which with anything unread resets the connection: the broker might never read the
        DISCONNECT, and publish the will.
        """
        assert self._client is not None
        sock = self._client.socket()
        if sock is None:
            return
        if self._client.want_write():
            self._client.disconnect()
        else:
            sock.send(_DISCONNECT)
        await self._closed.wait()

    def _make_client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            self._client_id,
            clean_session=True,
            protocol=paho.MQTTv311,
            reconnect_on_failure=False,
        )
        client.connect_timeout = self._timeouts.connect_s
        client.max_inflight_messages_set(2**16 - 1)
        logger = logging.Logger("paho", logging.WARNING)
        logger.addHandler(self._last_words)
        client.enable_logger(logger)
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._broker.password)
        if self._context is not None:
            client.tls_set_context(self._context)
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=1, retain=True)
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_socket_register_write
        client.on_socket_unregister_write = self._on_socket_unregister_write
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = lambda client, data, number, codes, properties: self._answered(number, codes)
        client.on_unsubscribe = lambda client, data, number, codes, properties: self._answered(number)
        client.on_publish = lambda client, data, number, code, properties: self._answered(number)
        client.on_message = lambda client, data, message: self._take(message)
        return client

    # --- what paho tells ---

    def _on_socket_open(self, client: paho.Client, data: Any, sock: Any) -> None:
        """From the thread that connects."""

        def attend() -> None:
            self._attend(sock, self._loop.add_reader, lambda: self._read(client))
            self._check_keep_alive(client)

        sock.setsockopt(*_NODELAY)
        self._loop.call_soon_threadsafe(attend)

    def _on_socket_register_write(self, client: paho.Client, data: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._attend, sock, self._loop.add_writer, client.loop_write)

    def _on_socket_unregister_write(self, client: paho.Client, data: Any, sock: Any) -> None:
        self._loop.remove_writer(sock)

    def _on_socket_close(self, client: paho.Client, data: Any, sock: Any) -> None:
        self._loop.remove_reader(sock)
        if self._keep_alive is not None:
            self._keep_alive.cancel()

    def _attend(self, sock: Any, add: Callable[[int, Callable[[], None]], object], work: Callable[[], object]) -> None:
        """Do this whenever the socket is ready; it may have been closed before the loop came to it."""

        def attempt() -> None:
            try:
                work()
            except Exception as error:  # a broken connection, whatever it says
                self._closed.set()
                self._end(Lost(str(error)))

        if sock.fileno() >= 0:
            add(sock.fileno(), attempt)

    def _read(self, client: paho.Client) -> None:
        """All that a burst of answers brought, at one wake-up; no other comes for what TLS has decrypted already."""
        self._heard_at = self._loop.time()
        for number in itertools.count(1):
            taken = self._taken
            client.loop_read()
            if not _decrypted(client.socket()) and (self._taken == taken or number >= _MESSAGES_A_WAKE_UP):
                break

    def _check_keep_alive(self, client: paho.Client) -> None:
        if client.loop_misc() == paho.MQTT_ERR_SUCCESS:
            self._keep_alive = self._loop.call_later(_KEEP_ALIVE_CHECK_S, self._check_keep_alive, client)

    def _on_connect(self, client: paho.Client, data: Any, flags: Any, answer: ReasonCode, properties: Any) -> None:
        if not self._connack.done():
            self._connack.set_result(answer)

    def _on_disconnect(self, client: paho.Client, data: Any, flags: Any, code: ReasonCode, properties: Any) -> None:
        self._closed.set()
        if self._connack.done() and self._connack.result().is_failure:
            return  # which `open` says
        reason = str(code)
        reason = "the broker closed the connection" if reason == "Unspecified error" else reason
        lost = self._words.failure(self._last_words.text or reason)
        lost.closed, lost.unanswered = True, not self._connack.done()
        self._end(lost)

    def _take(self, raw: paho.MQTTMessage) -> None:
        """Runs inside paho's read: must not call into paho. A topic that is no text ends the connection."""
        topic = raw.topic
        self._taken += 1
        if self._on_message is None:
            return
        try:
            self._on_message(Message(topic, bytes(raw.payload), raw.retain, raw.qos))
        except Exception as error:
            self.mute()
            self._end(error)

    def _end(self, cause: Exception) -> None:
        if not self.ended.done():
            self.ended.set_result(cause)


def _decrypted(sock: Any) -> bool:
    """Whether bytes are there that no wake-up would come for: TLS has taken them off the socket."""
    return hasattr(sock, "pending") and sock.pending() > 0


async def takes_without_will(broker: BrokerConfig, client_id: str, timeouts: Timeouts) -> bool:
    """Whether the broker takes this client when it leaves no will behind; the connection is ended again."""
    connection = Connection(broker, client_id, will=None, on_message=lambda message: None, timeouts=timeouts)
    opening = asyncio.create_task(connection.open())
    try:
        ends: set[asyncio.Future[Any]] = {opening, connection.ended}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return opening.done() and opening.exception() is None
    finally:
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await connection.end(orderly=True)
