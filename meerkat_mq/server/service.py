"""The server: carries the machine's effects out on MQTT, the ledger and theta."""

import asyncio
import secrets
import socket
import threading
from typing import TYPE_CHECKING

import structlog

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import Entry, digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import AnotherServer, ConfigError, NotConnected, RunMismatch, TooFewNodes, WireError
from meerkat_mq.mqtt import Count, Message, Session, Will
from meerkat_mq.observe.events import Observer, RunStarted
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.alarm import Alarm
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.server.ledger import Ledger, MemoryLedger
from meerkat_mq.server.run import Run, prepare_run
from meerkat_mq.server.scribe import Scribe
from meerkat_mq.server.watch import Watch
from meerkat_mq.wire.descriptor import NodeStatus, ServerState, decode_control
from meerkat_mq.wire.difference import Difference
from meerkat_mq.wire.frames import MAX_FRAME_BYTES, decode, encode, encode_entry
from meerkat_mq.wire.messages import Chunk, Entries, Header, Refusal, Update, Want, Welcome
from meerkat_mq.wire.topics import Topics

if TYPE_CHECKING:
    from meerkat_mq.server.evaluation import Evaluator

DIFFERENCE_FILE = "difference.mkd"
REPLY_BYTES = MAX_FRAME_BYTES // 2
OUTBOX_BYTES = 64 * 2**20
LAST_TERM = 2**32 - 1


async def serve(config: ServerConfig, *, replace: bool = False, observer: Observer = lambda event: None) -> None:
    """Run one server until cancelled; with `config.once`, until its run is finished.

    Whenever it ends, the model as it stands is in `state_dir/difference.mkd`.

    Args:
        config: federation.toml.
        replace: take over from a server that is online.
        observer: is told of every round and evaluation, on the event loop.

    Raises:
        MeerkatError: with what to do about it.
    """
    try:
        config.state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(config, error) from error
    run = await asyncio.to_thread(prepare_run, config)
    evaluator = await asyncio.to_thread(_load_evaluator, config, run)
    every = config.evaluation.every if config.evaluation else 1
    watch = Watch(observer, evaluator, every, run.descriptor)
    await _Server(config, run, MemoryLedger(), watch, observer, replace=replace).run()


def _unusable(config: ServerConfig, error: OSError) -> ConfigError:
    return ConfigError(
        f"state_dir {config.state_dir}", f"cannot be used ({error.strerror})", "name a folder that can be written"
    )


def _load_evaluator(config: ServerConfig, run: Run) -> "Evaluator | None":
    if config.evaluation is None or run.descriptor.task is None:
        return None
    from meerkat_mq.server.evaluation import Evaluator  # noqa: PLC0415 - without a model, no server imports torch

    return Evaluator(config, run.mask, run.descriptor.task)


class _Server:
    def __init__(
        self, config: ServerConfig, run: Run, ledger: Ledger, watch: Watch, observer: Observer, *, replace: bool
    ) -> None:
        self._config = config
        self._run = run
        self._ledger = ledger
        self._watch = watch
        self._observe = observer
        self._replace = replace
        self._log = structlog.get_logger().bind(federation=config.federation, run=run.descriptor.run[:8])
        self._topics = Topics(config.federation)
        self._server_id = secrets.token_hex(8)
        self._machine: ServerMachine | None = None
        self._rival: ServerState | None = None
        self._term = 0
        self._chunks = run.chunks(self._term)
        self._saving = threading.Lock()
        self._saved = 0
        self._finished = asyncio.Event()
        self._enough_nodes = asyncio.Event()
        descriptor = run.descriptor
        self._replica = Replica(
            run.mask, run_id=descriptor.run_id, stream=descriptor.stream, digest_every=descriptor.digest_every
        )
        self._committed: tuple[int, Float32Array] = (0, self._replica.theta)
        self._scribe = Scribe(ledger, self._replica, self._handle)
        self._alarm = Alarm(
            lambda: self._machine.wake_at if self._machine else None, lambda: self._handle(e.Tick(self._now()))
        )
        self._session = Session(
            config.broker,
            # One a process: a second server must be able to look before it would kick the first one out.
            f"meerkat-{config.federation}-server-{self._server_id}",
            subscriptions=[(self._topics.up("+", "status"), 1), (self._topics.up("+", "update"), 1),
                           (self._topics.up("+", "want"), 1)],
            on_message=self._on_message,
            on_connected=self._on_connected,
            will=lambda link: Will(self._topics.server, self._state("lost", link).encode()),
            farewell=lambda link: Will(self._topics.server, self._state(self._parting_word(), link).encode()),
            kind_of=self._kind_of,
            outbox_bytes=OUTBOX_BYTES + 2 * len(run.blob),
        )  # fmt: skip

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                work = [
                    tasks.create_task(coroutine)
                    for coroutine in (self._session.run(), self._alarm.run(), self._scribe.run(), self._watch.run())
                ]
                if self._config.once:
                    await self._wait_for_nodes()
                await self._finished.wait()
                await self._watch.finish(self._committed[1], self._updates())
                await asyncio.to_thread(self._save)
                self._log.info("model saved", file=str(self._config.state_dir / DIFFERENCE_FILE))
                if not self._config.once:
                    await asyncio.Event().wait()
                for task in work:
                    task.cancel()
        finally:
            self._save()

    async def _wait_for_nodes(self) -> None:
        wait_s = self._config.wait_for_nodes_s
        try:
            async with asyncio.timeout(wait_s):
                await self._enough_nodes.wait()
        except TimeoutError:
            online = self._machine.online if self._machine else 0
            raise TooFewNodes(
                f"federation {self._config.federation}",
                f"{online} of {self._config.rounds.min_nodes} nodes came within {wait_s:g} s",
                "start more nodes, or lower rounds.min_nodes",
            ) from None

    def _save(self) -> None:
        """Leave the model as the ledger says, unless no round closed since it was last left."""
        with self._saving:
            version, theta = self._committed
            if version == self._saved:
                return
            difference = Difference(self._run.mask, theta, self._run.descriptor.run_id, version)
            try:
                difference.save(self._config.state_dir / DIFFERENCE_FILE)
            except OSError as error:
                raise _unusable(self._config, error) from error
            self._saved = version

    # --- connection and state ---

    def _on_connected(self, link: int) -> None:
        if self._machine is None:
            self._machine = self._take_charge()
        self._publish_state()
        self._publish_run()
        for chunk in self._chunks:
            self._session.publish(self._topics.blob(chunk.blob, chunk.index), encode(chunk), retain=True)
        self._perform(self._machine.start(self._now()))
        for node, status in list(self._watch.statuses.items()):
            self._handle(e.StatusCame(self._now(), node, status))

    def _take_charge(self) -> ServerMachine:
        rival = self._rival
        if rival is not None and rival.status == "online" and not self._replace:
            self._session.disown()
            raise AnotherServer(
                self._topics.server,
                f"a server on host {rival.host} says that it is online (term {rival.term}, run {rival.run[:8]})",
                "stop it, or start this one with --replace",
            )
        term = 1 + max(self._ledger.term, rival.term if rival else 0)
        if term > LAST_TERM:
            self._session.disown()
            raise RunMismatch(
                self._topics.server, "the last possible term stands there", "clear this retained message on the broker"
            )
        self._term = term
        self._chunks = self._run.chunks(term)
        self._log.info("in charge", term=self._term, weights=self._run.mask.size, rounds=self._config.rounds.count)
        self._observe(RunStarted(self._run.descriptor, self._term))
        self._watch.stood(0, self._replica.theta)
        return ServerMachine(
            self._run.settings, term=self._term, server_id=self._server_id, base=digest(self._replica.theta)
        )

    def _parting_word(self) -> str:
        return "finished" if self._machine is not None and self._machine.finished else "stopped"

    def _state(self, status: str, link: int) -> ServerState:
        machine = self._machine
        return ServerState.model_validate(
            {
                "status": status,
                "run": self._run.descriptor.run,
                "term": self._term,
                "server_id": self._server_id,
                "link": link,
                "host": socket.gethostname(),
                "round": machine.version if machine else 0,
                "nodes": machine.online if machine else 0,
            }
        )

    def _publish_state(self) -> None:
        if self._session.link is not None and self._machine is not None:
            status = "finished" if self._machine.finished else "online"
            self._session.publish(self._topics.server, self._state(status, self._session.link).encode(), retain=True)

    def _publish_run(self) -> None:
        if self._session.link is not None and self._machine is not None:
            self._session.publish(self._topics.run, self._run.descriptor.encode(), retain=True)

    # --- messages ---

    def _on_message(self, message: Message) -> None:
        try:
            if message.topic == self._topics.server:
                self._on_server_state(message.payload)
            elif message.payload and (parsed := self._topics.parse_up(message.topic)) is not None:
                self._on_node_message(*parsed, message.payload)
        except WireError as error:
            self._watch.counts[f"undecodable: {type(error).__name__}"] += 1
            self._log.warning("message dropped", topic=message.topic, problem=str(error))

    def _on_server_state(self, payload: bytes) -> None:
        try:
            state = decode_control(payload, ServerState)
        except WireError:
            self._publish_state()
            raise
        if self._machine is None:
            self._rival = state
        elif state.server_id != self._server_id:
            self._handle(e.ServerSeen(self._now(), state))
            self._publish_run()
        elif state.status == "lost":
            self._handle(e.ServerSeen(self._now(), state))

    def _on_node_message(self, node: str, kind: str, payload: bytes) -> None:
        if kind == "status":
            status = decode_control(payload, NodeStatus)
            self._watch.heard_from(node, status)
            self._handle(e.StatusCame(self._now(), node, status))
            if status.status in ("starting", "online") and status.run != self._run.descriptor.run:
                self._publish_run()
            return
        match decode(payload):
            case Update() as update if kind == "update":
                self._handle(e.UpdateCame(self._now(), node, update))
            case Want() as want if kind == "want" and want.header.run != self._header().run:
                self._watch.counts["of another run"] += 1
                self._publish_run()
            case Want() as want if kind == "want":
                self._handle(e.WantCame(self._now(), node, want))
            case frame:
                self._watch.counts[f"misplaced: {type(frame).__name__}"] += 1

    def _kind_of(self, topic: str) -> str:
        parsed = self._topics.parse_up(topic)
        if parsed is None:
            return topic.removeprefix(f"{self._topics.root}/").split("/", 1)[0]
        return f"{parsed[1]}/{parsed[0]}" if parsed[0] in self._watch.statuses else parsed[1]

    def _updates(self) -> dict[str, Count]:
        return {
            kind.removeprefix("update/"): count
            for kind, count in self._session.received.items()
            if kind.startswith("update/")
        }

    # --- events and effects ---

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _handle(self, event: e.ServerEvent) -> None:
        if self._machine is not None:
            self._perform(self._machine.handle(event))
        if isinstance(event, e.EntryCommitted) and self._machine is not None:
            self._committed = (event.version + 1, self._replica.theta)
            bytes_up = sum(count.payload_bytes for count in self._updates().values())
            self._watch.closed(event, self._machine.online, bytes_up)
            self._watch.stood(event.version + 1, self._replica.theta)

    def _perform(self, effects: list[e.ServerEffect]) -> None:
        for effect in effects:
            self._carry_out(effect)
        if self._machine is not None and self._machine.online >= self._config.rounds.min_nodes:
            self._enough_nodes.set()
        self._alarm.changed()

    def _carry_out(self, effect: e.ServerEffect) -> None:
        match effect:
            case e.CommitSlot() | e.CommitUpdate() | e.ApplyTerms() | e.CommitEntry():
                self._scribe.put(effect)
            case e.PublishRound(frame):
                if frame.is_open:
                    self._watch.opened()
                elif self._machine is not None and not self._machine.finished:
                    self._log.info(
                        "waiting for nodes", online=self._machine.online, min_nodes=self._config.rounds.min_nodes
                    )
                self._session.publish(self._topics.round, encode(frame), retain=True)
            case e.PublishState(finished):
                self._publish_state()
                if finished:
                    self._finished.set()
            case e.Reply(node, reply):
                self._reply(node, reply)
            case e.SendEntries(node, first):
                self._send_entries(node, first)
            case e.SendChunks(node, want):
                self._send_chunks(node, want)
            case e.Count(reason, node):
                self._watch.counts[reason] += 1
                self._log.info(reason, node=node or None, round=self._machine.version if self._machine else None)
            case e.End(error):
                self._session.disown()
                raise error

    def _send_entries(self, node: str, first: int) -> None:
        room, chosen = REPLY_BYTES, list[Entry]()
        for entry in self._ledger.entries(first, 2000):
            room -= len(encode_entry(entry))
            if room < 0 and chosen:
                break
            chosen.append(entry)
        if chosen:
            self._reply(node, Entries(self._header(), tuple(chosen)))

    def _send_chunks(self, node: str, want: Want) -> None:
        if want.blob == self._run.mask.hash:
            for index in sorted(set(want.chunks) & set(range(len(self._chunks)))):
                self._reply(node, self._chunks[index])

    def _reply(self, node: str, frame: Welcome | Refusal | Entries | Chunk) -> None:
        """Answer a node; where too much waits for the broker already, it has to ask again."""
        try:
            self._session.publish(self._topics.reply(node), encode(frame))
        except NotConnected:
            self._watch.counts["reply dropped: the outbox is full"] += 1

    def _header(self) -> Header:
        version = self._machine.version if self._machine else 0
        return Header.of(self._run.descriptor.run_id, self._term, version, self._run.mask.hash)
