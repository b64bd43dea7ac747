"""A whole federation in one process: the same machines on a virtual clock, with an in-memory transport.

Every message passes through its wire encoding. `deliver` decides the fate of each: a list of delays in seconds, one a
copy that arrives; an empty list loses it.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry, digest, seed_for
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import Engine, Row, local_steps
from meerkat_mq.errors import MeerkatError
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.frames import Entries, Frame, Update, Want, decode, encode

SERVER = "server"
Deliver = Callable[[str, str, Frame], Sequence[float]]


def instantly(sender: str, receiver: str, frame: Frame) -> Sequence[float]:
    """Deliver every message once, after a millisecond."""
    return (0.001,)


@dataclass
class MemoryNode:
    """One node: its machine, its theta, its data.

    Attributes:
        step_s: virtual seconds that a round's local steps take.
        alive: False from `crash` until it is started again.
    """

    name: str
    engine: Engine[Any]
    rows: Sequence[Row]
    batch_size: int
    step_s: float = 0.01
    alive: bool = False
    boot: int = 0
    steps_done: int = 0
    machine: NodeMachine = field(init=False)
    replica: Replica = field(init=False)


class MemoryFederation:
    """Server and nodes on one virtual clock.

    Attributes:
        now: virtual seconds.
        entries: the ledger.
        records: update records of each entry.
        counts: (who, reason) of everything counted.
        errors: what ended a node or the server.
    """

    def __init__(
        self,
        settings: RoundSettings,
        mask: Mask,
        nodes: Sequence[MemoryNode],
        *,
        stream: str = "mk1",
        digest_every: int = 1,
        deliver: Deliver = instantly,
    ) -> None:
        self.settings = settings
        self.now = 0.0
        self.entries: list[Entry] = []
        self.records: list[tuple[e.UpdateRecord, ...]] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[tuple[str, MeerkatError]] = []
        self.deliver = deliver
        self.nodes: Mapping[str, MemoryNode] = {node.name: node for node in nodes}
        self._mask = mask
        self._stream = stream
        self._digest_every = digest_every
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._retained: Frame | None = None
        self._wake: dict[str, float] = {}
        self.replica = self._fresh_replica()
        self.server = ServerMachine(settings, term=1, server_id="0" * 16, base=digest(mask.theta_0))

    def _fresh_replica(self) -> Replica:
        return Replica(
            self._mask, run_id=self.settings.run_id, stream=self._stream, digest_every=self._digest_every
        )  # fmt: skip

    # --- the clock ---

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Do something at a virtual time."""
        heapq.heappush(self._agenda, (time, next(self._order), action))

    def run(self, until: float) -> None:
        """Let virtual time pass, until the run is finished, nothing is left to happen, or `until`."""
        while self._agenda and not self.server.finished:
            time = self._agenda[0][0]
            if time > until:
                break
            time, _, action = heapq.heappop(self._agenda)
            self.now = max(self.now, time)
            action()

    def settle(self, seconds: float) -> None:
        """Let virtual time pass, also after the run is finished."""
        until = self.now + seconds
        while self._agenda and self._agenda[0][0] <= until:
            time, _, action = heapq.heappop(self._agenda)
            self.now = max(self.now, time)
            action()

    # --- people's hands ---

    def start(self) -> None:
        """Start the server, then every node."""
        self._server_effects(self.server.start(self.now))
        for name in self.nodes:
            self.start_node(name)

    def start_node(self, name: str) -> None:
        """Start a node, anew if it crashed: it begins at theta_0 with another boot."""
        node = self.nodes[name]
        node.alive, node.boot, node.replica = True, node.boot + 1, self._fresh_replica()
        node.machine = NodeMachine(
            run_id=self.settings.run_id,
            mask_hash=self.settings.mask_hash,
            base=digest(self._mask.theta_0),
            boot=node.boot,
            now=self.now,
        )
        state = ServerState(
            status="online",
            run=self.settings.run_id.hex(),
            term=1,
            server_id="0" * 16,
            link=1,
            host="memory",
            round=len(self.entries),
        )
        self._node_effects(node, node.machine.handle(e.ServerCame(self.now, state)))
        if self._retained is not None:
            self._to_node(node, self._retained, 0.001)

    def crash(self, name: str) -> None:
        """Kill a node; the broker announces its death."""
        self.nodes[name].alive = False
        self._status(self.nodes[name], "lost")

    def leave(self, name: str) -> None:
        """Let a node end in order."""
        self.nodes[name].alive = False
        self._status(self.nodes[name], "stopped")

    # --- the server's effects ---

    def _to_server(self, event: e.ServerEvent) -> None:
        self._server_effects(self.server.handle(event))

    def _server_effects(self, effects: Sequence[e.ServerEffect]) -> None:
        for effect in effects:
            self._server_effect(effect)
        self._schedule_wake(SERVER, self.server.wake_at, lambda: self._to_server(e.Tick(self.now)))

    def _server_effect(self, effect: e.ServerEffect) -> None:
        match effect:
            case e.CommitSlot(node):
                self.at(self.now, lambda: self._to_server(e.SlotCommitted(self.now, node)))
            case e.CommitUpdate(record):
                self.at(self.now, lambda: self._to_server(e.UpdatesCommitted(self.now, (record,))))
            case e.ApplyTerms(version, terms):
                after = self.replica.apply(terms)
                self.at(self.now, lambda: self._to_server(e.TermsApplied(self.now, version, after)))
            case e.CommitEntry(entry, records):
                self.entries.append(entry)
                self.records.append(records)
                self.at(self.now, lambda: self._to_server(e.EntryCommitted(self.now, entry.version, records)))
            case e.PublishRound(frame):
                self._retained = frame
                for name in self.nodes:
                    self._send(SERVER, name, frame)
            case e.Reply(name, reply):
                self._send(SERVER, name, reply)
            case e.SendEntries(name, first):
                header = self._retained.header if self._retained else None
                if header is not None and self.entries[first:]:
                    self._send(SERVER, name, Entries(header, tuple(self.entries[first : first + 1000])))
            case e.Count(reason, name):
                self.counts[name or SERVER, reason] += 1
            case e.End(error):
                self.errors.append((SERVER, error))
            case e.PublishState() | e.SendChunks():
                pass

    # --- a node's effects ---

    def _to(self, node: MemoryNode, boot: int, event: e.NodeEvent) -> None:
        if node.alive and node.boot == boot:
            self._node_effects(node, node.machine.handle(event))

    def _node_effects(self, node: MemoryNode, effects: Sequence[e.NodeEffect]) -> None:
        for effect in effects:
            self._node_effect(node, effect)
        boot = node.boot
        self._schedule_wake(node.name, node.machine.wake_at, lambda: self._to(node, boot, e.Tick(self.now)))

    def _node_effect(self, node: MemoryNode, effect: e.NodeEffect) -> None:
        boot = node.boot
        match effect:
            case e.PublishStatus():
                self._status(node, "online")
            case e.Send(frame):
                self._send(node.name, SERVER, frame)
            case e.ApplyEntries(entries):
                digests = tuple(node.replica.apply(entry.terms) for entry in entries)
                self.at(self.now, lambda: self._to(node, boot, e.EntriesApplied(self.now, entries, digests)))
            case e.ResetTheta():
                node.replica.reset()
            case e.StartSteps(version, lane, steps, eps):
                scalars, loss = self._walk(node, version, lane, steps, eps)
                done = lambda: self._to(node, boot, e.StepsDone(self.now, version, scalars, loss))  # noqa: E731
                self.at(self.now + node.step_s, done)
            case e.Count(reason, _):
                self.counts[node.name, reason] += 1
            case e.End(error):
                self.errors.append((node.name, error))
                node.alive = False

    def _walk(
        self, node: MemoryNode, version: int, lane: int, steps: int, eps: float
    ) -> tuple[tuple[float, ...], float]:  # fmt: skip
        run_id, first = self.settings.run_id, node.steps_done
        node.steps_done += steps
        numbers = [
            batch_rows(run_id, node.name, len(node.rows), node.batch_size, step) for step in range(first, first + steps)
        ]
        return local_steps(
            node.engine,
            node.replica.theta,
            [seed_for(run_id, version, lane, step) for step in range(steps)],
            [[node.rows[number] for number in batch] for batch in numbers],
            stream=self._stream,
            eps=eps,
            lr=self.settings.lr,
        )

    # --- the transport ---

    def _status(self, node: MemoryNode, status: str) -> None:
        message = NodeStatus.model_validate(
            {"status": status, "boot": node.boot, "link": node.boot, "host": "memory", "rows": len(node.rows)}
        )
        self.at(self.now + 0.001, lambda: self._to_server(e.StatusCame(self.now, node.name, message)))

    def _send(self, sender: str, receiver: str, frame: Frame) -> None:
        for delay in self.deliver(sender, receiver, frame):
            if receiver == SERVER:
                self.at(self.now + delay, partial(self._receive, sender, encode(frame)))
            elif self.nodes[receiver].alive:
                self._to_node(self.nodes[receiver], decode(encode(frame)), delay)

    def _receive(self, sender: str, payload: bytes) -> None:
        match decode(payload):
            case Update() as update:
                self._to_server(e.UpdateCame(self.now, sender, update))
            case Want() as want:
                self._to_server(e.WantCame(self.now, sender, want))

    def _to_node(self, node: MemoryNode, frame: Any, delay: float) -> None:
        boot = node.boot
        self.at(self.now + delay, lambda: self._to(node, boot, e.FrameCame(self.now, frame)))

    def _schedule_wake(self, name: str, wake_at: float | None, tick: Callable[[], None]) -> None:
        if wake_at is not None and self._wake.get(name) != wake_at:
            self._wake[name] = wake_at
            self.at(max(wake_at, self.now), tick)
