"""The node's driver: carries each effect of the node machine out, in exactly one place.

It follows the run that the server describes: gets its mask, has the model made, and gives both to a machine
(rounds/node.py) and to the jobs that take time (jobs.py). When the server describes another run, all of it is made
anew. The driver holds what belongs to this process and to no run: its boot and link, what stands on its status topic,
the newest state of the server and the newest round.
"""

import socket
from collections import Counter
from collections.abc import Callable
from typing import assert_never

import structlog

from meerkat_mq.core import metrics as m
from meerkat_mq.core.path import digest
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import NodeReplaced, NotConnected, PayloadTooLarge, WireError
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.presence import Ownership, Presence, Pulse
from meerkat_mq.runtime.abstention import Abstention
from meerkat_mq.runtime.blobs import Blobs
from meerkat_mq.runtime.jobs import Jobs, Rest, is_behind
from meerkat_mq.runtime.join import LostDescriptor, check_changes, check_descriptor, check_profile, describes, get_mask
from meerkat_mq.runtime.model import KeptUpdate, MakeModel, Model, NodeMonitor, NodeProfile, NodeStore, StepCompute
from meerkat_mq.runtime.policy import DEFAULTS, NodePolicy
from meerkat_mq.runtime.ports import Clock, Transport
from meerkat_mq.runtime.steps import Alarm, Sequence, Steps, work
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Frame, Offer, Refusal, Round, Update, Want, Welcome
from meerkat_mq.wire.topics import Topics


class NodeDriver:
    """One node process. Its transport is subscribed to the server, run and round topics and to its own replies.

    Args:
        boot: random u32, one a process.
        store: what it keeps between starts.
        make_model: makes the model of a run; blocks, and is called by the worker.
        policy: what the node's owner lets a server ask of it.

    Attributes:
        counts: everything counted, by reason.
        machine: of the present run; None while there is none.
        presence: says whose the node's status topic is.
    """

    def __init__(
        self,
        profile: NodeProfile,
        boot: int,
        *,
        transport: Transport,
        store: NodeStore,
        compute: StepCompute,
        clock: Clock,
        make_model: MakeModel,
        monitor: NodeMonitor,
        read: Callable[[bytes], Frame] = decode,
        policy: NodePolicy = DEFAULTS,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.machine: NodeMachine | None = None
        self.presence = Presence(boot)
        self._profile = profile
        self._boot = boot
        self._transport = transport
        self._store = store
        self._compute = compute
        self._clock = clock
        self._make_model = make_model
        self._monitor = monitor
        self._log = structlog.get_logger().bind(node=profile.name, federation=profile.federation)
        self._read = read
        self._seldom = Seldom()
        self._topics = Topics(profile.federation)
        self._own_status = self._topics.up(profile.name, "status")
        self._pulse = Pulse(rounds=10, slow_s=300.0)
        self._descriptor: RunDescriptor | None = None
        self._joining: Sequence[Exception | None] | None = None
        self._has_mask = False
        self._jobs: Jobs | None = None
        self._blobs: Blobs | None = None
        self._model: Model | None = None
        self._server: ServerState | None = None
        self._round: Round | None = None
        self._alarm = Alarm(clock, lambda: self._handle(e.Tick(clock.now())))
        self._told_finished = False
        self._asleep = False
        self._rest = Rest()
        self._lost = LostDescriptor(transport, clock)
        self._policy = policy
        self._abstains = Abstention(
            clock, self.counts, store, compute, tell=self._say_status, leave=self._leave, rejoin=self._rejoin
        )

    def stop(self) -> None:
        """The process ends: end local steps soon."""
        if self._jobs is not None:
            self._jobs.stop_steps()

    # --- connections and status ---

    def connected(self, link: int) -> None:
        """A connection stands, and what was retained on the status topic has been received."""
        self.presence.connected(link)
        if self._blobs is not None:
            self._blobs.ask_again()
        if self.machine is None:
            self._publish_status("starting")
            if self._descriptor is None:
                self._seldom.say(self._log.info, "waiting for a server")
        else:
            self._handle(e.Connected(self._clock.now()))

    def disconnected(self) -> None:
        """The connection is gone."""
        self.presence.disconnected()

    def _publish_status(self, status: str) -> None:
        if self._transport.link is not None and not self._asleep:  # else it would take the place of "asleep"
            payload = self.status(status, self._transport.link).encode()
            self._publish(self._own_status, payload, "NodeStatus", retain=True)
            self._pulse.said(self.machine.version if self.machine else 0, self._clock.now())

    def _say_status(self) -> None:
        self._publish_status("online" if self.machine else "starting")

    def status(self, status: str, link: int, wakes_in_s: int | None = None) -> NodeStatus:
        """What the status topic says of this process, or the broker in its name."""
        refuses = self._abstains.words if status in ("starting", "online") else None
        return NodeStatus.model_validate(
            {
                "status": status if refuses is None else "starting",
                "boot": self._boot,
                "link": link,
                "host": socket.gethostname(),
                "run": self._descriptor.run if self._descriptor else None,
                "rows": self._model.rows if self._model is not None else 0,
                "version": self.machine.version if self.machine else 0,
                "digest": self._jobs.digest_at(self.machine.version).hex() if self._jobs and self.machine else None,
                "wakes_in_s": wakes_in_s,
                "refuses": refuses,
                "signal": self._model.signal if self._model is not None else None,
            }
        )

    def _publish(self, topic: str, payload: bytes, kind: str, *, retain: bool = False) -> None:
        """Publish, or drop and count what the session does not take: updates go out again, wants are asked again."""
        try:
            self._transport.publish(topic, payload, retain=retain)
        except (NotConnected, PayloadTooLarge) as error:
            self.counts[m.NOT_SENT.of(kind)] += 1
            self._seldom.say(self._log.warning, "not sent", kind, type(error).__name__, frame=kind, problem=str(error))

    def _send(self, frame: Update | Want | Chunk) -> None:
        wants = isinstance(frame, Want)
        if wants and self._transport.link is None:
            return  # it will be asked on the next connection; meanwhile, questions would pile up
        topic = self._topics.up(self._profile.name, "want" if wants else "update")
        self._publish(topic, encode(frame), type(frame).__name__)

    # --- messages ---

    def received(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """A message came; raises NodeReplaced where a newer process uses this id."""
        try:
            if topic == self._own_status:
                self._on_own_status(payload, retained=retained)
            elif topic == self._topics.server:
                self._on_server(decode_control(payload, ServerState))
            elif topic == self._topics.run:
                self._on_descriptor(decode_control(payload, RunDescriptor))
            elif payload:
                self._on_frame(topic, payload, retained=retained)
        except WireError as error:
            self.counts[m.UNDECODABLE.of(type(error).__name__)] += 1
            key, said = (topic, type(error).__name__), {"topic": topic, "problem": str(error)}
            self._seldom.say(self._log.warning, "message dropped", *key, **said)

    def _on_own_status(self, payload: bytes, *, retained: bool) -> None:
        try:
            status = decode_control(payload, NodeStatus)
        except WireError:
            status = None
        owner = self.presence.judge(
            status.boot if status else None,
            status.link if status else 0,
            online=status is not None and status.status in ("starting", "online"),
            retained=retained,
        )
        if owner is Ownership.REPLACED:
            self._transport.disown()
            problem = f"another process with this id runs on host {status.host if status else 'unknown'}"
            remedy = "give each node an id of its own; once the other one is stopped, start this one again"
            raise NodeReplaced(self._own_status, problem, remedy)
        if owner is Ownership.OVERWRITTEN:
            self._say_status()

    def _on_server(self, state: ServerState) -> None:
        before, self._server = self._server, state
        anew = state.connected and (before is None or before.link != state.link)
        if anew and self._blobs is not None:
            self._blobs.ask_again()
        self._handle(e.ServerCame(self._clock.now(), state))

    def _on_descriptor(self, descriptor: RunDescriptor) -> None:
        known = self._descriptor
        if descriptor == known:
            return
        check_descriptor(descriptor, self._profile.federation)
        if known is not None and descriptor.run == known.run:
            check_changes(known, descriptor)
            self._descriptor = descriptor
            if not self._has_mask:
                self._rejoin()  # its chunks may have another name and size now
            return
        self._descriptor = descriptor
        if self._round is not None and not describes(descriptor, self._round):
            self._round = None  # else it overtook its run's descriptor: some brokers keep no order among topics
        self._rejoin()

    def _on_frame(self, topic: str, payload: bytes, *, retained: bool) -> None:
        reply, frame = self._topics.reply(self._profile.name), self._read(payload)
        match frame:
            case Round() if topic == self._topics.round:
                self._on_round(frame, retained=retained)
            case Welcome() | Entries() | Offer() | Refusal() if topic == reply:
                self._handle(e.FrameCame(self._clock.now(), frame))
            case Chunk() if self._blobs is not None:
                (self._blobs.take_pushed if topic == self._topics.values else self._blobs.take)(frame)
            case Want() if topic == reply and self._blobs is not None:
                self._blobs.answer(frame)
            case _:
                kind = type(frame).__name__
                self.counts[m.MISPLACED.of(kind)] += 1
                self._seldom.say(self._log.warning, "frame out of place", topic, kind, topic=topic, frame=kind)

    def _on_round(self, frame: Round, *, retained: bool) -> None:
        before, self._round = self._round, frame
        self._lost.round_came(frame, self._descriptor)
        self._handle(e.FrameCame(self._clock.now(), frame))
        if self.machine is not None and self._jobs is not None and is_behind(frame, self.machine):
            self._jobs.move_on()
        is_new = before is not None and frame.header.version > before.header.version and not retained
        newest = frame.entries[-1].displacement if frame.entries else None
        if is_new and newest is not None and self._blobs is not None:
            self._blobs.expect(newest)  # the server sends it after the round that it has just opened

    # --- runs ---

    def _rejoin(self) -> None:
        """At once: whatever comes next is of the run that was described last."""
        self._leave()
        self._abstains.forget()
        if self._descriptor is not None:
            self._joining = self._abstains.attempt(self._join(self._descriptor))

    def _leave(self) -> None:
        if self._joining is not None:
            self._joining.cancel()
        if self._jobs is not None:
            self._jobs.close()
        self.machine = self._jobs = self._model = None
        self._has_mask = False
        self._set_alarm()

    def _join(self, run: RunDescriptor) -> Steps[None]:
        """Get all that a run needs, and begin; raises what keeps this node from it."""
        self._told_finished = False
        check_profile(run, self._profile)  # before the mask is fetched, which may be large
        self._policy.check_run(run)
        self._log = self._log.bind(run=run.run[:8])
        blobs = self._blobs = Blobs(run, self._boot, self._send, self._clock)
        mask = yield from get_mask(
            run, blobs, policy=self._policy, store=self._store, compute=self._compute,
            transport=self._transport, topics=self._topics,
        )  # fmt: skip
        self._has_mask = True
        (self._transport.subscribe if run.values else self._transport.unsubscribe)(self._topics.values)
        model: Model = yield from work(self._compute, self._make_model, run, mask)
        self._policy.check_model(run, model)
        kept = yield from work(self._compute, self._store.load_update, run)
        theta_0 = yield from work(self._compute, digest, mask.theta_0)
        self._model = model
        self._monitor.ready(run, mask, model)
        self._begin(run, theta_0, model, kept)

    def _begin(self, run: RunDescriptor, theta_0: bytes, model: Model, kept: KeptUpdate | None) -> None:
        assert self._blobs is not None
        self._jobs = Jobs(
            run, model, self._blobs, self._store,
            keeps=run.mode == "buffered" or self._profile.keeps, kept=kept,
            compute=self._compute, clock=self._clock, theta_0=theta_0,
            tell=self._job_done, send=self._send,
            policy=self._policy, refused=self._abstains.refuse, failed=self._abstains.leave,
        )  # fmt: skip
        self.machine = NodeMachine(
            run_id=run.run_id,
            mask_hash=run.mask_hash,
            base=theta_0,
            boot=self._boot,
            now=self._clock.now(),
            count=run.count,
            max_staleness=run.max_staleness,
            pending=kept.update if kept is not None else None,
        )
        if self._server is not None:
            self._handle(e.ServerCame(self._clock.now(), self._server))
        if self._transport.link is not None:
            self._handle(e.Connected(self._clock.now()))
        if self._round is not None:
            self._handle(e.FrameCame(self._clock.now(), self._round))

    def _job_done(self, answer: e.NodeEvent | None) -> None:
        if answer is not None:
            self._handle(answer)
        else:
            self._monitor.changed()

    # --- sleep ---

    def may_sleep(self, late: bool) -> bool:
        """Whether the node has nothing left to do; or, if it is late, nothing that sleep must not interrupt."""
        jobs, blobs = self._jobs, self._blobs
        if jobs is None or self.machine is None:
            return late and (blobs is None or not blobs.arriving)
        return self._rest.may_sleep(late, jobs, self._round, self.machine, self._clock.now())

    def wake(self) -> None:
        """The node will be connected again."""
        self._rest = Rest()
        self._round = None  # the broker has it, or a newer one
        self._asleep = False
        self._set_alarm()

    def sleep(self) -> None:
        """The node leaves its connection on purpose, for a while; work may go on."""
        self.presence.disconnected()
        self._asleep = True
        self._set_alarm()

    # --- events and effects ---

    def _set_alarm(self) -> None:
        self._alarm.set(None if self._asleep or self.machine is None else self.machine.wake_at)

    def _handle(self, event: e.NodeEvent) -> None:
        """Tell the machine, and carry out what it asks for."""
        machine, jobs = self.machine, self._jobs
        if machine is None or jobs is None:
            return
        effects = machine.handle(event)
        if isinstance(event, e.EntriesApplied) and self._pulse.due(machine.version, event.now):
            self._publish_status("online")  # now, while version and digest belong together
        for effect in effects:
            self._carry_out(effect, jobs)
            if self.machine is not machine:
                return
        self._finish_if_due(machine, jobs)
        self._set_alarm()
        self._monitor.changed()

    def _carry_out(self, effect: e.NodeEffect, jobs: Jobs) -> None:
        match effect:
            case e.PublishStatus():
                self._publish_status("online")
            case e.Send(frame):
                if isinstance(frame, Update):
                    jobs.put(frame)
                else:
                    self._send(frame)
            case e.ApplyEntries() | e.FetchSnapshot() | e.ResetTheta():
                jobs.put(effect)
            case e.StartSteps() | e.Forget():
                self._rest.nothing_left = isinstance(effect, e.Forget) and effect.heard
                if self._rest.nothing_left:
                    self._abstains.worked()
                jobs.put(effect)
            case e.StopSteps():
                jobs.stop_steps()
            case e.Count(reason):
                self.counts[reason] += 1
                self._seldom.say(self._log.info, reason, round=effect.round)
            case e.End(error):
                self._abstains.leave(error)
            case _:
                assert_never(effect)

    def _finish_if_due(self, machine: NodeMachine, jobs: Jobs) -> None:
        if self._descriptor is None or machine.version != self._descriptor.count or self._told_finished:
            return
        self._told_finished = self._rest.nothing_left = True
        self._publish_status("online")
        self._monitor.finished(machine.version, jobs.digest_at(machine.version))
