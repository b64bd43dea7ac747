"""A server process: its machine, and the service around it, on a virtual clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from meerkat_mq.core.path import NO_DIGEST, Displacement, Entry, digest_due, short_hash
from meerkat_mq.core.values import mean_displacement
from meerkat_mq.errors import WireError
from meerkat_mq.ledger.displacement import verdict_on
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import Judgement, Share, UpdateRecord
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.simulate.broker import Broker, Client, Message, Topic
from meerkat_mq.simulate.durable import Disk, Theta, measured
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.world import Clock, Process
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Update, Want
from meerkat_mq.wire.snapshot import decode_snapshot, encode_snapshot
from meerkat_mq.wire.values import decode_values, encode_values

STATE: Topic = ("server", "")
ROUND: Topic = ("round", "")
VALUES: Topic = ("values", "")
LATENCY_S = 0.004
ENTRIES_A_REPLY = 12
WORTH_A_SNAPSHOT = 8  # entries missed
FETCH_S = 2.0


@dataclass(frozen=True, slots=True)
class KeepValues:
    """Keep a displacement that a node announced."""

    order: e.FetchValues
    blob: bytes


class Server(Process):
    """One server process; several may share a disk."""

    def __init__(
        self,
        server_id: str,
        clock: Clock,
        broker: Broker,
        history: History,
        *,
        disk: Disk,
        theta_0: Theta,
        commit_s: float,
        measure_s: float,
    ) -> None:
        super().__init__("server", clock)
        self.server_id = server_id
        self.disk = disk
        self.machine: ServerMachine | None = None
        self._broker = broker
        self._history = history
        self._theta_0 = self._theta = theta_0
        self._commit_s = commit_s
        self._measure_s = measure_s
        self._mine = (0, server_id)
        self._rival: ServerState | None = None
        self._statuses: dict[str, NodeStatus] = {}
        self._queue: list[Any] = []
        self._writing = False
        self._fetches: dict[str, e.FetchValues] = {}
        self.client = Client(
            hears=lambda topic: topic[0] in ("server", "status", "update", "want"),
            deliver=lambda topic, payload: self.call(self._on_message, topic, payload),
            greeted=lambda link: self.call(self._on_connected),
            will=lambda link: Message(STATE, self._state("lost", link), retain=True),
            latency_s=LATENCY_S,
        )

    # --- life ---

    def start(self) -> None:
        """Begin: what the disk holds is read once a connection stands."""
        super().start()
        self._broker.join(self.client)

    def kill(self) -> None:
        """End: the broker publishes the will."""
        super().kill()
        self._broker.leave(self.client)

    def _on_connected(self) -> None:
        if self.machine is None:
            self._take_charge(self._rival.term if self._rival else 0)
        assert self.machine is not None
        self._publish_state()
        self._perform(self.machine.start(self.clock.now))
        for node, status in list(self._statuses.items()):
            self._handle(e.StatusCame(self.clock.now, node, status))

    def _take_charge(self, above: int) -> None:
        """Take a term, and resume from the ledger."""
        ledger, settings = self.disk.ledger, self._history.settings
        self.step()
        self._mine = (ledger.take_term(above, self.server_id), self.server_id)
        self._queue = []
        self._fetches = {}
        self.step()
        self._theta = self.resumed_theta()
        bases = ledger.bases(self._theta_0.digest)
        self.machine = ServerMachine(
            settings,
            term=self._mine[0],
            server_id=self.server_id,
            base=bases[len(ledger.entries)],
            version=len(ledger.entries),
            head=ledger.entries[-1].hash(settings.run_id) if ledger.entries else None,
            slots=ledger.slots,
            entries=ledger.entries[-64:],
            updates=self.resumed_updates(),
            past=ledger.records[-settings.guards.window :],
            judgements=self.resumed_judgements(),
            bases=bases,
            heard=ledger.heard(),
        )

    def resumed_judgements(self) -> Sequence[Judgement]:
        """All that was found of any node, oldest first."""
        return [judgement for found in self.disk.ledger.judgements for judgement in found]

    def resumed_updates(self) -> Sequence[UpdateRecord]:
        """The committed updates that no entry holds yet."""
        return list(self.disk.ledger.updates.values())

    def resumed_theta(self) -> Theta:
        """theta of the newest entry: from a snapshot that is whole, and the entries after it."""
        ledger, theta = self.disk.ledger, self._theta_0
        for version in sorted(ledger.snapshots, reverse=True):
            found = self.load_snapshot(version) if version <= len(ledger.entries) else None
            if found is not None:
                theta = found
                break
        for entry in ledger.entries[theta.version :]:
            theta = self._after(theta, entry.terms, ledger.blob_of(entry))
        return theta

    def _after(self, theta: Theta, terms: tuple[Any, ...], blob: bytes | None) -> Theta:
        return theta.after(terms, blob, self._history.run_id, self._history.stream)

    # --- snapshots ---

    def load_snapshot(self, version: int) -> Theta | None:
        """The snapshot of a version, where its file is what the ledger says."""
        blob = self.disk.files.get(f"snapshot-{version}")
        try:
            found = decode_snapshot(blob or b"", self.disk.ledger.snapshots[version], self._theta_0.values.size)
        except WireError:
            return None
        return Theta(found.theta, version)

    def keep_snapshot(self, version: int, head: bytes) -> None:
        """Write a temporary file, rename it, and only then tell the ledger."""
        blob = encode_snapshot(self._history.run_id, version, head, self._theta.values)
        files, name = self.disk.files, f"snapshot-{version}"
        files[f"{name}.tmp"] = blob[: len(blob) // 2]
        self.step()
        files[f"{name}.tmp"] = blob
        self.step()
        files[name] = files.pop(f"{name}.tmp")
        self.step()
        self.disk.ledger.commit_snapshot(self._mine, version, short_hash(blob))
        self.step()
        kept = {f"snapshot-{known}" for known in self.disk.ledger.snapshots}
        for old in files.keys() - kept:
            del files[old]

    # --- messages ---

    def _on_message(self, topic: Topic, payload: Any) -> None:
        kind, node = topic
        if kind == "status":
            self._statuses[node] = payload
            self._handle(e.StatusCame(self.clock.now, node, payload))
        elif kind == "server":
            self._on_state(payload)
        elif kind == "update" and isinstance(payload, Update):
            self._handle(e.UpdateCame(self.clock.now, node, payload))
        elif kind == "update" and isinstance(payload, Chunk):
            self._on_chunk(node, payload)
        elif kind == "want" and isinstance(payload, Want) and payload.header.run == self._header().run:
            self._handle(e.WantCame(self.clock.now, node, payload))

    def _on_state(self, state: ServerState) -> None:
        if self.machine is None:
            self._rival = state
        elif state.server_id != self.server_id or state.status == "lost":
            self._handle(e.ServerSeen(self.clock.now, state))

    def _handle(self, event: e.ServerEvent) -> None:
        if self.machine is not None:
            self._perform(self.machine.handle(event))

    # --- effects ---

    def _perform(self, effects: Sequence[e.ServerEffect]) -> None:
        machine = self.machine
        for effect in effects:
            if self.machine is not machine:
                return  # what follows a new term is of the old one
            self.step()
            self._CARRY_OUT[type(effect)](self, effect)
        if machine is not None and self.machine is machine:
            self.ring_at(machine.wake_at, lambda: self._handle(e.Tick(self.clock.now)))

    def _put(self, effect: Any) -> None:
        self._queue.append(effect)
        self._write_soon()

    def _write_soon(self) -> None:
        if not self._writing and self._queue:
            self._writing = True
            self.later(self._commit_s, self._write)

    def _write(self) -> None:
        """What waits, updates first and as one group; crash points before and after each commit."""
        waiting, self._queue, machine = self._queue, [], self.machine
        records = tuple(work.record for work in waiting if isinstance(work, e.CommitUpdate))
        if records:
            self.carry_out(
                lambda: self.disk.ledger.commit_updates(self._mine, records),
                lambda: e.UpdatesCommitted(self.clock.now, records),
            )
        for work in waiting:
            if self.machine is machine and not isinstance(work, e.CommitUpdate):
                self._work_off(work)
        self._writing = False
        self._write_soon()

    def _work_off(self, work: Any) -> None:
        ledger = self.disk.ledger
        match work:
            case e.CommitSlot(node, slot):
                self.carry_out(
                    lambda: ledger.commit_slot(self._mine, node, slot), lambda: e.SlotCommitted(self.clock.now, node)
                )
            case KeepValues():
                self._keep_values(work)
            case e.ApplyTerms(version, terms, shares):
                blob = self._mean(shares) if shares else None
                self._theta = self._after(self._theta, terms, blob)
                digest = (
                    self._theta.digest if digest_due(self._theta.version, self._history.digest_every) else NO_DIGEST
                )
                displacement = None if blob is None else Displacement(short_hash(blob), len(blob))
                self._handle(e.TermsApplied(self.clock.now, version, digest, displacement))
            case e.CommitEntry(entry, records):
                self.carry_out(
                    lambda: ledger.commit_entry(self._mine, work),
                    lambda: e.EntryCommitted(self.clock.now, entry.version, records),
                )
                self._distribute(entry)
            case e.KeepSnapshot(version, head):
                self.step()
                self.keep_snapshot(version, head)

    # --- displacements ---

    def _fetch_values(self, effect: e.FetchValues) -> None:
        values = effect.update.values
        assert values is not None
        self._fetches[effect.node] = effect
        self._reply(effect.node, Want(self._header(), effect.update.boot, blob=values.blob, chunks=(0,)))
        self.later(FETCH_S, self._miss, effect)

    def _miss(self, effect: e.FetchValues) -> None:
        if self._fetches.get(effect.node) is effect:
            self._handle(e.ValuesMissed(self.clock.now, effect.node, effect.update))

    def _on_chunk(self, node: str, chunk: Chunk) -> None:
        order = self._fetches.get(node)
        if order is not None and order.update.values is not None and order.update.values.blob == chunk.blob:
            del self._fetches[node]
            self._put(KeepValues(order, chunk.data))

    def _keep_values(self, work: KeepValues) -> None:
        """Keep it, and have its update committed at once."""
        update, node = work.order.update, work.order.node
        announced, settings = update.values, self._history.settings
        assert announced is not None
        try:
            values = decode_values(work.blob, announced.blob, self._theta.values.size)
        except WireError:
            self._handle(e.ValuesMissed(self.clock.now, node, update))
            return
        self.carry_out(
            lambda: self.disk.ledger.keep_blob(self._mine, work.blob),
            lambda: e.ValuesCame(
                self.clock.now, node, update, verdict_on(values, update.loss, settings.reach(announced.steps))
            ),
        )

    def _mean(self, shares: Sequence[Share]) -> bytes:
        """The encoded mean displacement, which is kept."""
        ledger, size = self.disk.ledger, self._theta.values.size
        parts = [(share.weight, decode_values(ledger.blobs[share.blob], share.blob, size)) for share in shares]
        blob = encode_values(mean_displacement(parts, size), self._history.codec)
        ledger.keep_blob(self._mine, blob)
        return blob

    def _distribute(self, entry: Entry) -> None:
        """The displacement of an entry that was just committed goes to everybody."""
        if (blob := self.disk.ledger.blob_of(entry)) is not None:
            chunk = Chunk(self._header(), short_hash(blob), 0, 1, len(blob), blob)
            self._broker.publish(self.client, Message(VALUES, chunk, retain=False))

    def _measure(self, effect: e.MeasureDirections) -> None:
        """Off the loop: it takes its time, and its answer may find another machine."""
        history, g_p = self._history, self._history.mask.g_p.tobytes()
        products = measured(
            g_p, history.run_id, effect.version, lanes=effect.lanes, steps=effect.steps, stream=history.stream
        )
        event = lambda: self._handle(e.DirectionsMeasured(self.clock.now, effect.version, products))  # noqa: E731
        self.later(self._measure_s, event)

    def _judge(self, effect: e.JudgeRound) -> None:
        """Off the loop, as `_measure`."""
        outcome = effect.judge()
        event = lambda: self._handle(e.RoundJudged(self.clock.now, effect.term, effect.version, outcome))  # noqa: E731
        self.later(self._commit_s, event)

    def carry_out(self, commit: Callable[[], object], event: Callable[[], e.ServerEvent]) -> None:
        """Commit first, then say so."""
        self.step()
        commit()
        self.step()
        self._handle(event())

    def _publish_state(self) -> None:
        assert self.machine is not None
        state = self._state("finished" if self.machine.finished else "online", self.client.link)
        self._history.states.append((self.clock.now, state))
        self._broker.publish(self.client, Message(STATE, state, retain=True))

    def _publish_round(self, effect: e.PublishRound) -> None:
        self._history.rounds.append((self.clock.now, effect.frame))
        self._broker.publish(self.client, Message(ROUND, effect.frame, retain=True))

    def _reply(self, node: str, frame: Any) -> None:
        self._broker.publish(self.client, Message(("reply", node), frame, retain=False))

    def _send_entries(self, effect: e.SendEntries) -> None:
        ledger, first = self.disk.ledger, effect.first
        newest = max((known for known in ledger.snapshots if known <= len(ledger.entries)), default=0)
        blob = self.disk.files.get(f"snapshot-{newest}", b"")
        if newest - first >= WORTH_A_SNAPSHOT and short_hash(blob) == ledger.snapshots[newest]:
            self._reply(effect.node, Offer(self._header(), newest, ledger.snapshots[newest], len(blob)))
        elif chosen := tuple(ledger.entries[first : first + ENTRIES_A_REPLY]):
            self._reply(effect.node, Entries(self._header(), chosen))

    def _send_chunks(self, effect: e.SendChunks) -> None:
        """Of a snapshot that the ledger names, or of an entry's displacement."""
        wanted, ledger = effect.want.blob or b"", self.disk.ledger
        found = [self.disk.files.get(f"snapshot-{v}") for v, name in ledger.snapshots.items() if name == wanted]
        if any(entry.displacement is not None and entry.displacement.blob == wanted for entry in ledger.entries):
            found.append(ledger.blobs[wanted])
        for blob in found:
            if blob is not None:
                self._reply(effect.node, Chunk(self._header(), wanted, 0, 1, len(blob), blob))

    def _count(self, effect: e.Count) -> None:
        self.clock.counts["server", effect.reason] += 1

    def _take_term(self, effect: e.TakeTerm) -> None:
        self._take_charge(effect.above)
        self._on_connected()

    def _end(self, effect: e.End) -> None:
        raise effect.error

    def _header(self) -> Header:
        settings = self._history.settings
        version = self.machine.version if self.machine else 0
        return Header.of(settings.run_id, self._mine[0], version, settings.mask_hash)

    def _state(self, status: str, link: int) -> ServerState:
        return ServerState.model_construct(
            status=status,
            run=self._history.run_id.hex(),
            term=self._mine[0],
            server_id=self.server_id,
            link=link,
            host="simulator",
            round=self.machine.version if self.machine else 0,
        )

    _CARRY_OUT: ClassVar[dict[type, Callable[["Server", Any], None]]] = {
        e.CommitSlot: _put,
        e.CommitUpdate: _put,
        e.FetchValues: _fetch_values,
        e.ApplyTerms: _put,
        e.MeasureDirections: _measure,
        e.JudgeRound: _judge,
        e.CommitEntry: _put,
        e.KeepSnapshot: _put,
        e.PublishRound: _publish_round,
        e.PublishState: lambda self, effect: self._publish_state(),
        e.Reply: lambda self, effect: self._reply(effect.node, effect.frame),
        e.SendEntries: _send_entries,
        e.SendChunks: _send_chunks,
        e.Count: _count,
        e.TakeTerm: _take_term,
        e.End: _end,
    }
