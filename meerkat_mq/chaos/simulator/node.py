"""A node process: its machine, and the service around it, on a virtual clock."""

import struct
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from meerkat_mq.chaos.history import History
from meerkat_mq.chaos.simulator.broker import Broker, Client, Message, Topic
from meerkat_mq.chaos.simulator.durable import Theta
from meerkat_mq.chaos.simulator.world import Clock, Process
from meerkat_mq.core.path import NO_DIGEST, digest_due
from meerkat_mq.errors import WireError
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.messages import Chunk, Header, Update, Want
from meerkat_mq.wire.snapshot import decode_snapshot

FETCH_S = 2.0


class Node(Process):
    """One node; each life has a boot of its own, and begins at theta_0."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        broker: Broker,
        history: History,
        theta_0: Theta,
        *,
        latency_s: float,
        step_s: float,
        rows: int,
        fickle: bool,
    ) -> None:
        super().__init__(name, clock)
        self.boot = 0
        self.theta = self._theta_0 = theta_0
        self.machine: NodeMachine
        self._broker = broker
        self._history = history
        self._latency_s = latency_s
        self._step_s = step_s
        self._rows = rows
        self._fickle = fickle
        self._answers: deque[e.NodeEvent] = deque()
        self._fetch: e.FetchSnapshot | None = None
        self.healed: Callable[[], None] | None = None
        self.client = self._session()

    def _session(self) -> Client:
        return Client(
            hears=lambda topic: topic[0] in ("server", "round") or topic == ("reply", self.name),
            deliver=lambda topic, payload: self.call(self._on_message, topic, payload),
            greeted=lambda link: self.call(self._handle, e.Connected(self.clock.now)),
            will=lambda link: Message(("status", self.name), self._status("lost", link), retain=True),
            latency_s=self._latency_s,
        )

    # --- life ---

    def start(self) -> None:
        """Begin at theta_0, under another boot."""
        super().start()
        self.boot += 1
        self._reset()
        self._answers.clear()
        self._fetch = None
        settings = self._history.settings
        self.machine = NodeMachine(
            run_id=settings.run_id,
            mask_hash=settings.mask_hash,
            base=self._theta_0.digest,
            boot=self.boot,
            now=self.clock.now,
        )
        self.client = self._session()
        self._broker.join(self.client)

    def kill(self) -> None:
        """End: the broker publishes the will, after the keep-alive if need be."""
        super().kill()
        self._broker.leave(self.client, will_s=self.clock.random.choice((0.0, 0.0, 1.0)))

    def leave(self) -> None:
        """End in order."""
        Process.kill(self)
        farewell = Message(("status", self.name), self._status("stopped", self.client.link), retain=True)
        self._broker.leave(self.client, farewell=farewell)

    def corrupt(self) -> None:
        """Let a bit of theta flip."""
        self.theta = Theta(self.theta.values + 1, self.theta.version)

    def _reset(self) -> None:
        self.theta = self._theta_0
        if self.healed is not None:
            self.healed()
            self.healed = None

    # --- messages ---

    def _on_message(self, topic: Topic, payload: Any) -> None:
        if topic[0] == "server":
            self._handle(e.ServerCame(self.clock.now, payload))
        elif isinstance(payload, Chunk):
            self._on_chunk(payload)
        else:
            self._handle(e.FrameCame(self.clock.now, payload))

    def _on_chunk(self, chunk: Chunk) -> None:
        fetch = self._fetch
        if fetch is None or chunk.blob != fetch.offer.blob:
            return
        try:
            found = decode_snapshot(chunk.data, fetch.offer.blob, self._theta_0.values.size)
        except WireError:
            return
        self._fetch = None
        self.theta = Theta(found.theta, found.version)
        self._handle(e.SnapshotLoaded(self.clock.now, found.version, found.head, self.theta.digest))

    def _handle(self, event: e.NodeEvent) -> None:
        """Give the machine an event, and then the answers that its effects had at once."""
        answers = self._answers
        answers.append(event)
        while answers:
            for effect in self.machine.handle(answers.popleft()):
                self.step()
                self._CARRY_OUT[type(effect)](self, effect)
        self.ring_at(self.machine.wake_at, lambda: self._handle(e.Tick(self.clock.now)))

    # --- effects ---

    def _publish_status(self, effect: e.PublishStatus) -> None:
        status = self._status("online", self.client.link)
        self._history.saw_status(self.clock.now, self.name, status)
        self._broker.publish(self.client, Message(("status", self.name), status, retain=True))

    def _send(self, effect: e.Send) -> None:
        frame = effect.frame
        if isinstance(frame, Update):
            self._history.saw_update(self.clock.now, self.name, frame)
            self._broker.publish(self.client, Message(("update", self.name), frame, retain=False))
        else:
            self._broker.publish(self.client, Message(("want", self.name), frame, retain=False))

    def _apply(self, effect: e.ApplyEntries) -> None:
        history, digests = self._history, []
        for entry in effect.entries:
            self.theta = self.theta.after(entry.terms, history.run_id, history.stream)
            due = digest_due(self.theta.version, history.digest_every)
            digests.append(self.theta.digest if due else NO_DIGEST)
        self._answers.append(e.EntriesApplied(self.clock.now, effect.entries, tuple(digests)))

    def _fetch_snapshot(self, effect: e.FetchSnapshot) -> None:
        settings, offer = self._history.settings, effect.offer
        self._fetch = effect
        header = Header.of(settings.run_id, offer.header.term, self.machine.version, settings.mask_hash)
        want = Want(header, self.boot, blob=offer.blob, chunks=(0,))
        self._broker.publish(self.client, Message(("want", self.name), want, retain=False))
        self.later(FETCH_S, self._miss, effect)

    def _miss(self, effect: e.FetchSnapshot) -> None:
        if self._fetch is effect:
            self._fetch = None
            self._handle(e.SnapshotMissed(self.clock.now, effect.offer.version))

    def _start_steps(self, effect: e.StartSteps) -> None:
        self.later(self._step_s, self._steps_done, effect)

    def _steps_done(self, effect: e.StartSteps) -> None:
        count = effect.steps * self._history.settings.perturbations
        scalars = tuple(self._scalar(effect, step) for step in range(count))
        self._handle(e.StepsDone(self.clock.now, effect.version, scalars, 1.0))

    def _scalar(self, effect: e.StartSteps, step: int) -> float:
        """A float32 that theta, round, step and node decide, and the boot where restarts answer differently."""
        boot = self.boot if self._fickle else 0
        place = struct.pack("<IHHI", effect.version, effect.lane, step, boot)
        return (zlib.crc32(place + self.name.encode(), zlib.crc32(self.theta.digest)) - 2**31 >> 8) / 2**22

    def _count(self, effect: e.Count) -> None:
        self.clock.counts[self.name, effect.reason] += 1

    def _end(self, effect: e.End) -> None:
        raise effect.error

    def _status(self, status: str, link: int) -> NodeStatus:
        version = self.machine.version
        due = self.theta.version == version and digest_due(version, self._history.digest_every)
        return NodeStatus.model_construct(
            status=status,
            boot=self.boot,
            link=link,
            host="simulator",
            run=self._history.run_id.hex(),
            rows=self._rows,
            version=version,
            digest=self.theta.digest.hex() if due else None,
        )

    _CARRY_OUT: ClassVar[dict[type, Callable[["Node", Any], None]]] = {
        e.PublishStatus: _publish_status,
        e.Send: _send,
        e.ApplyEntries: _apply,
        e.FetchSnapshot: _fetch_snapshot,
        e.ResetTheta: lambda self, effect: self._reset(),
        e.StartSteps: _start_steps,
        e.Count: _count,
        e.End: _end,
    }
