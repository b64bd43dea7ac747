"""A whole federation in one process: the same machines on a virtual clock, with an in-memory transport.

Every message passes through its wire encoding. `deliver` decides the fate of each: a list of delays in seconds, one a
copy that arrives; an empty list loses it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import direction
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import NO_DIGEST, Entry, digest
from meerkat_mq.core.replica import NewestTheta, Replica, SharedReplica
from meerkat_mq.errors import MeerkatError
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.guards import on_arrival
from meerkat_mq.rounds.memory_clock import VirtualClock
from meerkat_mq.rounds.memory_node import Displacements, MemoryNode, Walk
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.wire.descriptor import ServerState
from meerkat_mq.wire.frames import Entries, Frame, Round, Update, Values, Want, decode, encode

__all__ = ["SERVER", "Deliver", "MemoryFederation", "MemoryNode", "instantly"]

SERVER = "server"
FETCH_S = 0.002
MISSED_S = 2.0
DRAWN_BYTES = 2**30  # of directions that are kept for the other nodes of a lane
Deliver = Callable[[str, str, Frame], Sequence[float]]


def instantly(sender: str, receiver: str, frame: Frame) -> Sequence[float]:
    """Deliver every message once, after a millisecond."""
    return (0.001,)


class MemoryFederation(VirtualClock):
    """Server and nodes on one virtual clock.

    Attributes:
        term: that of the server, one more with each start.
        entries: the ledger.
        records: update records of each entry.
        products: ⟨g_p, z⟩ of each entry's directions, by lane and step.
        judgements: of all calibration rounds, oldest first.
        updates: committed updates that are in no entry yet.
        displacements: of nodes and of entries.
        slots: (version of theta when it was given, node, slot).
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
        codec: Codec = "bfloat16",
        deliver: Deliver = instantly,
        commit_s: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.term = 0
        self.entries: list[Entry] = []
        self.records: list[tuple[UpdateRecord, ...]] = []
        self.products: list[tuple[tuple[float, ...], ...]] = []
        self.judgements: list[Judgement] = []
        self.updates: list[UpdateRecord] = []
        self.displacements = Displacements(mask.size, codec)
        self.slots: list[tuple[int, str, int]] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[tuple[str, MeerkatError]] = []
        self.deliver = deliver
        self.nodes: Mapping[str, MemoryNode] = {node.name: node for node in nodes}
        self._mask = mask
        self.stream = stream
        self.digest_every = digest_every
        self._commit_s = commit_s
        self._retained: Round | None = None
        self._wake: dict[str, float] = {}
        self._newest = NewestTheta(mask.theta_0)
        self._draw = lru_cache(maxsize=min(1024, DRAWN_BYTES // (4 * mask.size)))(direction)
        self.replica = self._fresh_replica()
        self.server = self._resumed_server()
        self.server_up = False

    def _fresh_replica(self) -> Replica:
        return SharedReplica(self._mask, self.settings.run_id, self.stream, self.digest_every, self._newest)

    def run(self, until: float) -> None:
        """Let virtual time pass, until the run is finished or it is `until`."""
        self.pass_until(until, lambda: self.server.finished)
        if not self.server.finished:
            self.now = max(self.now, until)

    def settle(self, seconds: float) -> None:
        """Let virtual time pass, also after the run is finished."""
        until = self.now + seconds
        self.pass_until(until, lambda: False)
        self.now = until

    # --- people's hands ---

    def start(self) -> None:
        """Start the server, then every node."""
        self.start_server()
        for name in self.nodes:
            self.start_node(name)

    def start_server(self, keep: int | None = None) -> None:
        """Start a server from the ledger under the next term; `keep`: from a backup of that many entries."""
        if keep is not None and keep < len(self.entries):
            del self.entries[keep:], self.records[keep:], self.products[keep:], self.updates[:]
            self.judgements = [judgement for judgement in self.judgements if judgement.version < keep]
            self.slots = [given for given in self.slots if given[0] <= keep]
        self.term += 1
        self._wake.pop(SERVER, None)
        self.server, self.server_up = self._resumed_server(), True
        self._server_effects(self.server.start(self.now))
        for node in self.nodes.values():
            self._to_node(node, lambda now: e.ServerCame(now, self._state()))

    def _resumed_server(self) -> ServerMachine:
        self.replica, bases = self._fresh_replica(), {0: digest(self._mask.theta_0)}
        for version, entry in enumerate(self.entries):
            after = self.replica.apply(entry.terms, self.displacements.of(entry))
            bases[version + 1] = bases[version] if after == NO_DIGEST else after
        oldest = len(self.entries) - self.settings.max_staleness
        known = sorted(itertools.chain(*self.records, self.updates), key=lambda record: record.version)
        return ServerMachine(
            self.settings,
            term=self.term,
            server_id="0" * 16,
            base=bases[len(self.entries)],
            version=len(self.entries),
            head=self.entries[-1].hash(self.settings.run_id) if self.entries else None,
            slots={name: slot for _, name, slot in self.slots},
            entries=self.entries,
            updates=self.updates,
            past=self.records[-self.settings.guards.window :],
            judgements=self.judgements,
            bases={version: base for version, base in bases.items() if version >= oldest},
            heard={record.node: record.version for record in known},
        )

    def crash_server(self) -> None:
        """Kill the server: what it has not committed, and what is sent to it, is lost."""
        self.server_up = False

    def start_node(self, name: str) -> None:
        """Start a node, anew if it crashed: it begins at theta_0 with another boot."""
        node = self.nodes[name]
        node.alive, node.held, node.boot, node.replica = True, None, node.boot + 1, self._fresh_replica()
        node.begin(self._mask.size)
        node.machine = NodeMachine(
            run_id=self.settings.run_id,
            mask_hash=self.settings.mask_hash,
            base=digest(self._mask.theta_0),
            boot=node.boot,
            now=self.now,
            max_staleness=self.settings.max_staleness,
        )
        self._wake.pop(name, None)
        self._connect(node)

    def reconnect(self, name: str) -> None:
        """Cut a node's connection; it stands again at once, under another link."""
        self._status(self.nodes[name], "lost")
        self._connect(self.nodes[name])

    def _connect(self, node: MemoryNode) -> None:
        node.link += 1
        self._to(node, node.boot, e.Connected(self.now))
        self._to_node(node, lambda now: e.ServerCame(now, self._state()))
        if self._retained is not None:
            self._to_node(node, partial(e.FrameCame, frame=self._retained))

    def _state(self) -> ServerState:
        status: Literal["online", "lost"] = "online" if self.server_up else "lost"
        run, link, head = self.settings.run_id.hex(), self.term, len(self.entries)
        return ServerState(
            status=status, run=run, term=self.term, server_id="0" * 16, link=link, host="memory", round=head
        )  # fmt: skip

    def freeze(self, name: str) -> None:
        """Stop a node as SIGSTOP does: what comes waits until `thaw`."""
        if self.nodes[name].alive:
            self.nodes[name].held = self.nodes[name].held or []

    def thaw(self, name: str) -> None:
        """Let a frozen node go on."""
        node = self.nodes[name]
        held, node.held = node.held or [], None
        for event in held:
            self._to(node, node.boot, replace(event, now=self.now))

    def crash(self, name: str, *, will_s: float = 0.001) -> None:
        """Kill a node; the broker announces its death after `will_s`."""
        self.nodes[name].alive = False
        self._status(self.nodes[name], "lost", will_s)

    def leave(self, name: str) -> None:
        """Let a node end in order."""
        self.nodes[name].alive = False
        self._status(self.nodes[name], "stopped")

    # --- the server's effects ---

    def _to_server(self, event: e.ServerEvent) -> None:
        if self.server_up:
            self._server_effects(self.server.handle(event))

    def _server_effects(self, effects: Sequence[e.ServerEffect]) -> None:
        for effect in effects:
            self._server_effect(effect)
        self._schedule_wake(SERVER, self.server.wake_at, self._in_term(lambda: e.Tick(self.now)))

    def _in_term(self, event: Callable[[], e.ServerEvent]) -> Callable[[], None]:
        """An action that hands an event to the server, unless that is by then dead."""
        term = self.term
        return lambda: self._to_server(event()) if self.server_up and self.term == term else None

    def _commit(self, keep: Callable[[], None], event: Callable[[], e.ServerEvent]) -> None:
        def commit() -> e.ServerEvent:
            keep()
            return event()

        self.at(self.now + self._commit_s, self._in_term(commit))

    def _keep_entry(self, closed: e.CommitEntry) -> None:
        self.entries.append(closed.entry)
        self.records.append(closed.records)
        self.products.append(closed.products)
        self.judgements += closed.judgements
        taken = {(record.version, record.node) for record in closed.records}
        oldest = len(self.entries) - self.settings.max_staleness
        self.updates[:] = [
            record for record in self.updates if record.version >= oldest and (record.version, record.node) not in taken
        ]

    def _server_effect(self, effect: e.ServerEffect) -> None:
        match effect:
            case e.CommitSlot(node, slot):
                given = (len(self.entries), node, slot)
                self._commit(partial(self.slots.append, given), lambda: e.SlotCommitted(self.now, node))
            case e.CommitUpdate(record):
                self._commit(partial(self.updates.append, record), lambda: e.UpdatesCommitted(self.now, (record,)))
            case e.MeasureDirections(version, lanes, steps):
                products = inner_products(
                    self._mask.g_p, self.settings.run_id, version, lanes=lanes, steps=steps, stream=self.stream
                )
                self.at(self.now, self._in_term(lambda: e.DirectionsMeasured(self.now, version, products)))
            case e.FetchValues():
                self._fetch(effect)
            case e.JudgeRound(term, version, judge):
                outcome = judge()
                self.at(self.now, self._in_term(lambda: e.RoundJudged(self.now, term, version, outcome)))
            case e.ApplyTerms(version, terms, shares):
                added = self.displacements.mean(shares)
                after = self.replica.apply(terms, self.displacements.get(added))
                self.at(self.now, self._in_term(lambda: e.TermsApplied(self.now, version, after, added)))
            case e.CommitEntry(entry, records):
                keep = partial(self._keep_entry, effect)
                self._commit(keep, lambda: e.EntryCommitted(self.now, entry.version, records))
            case e.PublishRound(frame):
                self._retained = frame
                self._send(SERVER, frame, *self.nodes)
            case e.Reply(name, reply):
                self._send(SERVER, reply, name)
            case e.SendEntries(name, first):
                header = self._retained.header if self._retained else None
                if header is not None and self.entries[first:]:
                    self._send(SERVER, Entries(header, tuple(self.entries[first : first + 1000])), name)
            case _:
                self._take_note(effect)

    def _take_note(self, effect: e.ServerEffect) -> None:
        match effect:
            case e.Count(reason, name):
                self.counts[name or SERVER, reason] += 1
            case e.End(error):
                self.errors.append((SERVER, error))

    def _fetch(self, effect: e.FetchValues) -> None:
        """The displacement comes where neither the question nor the answer is lost."""
        values, node = effect.update.values, self.nodes[effect.node]
        assert values is not None
        want = Want(effect.update.header, effect.update.boot, blob=values.blob, chunks=(0,))
        arrives = self.deliver(SERVER, node.name, want) and self.deliver(node.name, SERVER, effect.update)
        if arrives and node.alive and node.held is None and values.blob in self.displacements.arrays:
            verdict = on_arrival((self.displacements.largest(values.blob),), effect.update.loss, 1.0)
            came = self._in_term(lambda: e.ValuesCame(self.now, effect.node, effect.update, verdict))
            self.at(self.now + FETCH_S, came)
        else:
            missed = self._in_term(lambda: e.ValuesMissed(self.now, effect.node, effect.update))
            self.at(self.now + MISSED_S, missed)

    # --- a node's effects ---

    def _to(self, node: MemoryNode, boot: int, event: e.NodeEvent) -> None:
        if not node.alive or node.boot != boot:
            return
        if node.held is not None:
            node.held.append(event)
        else:
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
                self._send(node.name, frame, SERVER)
            case e.ApplyEntries(entries):
                digests = tuple(node.replica.apply(entry.terms, self.displacements.of(entry)) for entry in entries)
                self.at(self.now, lambda: self._to(node, boot, e.EntriesApplied(self.now, entries, digests)))
            case e.ResetTheta():
                node.replica.reset()
            case e.StartSteps():
                self.at(node.walk_from(effect, self.now), partial(self._walked, node, boot, node.walk))
            case e.StopSteps():
                self.at(node.stop(self.now), partial(self._walked, node, boot, node.walk))
            case e.Forget(version, was_heard):
                node.forget(version, was_heard)
            case e.Count(reason, _):
                self.counts[node.name, reason] += 1
            case e.End(error):
                self.errors.append((node.name, error))
                node.alive = False

    def _walked(self, node: MemoryNode, boot: int, walk: Walk | None) -> None:
        """The time that local steps take is over; theta is what it was when they began."""
        if walk is None or not node.alive or node.boot != boot or node.walk is not walk:
            return
        task, _, made = walk
        node.walk, values = None, None
        scalars: tuple[float, ...] = ()
        if node.values is None:
            scalars, loss = self._walk(node, task.version, task.lane, made, task.eps)
        else:
            blob, loss = node.displace(self.settings.run_id, task.version, made)
            kept = self.displacements.keep(blob)
            values = Values(kept.blob, kept.size, made)
        node.steps_done += task.steps - made
        self._to(node, boot, e.StepsDone(self.now, task.version, scalars, loss, values))

    def _walk(
        self, node: MemoryNode, version: int, lane: int, steps: int, eps: float
    ) -> tuple[tuple[float, ...], float]:  # fmt: skip
        return node.path(self.settings, version, lane, steps, eps, stream=self.stream, draw=self._draw)

    # --- the transport ---

    def _status(self, node: MemoryNode, status: str, delay: float = 0.001) -> None:
        message = node.status(status)
        self.at(self.now + delay, lambda: self._to_server(e.StatusCame(self.now, node.name, message)))

    def _send(self, sender: str, frame: Frame, *receivers: str) -> None:
        arrived: Any = decode(encode(frame))
        for receiver in receivers:
            for delay in self.deliver(sender, receiver, frame):
                if receiver == SERVER:
                    self.at(self.now + delay, partial(self._receive, sender, arrived))
                else:
                    self._to_node(self.nodes[receiver], partial(e.FrameCame, frame=arrived), delay)

    def _receive(self, sender: str, frame: Update | Want) -> None:
        match frame:
            case Update():
                self._to_server(e.UpdateCame(self.now, sender, frame))
            case Want():
                self._to_server(e.WantCame(self.now, sender, frame))

    def _to_node(self, node: MemoryNode, event: Callable[[float], e.NodeEvent], delay: float = 0.001) -> None:
        boot = node.boot
        self.at(self.now + delay, lambda: self._to(node, boot, event(self.now)))

    def _schedule_wake(self, name: str, wake_at: float | None, tick: Callable[[], None]) -> None:
        if wake_at is not None and self._wake.get(name) != wake_at:
            self._wake[name] = wake_at
            self.at(max(wake_at, self.now), tick)
