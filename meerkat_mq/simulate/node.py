"""A node process: its machine, and the service around it, on a virtual clock."""

import math
import struct
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import NO_DIGEST, digest_due, seeds_of, short_hash
from meerkat_mq.errors import WireError
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.simulate.broker import Broker, Client, Message, Topic
from meerkat_mq.simulate.durable import Theta
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.world import Clock, Process
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.messages import Chunk, Header, Update, Values, Want
from meerkat_mq.wire.snapshot import decode_snapshot
from meerkat_mq.wire.values import encode_values

FETCH_S = 2.0
AWAKE_S = 3.0  # a duty-cycled node stays no longer, unless it steps
NOT_NOW_S = 0.5
PUSHED = 8  # displacements that a node keeps unasked


@dataclass(frozen=True, slots=True)
class Habits:
    """What sets a node apart.

    Attributes:
        latency_s: of its link, one way.
        step_s: virtual seconds of a round's local steps.
        fickle: whether it answers a round otherwise after a restart.
        keeps: whether an update that was not heard outlives a crash.
        reluctant: whether its limits forbid some steps.
        codec: of a values node's displacements; None of a path node.
        every_s: from one waking to the next; 0: it is always awake.
    """

    latency_s: float
    step_s: float
    rows: int
    fickle: bool = False
    keeps: bool = False
    reluctant: bool = False
    codec: Codec | None = None
    every_s: float = 0.0


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
        habits: Habits,
    ) -> None:
        super().__init__(name, clock)
        self.boot = 0
        self.theta = self._theta_0 = theta_0
        self.machine: NodeMachine
        self._broker = broker
        self._history = history
        self._habits = habits
        self._answers: deque[e.NodeEvent] = deque()
        self._fetch: e.FetchSnapshot | None = None
        self._lacking: e.ApplyEntries | None = None
        self._pushed: dict[bytes, bytes] = {}
        self._stepping: tuple[e.StartSteps, float, int] | None = None
        self._tries = 0
        self._stepped: e.StartSteps | None = None
        self._blob = b""
        self._kept: tuple[Update, bytes] | None = None
        self._asleep = False
        self._rested = False
        self._finished = False
        self._awake_until = math.inf
        self.healed: Callable[[], None] | None = None
        self.client = self._session()

    def _session(self) -> Client:
        return Client(
            hears=lambda topic: topic[0] in ("server", "round", "values") or topic == ("reply", self.name),
            deliver=lambda topic, payload: self.call(self._on_message, topic, payload),
            greeted=lambda link: self.call(self._handle, e.Connected(self.clock.now)),
            will=lambda link: Message(("status", self.name), self._status("lost", link), retain=True),
            latency_s=self._habits.latency_s,
        )

    # --- life ---

    def start(self) -> None:
        """Begin at theta_0, under another boot."""
        super().start()
        self.boot += 1
        self._reset()
        self._answers.clear()
        self._pushed.clear()
        self._fetch = self._lacking = self._stepping = self._stepped = None
        if not self._habits.keeps:
            self._kept = None
        pending, self._blob = self._kept or (None, b"")
        settings = self._history.settings
        self.machine = NodeMachine(
            run_id=settings.run_id,
            mask_hash=settings.mask_hash,
            base=self._theta_0.digest,
            boot=self.boot,
            now=self.clock.now,
            max_staleness=settings.max_staleness,
            pending=pending,
        )
        self._wake_up()

    def _wake_up(self) -> None:
        self._asleep = self._rested = False
        self.client = self._session()
        self._broker.join(self.client)
        if self._habits.every_s:
            self._awake_until = self.clock.now + AWAKE_S
            self.later(AWAKE_S, self._sleep_if_due)

    def _sleep_if_due(self) -> None:
        """Go to sleep once the update is heard, or after a while; but not in the middle of anything."""
        busy = self._stepping is not None or self._fetch is not None or self._lacking is not None
        if busy or self._asleep or not (self._rested or self.clock.now >= self._awake_until):
            return
        self._asleep, sleeps_s = True, self._habits.every_s
        status = self._status("asleep", self.client.link, math.ceil(sleeps_s))
        self._broker.leave(self.client, farewell=Message(("status", self.name), status, retain=True))
        self.later(sleeps_s, self._wake_up)

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
        elif isinstance(payload, Want):
            self._answer(payload)
        else:
            self._handle(e.FrameCame(self.clock.now, payload))

    def _answer(self, want: Want) -> None:
        """The server asks for a displacement."""
        if self._blob and want.blob == short_hash(self._blob):
            chunk = Chunk(want.header, want.blob, 0, 1, len(self._blob), self._blob)
            self._broker.publish(self.client, Message(("update", self.name), chunk, retain=False))

    def _on_chunk(self, chunk: Chunk) -> None:
        fetch = self._fetch
        if fetch is None or chunk.blob != fetch.offer.blob:
            self._take_displacement(chunk)
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
        self._answers.append(event)
        self._work_off()

    def _work_off(self) -> None:
        answers = self._answers
        while answers:
            for effect in self.machine.handle(answers.popleft()):
                self.step()
                self._CARRY_OUT[type(effect)](self, effect)
        self.ring_at(self.machine.wake_at, self._tick)
        if self._habits.every_s:
            finished = self.machine.version >= self._history.settings.count
            self._rested |= finished and not self._finished
            self._finished = finished
            self._sleep_if_due()

    def _tick(self) -> None:
        if not self._asleep:
            self._handle(e.Tick(self.clock.now))

    # --- effects ---

    def _publish_status(self, effect: e.PublishStatus) -> None:
        status = self._status("online", self.client.link)
        self._history.saw_status(self.clock.now, self.name, status)
        self._broker.publish(self.client, Message(("status", self.name), status, retain=True))

    def _send(self, effect: e.Send) -> None:
        frame = effect.frame
        if isinstance(frame, Update):
            self._keep(frame)
            self._history.saw_update(self.clock.now, self.name, frame)
            self._broker.publish(self.client, Message(("update", self.name), frame, retain=False))
        else:
            self._broker.publish(self.client, Message(("want", self.name), frame, retain=False))

    def _keep(self, update: Update) -> None:
        """On disk, with the seeds that it was made with; the one before it goes."""
        order = self._stepped
        if (
            not self._habits.keeps
            or order is None
            or (update.boot, update.header.version) != (self.boot, order.version)
        ):
            return
        seeds = seeds_of(self._history.run_id, order.version, order.lane, len(update.scalars))
        self._kept = replace(update, seeds=None if update.values else seeds), self._blob

    def _forget(self, effect: e.Forget) -> None:
        self._rested |= effect.heard
        if self._kept is not None and self._kept[0].header.version == effect.version:
            self._kept = None

    # --- entries and snapshots ---

    def _apply(self, effect: e.ApplyEntries) -> None:
        """All of them; where a displacement lacks, none, until it comes."""
        history, theta, digests = self._history, self.theta, []
        for entry in effect.entries:
            blob = None
            if entry.displacement is not None and (blob := self._pushed.get(entry.displacement.blob)) is None:
                self._ask_for(effect, entry.displacement.blob)
                return
            theta = theta.after(entry.terms, blob, history.run_id, history.stream)
            due = digest_due(theta.version, history.digest_every)
            digests.append(theta.digest if due else NO_DIGEST)
        self.theta = theta
        self._answers.append(e.EntriesApplied(self.clock.now, effect.entries, tuple(digests)))

    def _ask_for(self, effect: e.ApplyEntries, name: bytes) -> None:
        self._lacking = effect
        self._want_blob(name)
        self.later(FETCH_S, self._miss_entries, effect)

    def _take_displacement(self, chunk: Chunk) -> None:
        if short_hash(chunk.data) != chunk.blob:
            return
        lacking, self._lacking = self._lacking, None
        while len(self._pushed) >= PUSHED and lacking is None:
            del self._pushed[next(iter(self._pushed))]
        self._pushed[chunk.blob] = chunk.data
        if lacking is not None:
            self._apply(lacking)
            self._work_off()

    def _miss_entries(self, effect: e.ApplyEntries) -> None:
        if self._lacking is effect:
            self._lacking = None
            self._handle(e.EntriesMissed(self.clock.now, effect.entries))

    def _want_blob(self, name: bytes) -> None:
        settings = self._history.settings
        header = Header.of(settings.run_id, self.machine.term, self.machine.version, settings.mask_hash)
        want = Want(header, self.boot, blob=name, chunks=(0,))
        self._broker.publish(self.client, Message(("want", self.name), want, retain=False))

    def _fetch_snapshot(self, effect: e.FetchSnapshot) -> None:
        self._fetch = effect
        self._want_blob(effect.offer.blob)
        self.later(FETCH_S, self._miss, effect)

    def _miss(self, effect: e.FetchSnapshot) -> None:
        if self._fetch is effect:
            self._fetch = None
            self._handle(e.SnapshotMissed(self.clock.now, effect.offer.version))

    # --- steps ---

    def _start_steps(self, effect: e.StartSteps) -> None:
        if self._habits.reluctant and self.clock.random.random() < 0.3:
            self.later(NOT_NOW_S, self._not_now, effect)
            return
        self._tries += 1
        self._stepping = effect, self.clock.now, self._tries
        self.later(self._habits.step_s, self._steps_done, self._tries, effect.steps)

    def _not_now(self, effect: e.StartSteps) -> None:
        self._handle(e.StepsDone(self.clock.now, effect.version, (), math.nan))

    def _stop_steps(self, effect: e.StopSteps) -> None:
        """The present step is the last one."""
        if self._stepping is None or self._stepping[0].version != effect.version:
            return
        order, began, _ = self._stepping
        each = self._habits.step_s / order.steps
        made = min(1 + int((self.clock.now - began) / each), order.steps)
        self._tries += 1
        self._stepping = order, began, self._tries
        self.later(max(began + made * each - self.clock.now, 0.0), self._steps_done, self._tries, made)

    def _steps_done(self, number: int, made: int) -> None:
        if self._stepping is None or self._stepping[2] != number:
            return
        order, self._stepping = self._stepping[0], None
        self._stepped = order
        if self._habits.codec is not None:
            self._blob = encode_values(self._displacement(order), self._habits.codec)
            values = Values(short_hash(self._blob), len(self._blob), made)
            self._handle(e.StepsDone(self.clock.now, order.version, (), 1.0, values))
            return
        count = made * self._history.settings.perturbations
        scalars = tuple(self._scalar(order, step) for step in range(count))
        self._handle(e.StepsDone(self.clock.now, order.version, scalars, 1.0))

    def _scalar(self, order: e.StartSteps, step: int) -> float:
        """A float32 that theta, round, step and node decide, and the boot where restarts answer differently."""
        boot = self.boot if self._habits.fickle else 0
        place = struct.pack("<IHHI", order.version, order.lane, step, boot)
        return (zlib.crc32(place + self.name.encode(), zlib.crc32(self.theta.digest)) - 2**31 >> 8) / 2**22

    def _displacement(self, order: e.StartSteps) -> Float32Array:
        """Likewise, float32 (n,), within ±2**-4."""
        size = self.theta.values.size
        return np.array([self._scalar(order, index) for index in range(size)], np.float32) / np.float32(32)

    def _count(self, effect: e.Count) -> None:
        self.clock.counts[self.name, effect.reason] += 1

    def _end(self, effect: e.End) -> None:
        raise effect.error

    def _status(self, status: str, link: int, wakes_in_s: int | None = None) -> NodeStatus:
        version = self.machine.version
        due = self.theta.version == version and digest_due(version, self._history.digest_every)
        return NodeStatus.model_construct(
            status=status,
            boot=self.boot,
            link=link,
            host="simulator",
            run=self._history.run_id.hex(),
            rows=self._habits.rows,
            version=version,
            digest=self.theta.digest.hex() if due else None,
            wakes_in_s=wakes_in_s,
        )

    _CARRY_OUT: ClassVar[dict[type, Callable[["Node", Any], None]]] = {
        e.PublishStatus: _publish_status,
        e.Send: _send,
        e.ApplyEntries: _apply,
        e.FetchSnapshot: _fetch_snapshot,
        e.ResetTheta: lambda self, effect: self._reset(),
        e.StartSteps: _start_steps,
        e.StopSteps: _stop_steps,
        e.Forget: _forget,
        e.Count: _count,
        e.End: _end,
    }
