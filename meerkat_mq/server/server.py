"""The server: carries the machine's effects out on MQTT; the scribe carries out those on the ledger and theta."""

import asyncio
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import structlog

from meerkat_mq.config import ServerConfig
from meerkat_mq.core import metrics as m
from meerkat_mq.core.path import short_hash
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import AnotherServer, MeerkatError, NotConnected, PayloadTooLarge, TooFewNodes, WireError
from meerkat_mq.ledger.run import Run, early_stopping_in_words, mode_in_words, trust_in_words
from meerkat_mq.mqtt import Count, Marker, Message, Session, Will
from meerkat_mq.mqtt.alarm import Alarm
from meerkat_mq.observe.events import Observer, RunStarted
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.pulse import Pulse
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.server.fetches import Fetches
from meerkat_mq.server.measure import Measurer
from meerkat_mq.server.model_file import ModelFile
from meerkat_mq.server.monitor import Monitor
from meerkat_mq.server.scribe import KeepMetrics, KeepSightings, Scribe
from meerkat_mq.server.succession import Succession
from meerkat_mq.wire.arrays import chunks_of, split
from meerkat_mq.wire.descriptor import ControlMessage, NodeStatus, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Refusal, Round, Update, Want, Welcome
from meerkat_mq.wire.topics import SERVER_NAME, Topics

OUTBOX_BYTES = 64 * 2**20
SIGHTINGS_EVERY_S = 1.0

Answer = Welcome | Refusal | Entries | Offer | Chunk | Want


class Server:
    """One server process: its session, the machine, and the scribe that writes for it."""

    def __init__(
        self, config: ServerConfig, run: Run, scribe: Scribe, monitor: Monitor, observer: Observer, *, replace: bool,
        alone: bool = True,
    ) -> None:  # fmt: skip
        self._config = config
        self._run = run
        self._scribe = scribe
        self._server_id = scribe.server_id
        self._measurer = Measurer(run)
        self._fetches = Fetches(run.mask.size, self, scribe.put, run.settings.reach)
        self._model = ModelFile(config.state_dir, run, scribe)
        self._monitor = monitor
        self._observe = observer
        self._log = structlog.get_logger().bind(federation=config.federation, run=run.descriptor.run[:8])
        self._seldom = Seldom()
        self._topics = Topics(config.federation)
        self._machine: ServerMachine | None = None
        self._taking_term = False
        self._term = self._saved = 0
        self._pulse = Pulse(rounds=3, slow_s=30.0)
        self._chunks = run.chunks(self._term)
        self._is_open = self._greeted = False
        self._awaited: int | None = None
        self._finished, self._enough_nodes = asyncio.Event(), asyncio.Event()
        self._alarm = Alarm(self._wake_at, lambda: self.handle(e.Tick(self._now())))
        self._session = Session(
            config.broker,
            # One a process, which it alone knows: whoever connected with it, would push this server off.
            f"meerkat-{config.federation}-server-{secrets.token_hex(8)}",
            subscriptions=[(self._topics.up("+", kind), 1) for kind in ("status", "update", "want")],
            on_message=self._on_message,
            on_connected=self._on_connected,
            on_disconnected=lambda _: self._succession.disconnected(),
            will=lambda link: Will(self._topics.server, self._state("lost", link).encode()),
            farewell=lambda link: Will(self._topics.server, self._state(self._parting_word(), link).encode()),
            kind_of=self._kind_of,
            outbox_bytes=OUTBOX_BYTES + 2 * len(run.blob),
            name=SERVER_NAME,
            marker=Marker(config.state_dir, config.broker, f"meerkat-{config.federation}-server"),
        )  # fmt: skip
        self._succession = Succession(
            self._topics.server, scribe.past, replace=replace, alone=alone, take=self._take_term,
            ask=lambda state: self._publish(self._topics.server, state, retain=False),
        )  # fmt: skip

    async def run(self) -> None:
        """Serve until cancelled; with `config.once`, until the run is finished."""
        try:
            async with asyncio.TaskGroup() as tasks:
                coroutines = (self._session.run(), self._alarm.run(), self._write(), self._keep_sightings(),
                              self._measurer.run(self.handle), self._fetches.run(), self._succeed(),
                              self._monitor.run(self._keep_metrics))  # fmt: skip
                work = [tasks.create_task(coroutine) for coroutine in coroutines]
                if self._config.once:
                    await self._wait_for_nodes()
                await self._finished.wait()
                await self._monitor.finish(self._scribe.committed[1], self._updates())
                self._note_sightings()
                await self._scribe.idle()
                await self._model.complete(once=self._config.once)
                if not self._config.once:
                    await asyncio.Event().wait()
                for task in work:
                    task.cancel()
        except BaseException:
            with suppress(MeerkatError):  # what went wrong first is what has to be said
                await self._model.leave()
            raise

    async def _write(self) -> None:
        try:
            await self._scribe.run(self)
        except AnotherServer:
            self._session.disown()
            raise

    async def _succeed(self) -> None:
        with self._leaving_to_others():
            await self._succession.run()

    async def _wait_for_nodes(self) -> None:
        wait_s = self._config.wait_for_nodes_s
        try:
            async with asyncio.timeout(wait_s):
                await self._enough_nodes.wait()
        except TimeoutError:
            online = self._machine.online if self._machine else 0
            raise TooFewNodes(
                f"federation {self._config.federation}",
                f"{online} of {self._run.settings.fewest_nodes} nodes came within {wait_s:g} s",
                "start more nodes, or lower rounds.min_nodes and rounds.min_updates",
            ) from None

    async def _keep_sightings(self) -> None:
        while True:
            await asyncio.sleep(SIGHTINGS_EVERY_S)
            self._note_sightings()
            machine = self._machine
            if machine is not None and not self._taking_term and self._pulse.due(machine.version, self._now()):
                self._publish_state()

    def _note_sightings(self) -> None:
        if self._machine is not None and (news := self._monitor.sightings(self._session.received)):
            self._scribe.put(KeepSightings(news))

    def _keep_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        self._scribe.put(KeepMetrics(version, metrics))

    # --- connection and state ---

    def _on_connected(self, link: int) -> None:
        if self._taking_term:
            return  # `took_term` makes another connection
        if self._machine is not None:
            self._greet(self._machine)
            return
        with self._leaving_to_others():
            self._succession.connected()

    @contextmanager
    def _leaving_to_others(self) -> Iterator[None]:
        """Whoever may not take charge leaves what stands on the topics as it is."""
        try:
            yield
        except MeerkatError:
            self._session.disown()
            raise

    def _greet(self, machine: ServerMachine) -> None:
        """Say on a connection all that the broker should hold."""
        self._greeted = True
        self._publish_state()
        self._publish_run()
        self._perform(machine.start(self._now()))  # the round before the mask: nodes wait for it
        for node, status in list(self._monitor.statuses.items()):
            self.handle(e.StatusCame(self._now(), node, status))
        for chunk in self._chunks:
            self._published(self._topics.blob(chunk.blob, chunk.index), encode(chunk), retain=True)

    def _take_term(self, above: int) -> None:
        """Take a term above another; until then the present machine, if there is one, hears and says nothing."""
        self._taking_term = True
        self._fetches.forget()
        self._scribe.put(e.TakeTerm(above))

    def took_term(self, term: int, machine: ServerMachine) -> None:
        """The ledger holds this server's term."""
        first = self._machine is None
        self._term, self._machine, self._taking_term = term, machine, False
        self._chunks = self._run.chunks(term)
        self._log.info(
            "in charge", term=term, weights=self._run.mask.size, round=machine.version, rounds=self._config.rounds.count
        )
        if first:
            if said := mode_in_words(self._run.settings):
                self._log.info("mode", how=said)
            if said := trust_in_words(self._run.settings):
                self._log.warning("nothing compares updates", means=said)
            if said := early_stopping_in_words(self._run.settings):
                self._log.info("early stopping", how=said)
            self._observe(RunStarted(self._run.descriptor, term))
            self._monitor.stood(*self._scribe.committed)
        self._session.renew()  # for a will that holds this term; then `_on_connected` greets

    def _parting_word(self) -> str:
        return "finished" if self._machine is not None and self._machine.finished else "stopped"

    def _state(self, status: str, link: int) -> ServerState:
        machine = self._machine
        state = {"status": status, "run": self._run.descriptor.run, "term": self._term, "link": link}
        state |= {"server_id": self._server_id, "host": socket.gethostname()}
        state |= {"round": machine.version if machine else 0, "nodes": machine.online if machine else 0}
        return ServerState.model_validate(state)

    def _publish_state(self) -> None:
        if self._session.link is not None and self._machine is not None:
            status = "finished" if self._machine.finished else "online"
            self._publish(self._topics.server, self._state(status, self._session.link))
            self._pulse.said(self._machine.version, self._now())

    def _publish_run(self) -> None:
        if self._session.link is not None and self._machine is not None:
            self._publish(self._topics.run, self._run.descriptor)

    def _publish(self, topic: str, message: ControlMessage, *, retain: bool = True) -> None:
        self._published(topic, message.encode(), retain=retain)

    def _published(self, topic: str, payload: bytes, *, retain: bool) -> bool:
        """Publish, unless that is dropped and counted."""
        try:
            self._session.publish(topic, payload, retain=retain)
        except NotConnected:
            self._monitor.counts[m.OUTBOX_FULL] += 1
        except PayloadTooLarge as error:
            self._monitor.counts[m.OVER_LIMIT] += 1
            self._seldom.say(self._log.warning, "not published", topic, topic=topic, problem=error.problem)
        else:
            return True
        return False

    # --- messages ---

    def _on_message(self, message: Message) -> None:
        try:
            if message.topic == self._topics.server:
                self._on_server_state(message)
            elif message.payload and (parsed := self._topics.parse_up(message.topic)) is not None:
                self._on_node_message(*parsed, message.payload)
        except WireError as error:
            self._monitor.counts[m.UNDECODABLE.of(type(error).__name__)] += 1
            key, said = (message.topic, type(error).__name__), {"topic": message.topic, "problem": str(error)}
            self._seldom.say(self._log.warning, "message dropped", *key, **said)

    def _on_server_state(self, message: Message) -> None:
        try:
            state = decode_control(message.payload, ServerState)
        except WireError:
            self._publish_state()
            raise
        if self._machine is None:
            with self._leaving_to_others():
                self._succession.saw(state, live=not message.retained)
        elif state.server_id != self._server_id:
            self.handle(e.ServerSeen(self._now(), state))
            self._publish_run()
        elif state.status == "lost":
            self.handle(e.ServerSeen(self._now(), state))

    def _on_node_message(self, node: str, kind: str, payload: bytes) -> None:
        if kind == "status":
            status = decode_control(payload, NodeStatus)
            self._monitor.heard_from(node, status)
            self.handle(e.StatusCame(self._now(), node, status))
            if status.status in ("starting", "online") and status.run != self._run.descriptor.run:
                self._publish_run()
            return
        match decode(payload):
            case Update() as update if kind == "update":
                self.handle(e.UpdateCame(self._now(), node, update))
            case Chunk() as chunk if kind == "update" and chunk.header.run == self.header().run:
                self._fetches.add(node, chunk)
            case Want() as want if kind == "want" and want.header.run != self.header().run:
                self._monitor.counts[m.ANOTHER_RUN] += 1
                self._publish_run()
            case Want() as want if kind == "want":
                self.handle(e.WantCame(self._now(), node, want))
            case frame:
                self._monitor.counts[m.MISPLACED.of(type(frame).__name__)] += 1

    def _kind_of(self, topic: str) -> str:
        parsed = self._topics.parse_up(topic)
        if parsed is None:
            return topic.removeprefix(f"{self._topics.root}/").split("/", 1)[0]
        return f"{parsed[1]}/{parsed[0]}" if parsed[0] in self._monitor.statuses else parsed[1]

    def _updates(self) -> dict[str, Count]:
        return {
            kind.removeprefix("update/"): count
            for kind, count in self._session.received.items()
            if kind.startswith("update/")
        }

    # --- events and effects ---

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _wake_at(self) -> float | None:
        return self._machine.wake_at if self._machine is not None and not self._taking_term else None

    def handle(self, event: e.ServerEvent) -> None:
        """Tell the machine, and carry out what it asks for."""
        if self._machine is not None and not self._taking_term:
            self._perform(self._machine.handle(event))
        if isinstance(event, e.EntryCommitted) and self._machine is not None:
            bytes_up = sum(count.payload_bytes for count in self._updates().values())
            self._monitor.closed(event, self._machine.online, bytes_up)
            self._monitor.stood(*self._scribe.committed)

    def _perform(self, effects: list[e.ServerEffect]) -> None:
        for effect in effects:
            self._carry_out(effect)
        if self._machine is not None:
            self._say_who_is_awaited(self._machine)
            if self._is_open or self._machine.online >= self._run.settings.fewest_nodes:
                self._enough_nodes.set()
        self._alarm.changed()

    def _carry_out(self, effect: e.ServerEffect) -> None:
        match effect:
            case (e.CommitSlot() | e.CommitUpdate() | e.JudgeRound() | e.ApplyTerms() | e.CommitEntry()
                  | e.KeepSnapshot() | e.SendEntries()):  # fmt: skip
                self._scribe.put(effect)
            case e.FetchValues():
                self._fetches.put(effect)
            case e.MeasureDirections():
                self._measurer.put(effect)
            case e.TakeTerm(above):
                self._take_term(above)
            case e.PublishRound(frame):
                self._publish_round(frame)
            case e.PublishState(finished):
                self._publish_state()
                if finished and self._greeted:  # else it would leave before anybody has heard of this term
                    self._finished.set()
                    self._enough_nodes.set()
            case e.Reply(node, reply):
                self.reply(node, reply)
            case e.SendChunks():
                self._send_chunks(effect)
            case e.Count(reason, node):
                self._monitor.counts[reason] += 1
                self._seldom.say(self._log.info, reason, node, node=node or None, round=effect.round)
            case e.End(error):
                self._session.disown()
                raise error

    def _send_chunks(self, effect: e.SendChunks) -> None:
        want = effect.want
        if want.blob != self._run.descriptor.mask_name:
            self._scribe.put(effect)
            return
        for index in chunks_of(want, len(self._chunks)):
            if not self._replied(effect.node, self._chunks[index]):
                return

    def _publish_round(self, frame: Round) -> None:
        self._is_open = frame.is_open
        if frame.is_open:
            self._monitor.opened()
        self._published(self._topics.round, encode(frame), retain=True)

    def _say_who_is_awaited(self, machine: ServerMachine) -> None:
        """Tell the log whenever the number of nodes changes that a round waits for."""
        waiting = not self._is_open and not machine.finished
        online = machine.online if waiting else None
        if waiting and online != self._awaited:
            said = {"online": online, "min_nodes": self._run.settings.fewest_nodes}
            self._seldom.say(self._log.info, "waiting for nodes", online, **said)
        self._awaited = online

    def distribute(self, blob: bytes) -> None:
        """Publish an entry's displacement, which the round frame has just named; who lacks a part of it asks."""
        for chunk in split(self.header(), short_hash(blob), blob):
            if not self._published(self._topics.values, encode(chunk), retain=False):
                return

    def reply(self, node: str, frame: Answer) -> None:
        """Answer a node; where too much waits for the broker already, it has to ask again."""
        self._replied(node, frame)

    def _replied(self, node: str, frame: Answer) -> bool:
        """Answer a node, unless that is dropped and counted."""
        return self._published(self._topics.reply(node), encode(frame), retain=False)

    def header(self) -> Header:
        """Of what this server says now."""
        version = self._machine.version if self._machine else 0
        return Header.of(self._run.descriptor.run_id, self._term, version, self._run.mask.hash)
