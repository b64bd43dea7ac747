"""The server's driver: carries each effect of the server machine out, in exactly one place.

What a message, a connection or the end of some work means is decided by the machine (rounds/server.py). The driver
decodes and encodes, publishes, and hands work to those who do it: the ledger writer (whatever concerns ledger and
theta), the fetches (displacements of values nodes), the measurer (GradIP's inner products). It holds what belongs to
this process and to no machine: its link, its term, whether it may take a term at all (succession.py).

A machine lives for one term. Between the decision to take another term and the ledger's word that it is taken, the
present machine hears and says nothing.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import assert_never

import structlog

from meerkat_mq.core import metrics as m
from meerkat_mq.core.path import short_hash
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import NotConnected, PayloadTooLarge, WireError
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.presence import Pulse
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime.announcer import Announcer
from meerkat_mq.runtime.budgets import SILENT, Budgets, Raises
from meerkat_mq.runtime.fetches import Fetches
from meerkat_mq.runtime.inbox import Inbox
from meerkat_mq.runtime.measure import Measurer, judged
from meerkat_mq.runtime.ports import Clock, Compute, ServerMonitor, Transport
from meerkat_mq.runtime.steps import Alarm, Steps
from meerkat_mq.runtime.steps import Sequence as Running
from meerkat_mq.runtime.succession import Succession
from meerkat_mq.runtime.writer import Holdings, LedgerWriter
from meerkat_mq.wire.arrays import chunks_of, split
from meerkat_mq.wire.descriptor import ControlMessage, NodeStatus, ServerState, decode_control
from meerkat_mq.wire.frames import MAX_SLOTS, decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Frame, Header, Offer, Refusal, Round, Update, Want, Welcome
from meerkat_mq.wire.snapshot import largest_snapshot
from meerkat_mq.wire.topics import Topics

LOOK_S = 1.0  # between two looks at whether the retained state has to follow the run
MOST_STRANGERS = 8192  # statuses to remember of nodes that never answered a round

Answer = Welcome | Refusal | Entries | Offer | Chunk | Want


class ServerDriver:
    """One server process. Its transport is subscribed to all nodes' topics and the server topic.

    Args:
        server_id: random, one a process; 16 hex digits.
        ledger_work: does what concerns ledger and theta; `measure_work` inner products, `other_work` the rest.
        replace: whether to take over from a server that is online.
        alone: whether no other process uses this server's ledger.

    Attributes:
        machine: of the present term; None before the first.
    """

    def __init__(
        self,
        federation: str,
        server_id: str,
        held: Holdings,
        *,
        transport: Transport,
        clock: Clock,
        ledger_work: Compute,
        measure_work: Compute,
        other_work: Compute,
        monitor: ServerMonitor,
        replace: bool = False,
        alone: bool = True,
        read: Callable[[bytes], Frame] = decode,
    ) -> None:
        run = held.run
        self.machine: ServerMachine | None = None
        self._run = run
        self._server_id = server_id
        self._transport = transport
        self._clock = clock
        self._others = other_work
        self._monitor = monitor
        self._log = structlog.get_logger().bind(federation=federation, run=run.descriptor.run[:8])
        self._read = read
        self._seldom = Seldom()
        self._topics = Topics(federation)
        self._taking_term = False
        self._term = 0
        self._pulse = Pulse(rounds=3, slow_s=30.0)
        self._chunks = run.chunks
        self._greeted = False
        self._awaited: int | None = None
        self._alarm = Alarm(clock, lambda: self.handle(e.Tick(clock.now())))
        self._statuses: dict[str, NodeStatus] = {}
        self._budgets = Budgets(clock, len(run.blob) + largest_snapshot(run.mask.size), monitor)
        self._raises = Raises(clock, self._budgets)
        self._inbox = Inbox(self._budgets, clock, monitor, has_answered=self._has_answered, take=self._on_node_message)
        self._announcer = Announcer(clock, self._publish_round, self._publish_run)
        self.writer = LedgerWriter(held, compute=ledger_work, clock=clock, server_id=server_id, owner=self)
        self._measurer = Measurer(run, measure_work, clock, self.handle)
        fetched = run.mask.size, self, self.writer.put, run.settings.reach, self._budgets.charge
        self._fetches = Fetches(*fetched, compute=other_work, clock=clock)
        self._succession = Succession(
            self._topics.server, held.past, replace=replace, alone=alone, take=self._take_term, clock=clock,
            ask=lambda state: self._publish(self._topics.server, state, retain=False), leave=transport.disown,
        )  # fmt: skip

    # --- connections ---

    def connected(self, link: int) -> None:
        """A connection stands, and what was retained on the server topic has been received.

        Raises:
            MeerkatError: another server is there, or what stands there does not go with the ledger.
        """
        if self._taking_term:
            return  # `took_term` makes another connection
        if self.machine is not None:
            self._greet(self.machine)
            return
        self._succession.connected()

    def disconnected(self) -> None:
        """The connection is gone."""
        self._succession.disconnected()

    def stop(self) -> None:
        """The process ends: what takes long is given up."""
        self._measurer.stop()

    def _greet(self, machine: ServerMachine) -> None:
        """Say on a connection all that the broker should hold; the round first, since nodes wait for it."""
        first, self._greeted = not self._greeted, True
        self._announcer.forget()
        self._publish_state()
        self._publish_run()
        self._perform(machine.start(self._clock.now()))
        for chunk in self._chunks:
            self._publish_bytes(self._topics.blob(chunk.blob, chunk.index), encode(chunk))
        for node, status in list(self._statuses.items()):
            self.handle(e.StatusCame(self._clock.now(), node, status))
        if first:
            self._look()

    def _look(self) -> None:
        """Once a second: let the retained state follow the run."""
        machine = self.machine
        if machine is not None and not self._taking_term and self._pulse.due(machine.version, self._clock.now()):
            self._publish_state()
        self._clock.at(self._clock.now() + LOOK_S, self._look)

    # --- terms ---

    def _take_term(self, above: int) -> None:
        """Take a term above another."""
        self._taking_term = True
        self._announcer.forget()
        self._fetches.forget()
        self.writer.put(e.TakeTerm(above))

    def _raise_term(self, above: int, node: str) -> None:
        """A node has seen a higher term: take one above it, or as far above this one as nodes may bring this server."""
        step = self._raises.step(node)
        if step == 0 and self.machine is not None:
            self._monitor.counted(m.TERM_KEPT)
            self.machine.stay()
        else:
            self._monitor.counted(m.HIGHER_TERM)
            self._log.info(m.HIGHER_TERM, node=node, term=self._term, seen=above)
            self._take_term(min(above, self._term + step - 1))

    def took_term(self, term: int, machine: ServerMachine) -> None:
        """The ledger holds this server's term."""
        is_first, self._term, self.machine, self._taking_term = self.machine is None, term, machine, False
        self._chunks = [replace(chunk, header=replace(chunk.header, term=term)) for chunk in self._chunks]
        self._log.info(
            "in charge", term=term, weights=self._run.mask.size, round=machine.version, rounds=self._run.settings.count
        )
        self._monitor.took_term(term)
        if is_first:
            self._monitor.stood(*self.writer.committed)
        self._transport.renew()  # for a will that holds this term; then `connected` greets

    def outranked(self) -> None:
        """The ledger holds another server's term: that one owns the topics."""
        self._transport.disown()

    # --- what stands on the server's topics ---

    def state(self, status: str, link: int) -> ServerState:
        """What the server topic says of this process, or the broker in its name."""
        machine = self.machine
        state = {"status": status, "run": self._run.descriptor.run, "term": self._term, "link": link}
        state |= {"server_id": self._server_id, "host": socket.gethostname()}
        state |= {"round": machine.version if machine else 0, "nodes": machine.online if machine else 0}
        return ServerState.model_validate(state)

    def parting(self, link: int) -> ServerState:
        """What the server topic says once this process has ended in order."""
        finished = self.machine is not None and self.machine.finished
        return self.state("finished" if finished else "stopped", link)

    def _publish_state(self) -> None:
        if self._transport.link is not None and self.machine is not None:
            status = "finished" if self.machine.finished else "online"
            self._publish(self._topics.server, self.state(status, self._transport.link))
            self._pulse.said(self.machine.version, self._clock.now())

    def _publish_run(self) -> None:
        if self._transport.link is not None and self.machine is not None:
            self._publish(self._topics.run, self._run.descriptor)

    def _publish(self, topic: str, message: ControlMessage, *, retain: bool = True) -> None:
        self._publish_bytes(topic, message.encode(), retain=retain)

    def _publish_bytes(self, topic: str, payload: bytes, *, retain: bool = True) -> bool:
        """Publish, or drop and count what the session does not take."""
        try:
            self._transport.publish(topic, payload, retain=retain)
        except NotConnected:
            self._monitor.counted(m.OUTBOX_FULL)
        except PayloadTooLarge as error:
            self._monitor.counted(m.OVER_LIMIT)
            self._seldom.say(self._log.warning, "not published", topic, topic=topic, problem=error.problem)
        else:
            return True
        return False

    # --- messages ---

    def received(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """A message came; what is raised ends this server."""
        try:
            if topic == self._topics.server:
                self._on_server_state(payload, retained=retained)
            elif payload and (parsed := self._topics.parse_up(topic)) is not None:
                self._inbox.put(*parsed, payload)
        except WireError as error:
            self._undecodable(topic, error)

    def _undecodable(self, topic: str, error: WireError) -> None:
        self._monitor.counted(m.UNDECODABLE.of(type(error).__name__))
        key = topic, type(error).__name__
        self._seldom.say(self._log.warning, "message dropped", *key, topic=topic, problem=str(error))

    def _on_server_state(self, payload: bytes, *, retained: bool) -> None:
        try:
            state = decode_control(payload, ServerState)
        except WireError:
            self._publish_state()
            raise
        if self.machine is None:
            self._succession.saw(state, live=not retained)
        elif state.server_id != self._server_id or state.term > self._term:  # also of who plays this very process
            self.handle(e.ServerSeen(self._clock.now(), state))
            self._announcer.describe()
        elif state.status == "lost":
            self.handle(e.ServerSeen(self._clock.now(), state))

    def _on_node_message(self, node: str, kind: str, payload: bytes) -> None:
        try:
            if kind == "status":
                self._on_status(node, decode_control(payload, NodeStatus))
            else:
                self._on_node_frame(node, kind, self._read(payload))
        except WireError as error:
            self._undecodable(f"{self._topics.root}/up/{node}/{kind}", error)

    def _on_node_frame(self, node: str, kind: str, frame: Frame) -> None:
        now = self._clock.now()
        match frame:
            case Update() if kind == "update":
                self.handle(e.UpdateCame(now, node, frame))
            case Chunk() if kind == "update" and frame.header.run == self.header().run:
                if self._fetches.add(node, frame):
                    self._budgets.was_useful()
            case Want() if kind == "want" and frame.header.run != self.header().run:
                self._monitor.counted(m.ANOTHER_RUN)
                self._announcer.describe()
            case Want() if kind == "want":
                self.handle(e.WantCame(now, node, frame))
            case _:
                self._monitor.counted(m.MISPLACED.of(type(frame).__name__))

    def _on_status(self, node: str, status: NodeStatus) -> None:
        answered = self.machine.answered if self.machine is not None else 0
        if node in self._statuses or len(self._statuses) < min(MAX_SLOTS, answered + MOST_STRANGERS):
            self._statuses[node] = status
            self._monitor.heard_from(node, status)
        else:
            self._monitor.counted(m.TOO_MANY_NODES)
        self.handle(e.StatusCame(self._clock.now(), node, status))
        if status.status in ("starting", "online") and status.run != self._run.descriptor.run:
            self._announcer.describe()

    def _has_answered(self, node: str) -> bool:
        return self.machine is not None and self.machine.has_answered(node)

    # --- events and effects ---

    def handle(self, event: e.ServerEvent) -> None:
        """Tell the machine, and carry out what it asks for."""
        if self.machine is not None and not self._taking_term:
            self._perform(self.machine.handle(event))
        if isinstance(event, e.EntryCommitted) and self.machine is not None:
            self._budgets.round_closed()
            self._monitor.closed(event.commit, self.machine.online)
            self._monitor.stood(*self.writer.committed)

    def _perform(self, effects: Sequence[e.ServerEffect]) -> None:
        if any(isinstance(effect, e.CommitUpdate | e.FetchValues) for effect in effects):
            self._budgets.was_useful()
        for effect in effects:
            self._carry_out(effect)
        machine = self.machine
        if machine is not None:
            self._say_who_is_awaited(machine)
            self._monitor.changed(
                machine.online, is_open=self._announcer.is_open, finished=machine.finished and self._greeted
            )
        self._alarm.set(machine.wake_at if machine is not None and not self._taking_term else None)

    def _carry_out(self, effect: e.ServerEffect) -> None:
        match effect:
            case (e.CommitSlot() | e.CommitUpdate() | e.ApplyTerms() | e.CommitEntry() | e.KeepSnapshot()
                  | e.SendEntries()):  # fmt: skip
                self.writer.put(effect)
            case e.FetchValues():
                self._fetches.put(effect)
            case e.MeasureDirections():
                self._measurer.put(effect)
            case e.JudgeRound():
                Running(self._judge(effect))
            case e.TakeTerm(above, node):
                self._raise_term(above, node)
            case e.PublishRound(frame):
                self._announcer.say(frame)
            case e.PublishState():
                self._publish_state()
            case e.Reply(node, frame):
                self.reply(node, frame)
            case e.SendChunks():
                self._send_chunks(effect)
            case e.Count(reason, node):
                self._monitor.counted(reason)
                self._seldom.say(self._log.info, reason, node, node=node or None, round=effect.round)
            case e.End(error):
                self._transport.disown()
                raise error
            case _:
                assert_never(effect)

    def _judge(self, order: e.JudgeRound) -> Steps[None]:
        outcome = yield from judged(order, self._run.settings, self.writer.put, self._others)
        self.handle(e.RoundJudged(self._clock.now(), order.term, order.version, outcome))

    def _send_chunks(self, effect: e.SendChunks) -> None:
        want = effect.want
        if want.blob == self._run.descriptor.mask_name:
            all(self.reply(effect.node, self._chunks[index]) for index in chunks_of(want, len(self._chunks)))
        else:
            self.writer.put(effect)

    def _publish_round(self, frame: Round) -> None:
        self._publish_bytes(self._topics.round, encode(frame))

    def _say_who_is_awaited(self, machine: ServerMachine) -> None:
        """Tell the log whenever the number of nodes changes that a round waits for."""
        online = None if self._announcer.is_open or machine.finished else machine.online
        if online is not None and online != self._awaited:
            said = {"online": online, "min_nodes": self._run.settings.fewest_nodes}
            self._seldom.say(self._log.info, "waiting for nodes", online, **said)
        self._awaited = online

    def distribute(self, blob: bytes) -> None:
        """Publish an entry's displacement, which the round frame has just named; who lacks a part of it asks."""
        payloads = map(encode, split(self.header(), short_hash(blob), blob))
        all(self._publish_bytes(self._topics.values, payload, retain=False) for payload in payloads)

    def reply(self, node: str, frame: Answer) -> bool:
        """Answer a node, unless that is dropped and counted: it has to ask again then."""
        payload = encode(frame)
        if not self._budgets.answers(node, len(payload)):
            self._monitor.counted(m.NOT_ANSWERED)
            return False
        return self._publish_bytes(self._topics.reply(node), payload, retain=False)

    def header(self) -> Header:
        """Of what this server says now."""
        version = self.machine.version if self.machine else 0
        return Header.of(self._run.descriptor.run_id, self._term, version, self._run.mask.hash)

    def flagged(self, node: str) -> str:
        """Why a node stands out by what it sends, or by its silence; "" where it does not."""
        silent = self.machine is not None and self.machine.is_silent(node)
        return self._budgets.flagged(node) or SILENT * silent
