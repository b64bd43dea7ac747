"""A node: carries its machine's effects out on MQTT and in a worker thread."""

import asyncio
import secrets
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.core import metrics as m
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.engines.registry import check_named, entry_of
from meerkat_mq.errors import DataError, NodeReplaced, NotConnected, PayloadTooLarge, RunMismatch, WireError, within
from meerkat_mq.extras import need
from meerkat_mq.mqtt import Marker, Message, Presence, Session, Verdict, Will
from meerkat_mq.mqtt.alarm import Alarm
from meerkat_mq.node.blobs import Blobs
from meerkat_mq.node.duty import DutyCycle
from meerkat_mq.node.jobs import Job, Jobs, in_worker
from meerkat_mq.node.limits import Allowance
from meerkat_mq.node.mask_fetch import check_changes, check_descriptor, fetch_mask
from meerkat_mq.node.state import NodeState
from meerkat_mq.node.words import say_finished
from meerkat_mq.node.work import Work
from meerkat_mq.observe.process import Threads, peak_rss_mib
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.pulse import Pulse
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Offer, Refusal, Round, Update, Want, Welcome
from meerkat_mq.wire.topics import Topics

GRACE_S = 2.0  # an idle node waits this long for a request of the round before it sleeps


async def run_node(config: NodeConfig) -> None:
    """Run one node until cancelled; with `exit_when_finished`, until its run is finished.

    Raises:
        MeerkatError: with what to do about it.
    """
    extra = entry_of(config.engine or "transformers").extra
    if config.model is not None and extra is not None:
        need(extra, f"node {config.id}")
    if isinstance(config.data, str):
        need("datasets", config.data)
    with within("data"):
        if isinstance(config.data, Path) and not config.data.exists():
            raise DataError(
                str(config.data), "there is no such file", "name the node's rows: a JSON, CSV or TSV file, or a folder"
            )
    allowance = Allowance(config.limits)
    with NodeState(config.state_dir) as state, Threads(1, "model") as worker:
        await _Node(config, state, allowance, worker).run()


class _Node:
    def __init__(self, config: NodeConfig, state: NodeState, allowance: Allowance, worker: ThreadPoolExecutor) -> None:
        self._config = config
        self._state = state
        self._allowance = allowance
        self._worker = worker
        self._boot = secrets.randbits(32)
        self._log = structlog.get_logger().bind(node=config.id, federation=config.federation)
        self._seldom = Seldom()
        self._topics = Topics(config.federation)
        self._own_status = self._topics.up(config.id, "status")
        self._presence = Presence(self._boot)
        self._pulse = Pulse(rounds=10, slow_s=300.0)
        self._machine: NodeMachine | None = None
        self._work: Work | None = None
        self._jobs: Jobs | None = None
        self._blobs: Blobs | None = None
        self._descriptor: RunDescriptor | None = None
        self._has_mask = False
        self._news = asyncio.Event()
        self._server: ServerState | None = None
        self._round: Round | None = None
        self._counts: Counter[str] = Counter()
        self._told_finished = False
        self._finished = asyncio.Event()
        self._at_rest = False
        self._idle_since: float | None = None
        self._last_job: Job | None = None
        self._alarm = Alarm(self._wake_at, lambda: self._handle(e.Tick(self._now())))
        topics, client_id = self._topics, f"meerkat-{config.federation}-{config.id}"
        self._session = Session(
            config.broker,
            client_id,
            subscriptions=[(topic, 1) for topic in (topics.server, topics.run, topics.round, topics.reply(config.id))],
            on_message=self._on_message,
            on_connected=self._on_connected,
            on_disconnected=lambda reason: self._presence.disconnected(),
            will=lambda link: Will(self._own_status, self._status("lost", link).encode()),
            farewell=lambda link: Will(self._own_status, self._farewell(link).encode()),
            kind_of=lambda topic: topic.removeprefix(f"{topics.root}/").removeprefix(f"up/{config.id}/").split("/")[0],
            name=config.id,
            marker=Marker(config.state_dir, config.broker, client_id),
        )
        self._duty = (
            None
            if config.schedule is None
            else DutyCycle(
                config.schedule,
                self._session,
                may_sleep=self._may_sleep,
                on_waking=self._on_waking,
                on_sleep=self._presence.disconnected,
            )
        )

    async def run(self) -> None:
        attendance = self._session if self._duty is None else self._duty
        async with asyncio.TaskGroup() as tasks:
            parts = (attendance.run(), self._alarm.run(), self._follow_runs())
            work = [tasks.create_task(part) for part in parts]
            try:
                if not self._config.exit_when_finished:
                    await asyncio.Event().wait()
                await self._finished.wait()
            finally:
                self._stop_steps()
            for task in work:
                task.cancel()

    def _stop_steps(self) -> None:
        if self._jobs is not None:
            self._jobs.stop_steps()

    # --- runs ---

    async def _follow_runs(self) -> None:
        """Work in the run that the server describes; when it describes another, change over."""
        current: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._news.wait()
                self._news.clear()
                if current is not None:
                    current.cancel()
                    await asyncio.wait([current])
                assert self._descriptor is not None
                current = tasks.create_task(self._take_part(self._descriptor))

    async def _take_part(self, run: RunDescriptor) -> None:
        config, self._told_finished = self._config, False
        if config.uplink == "values" and not run.values:
            problem = f'is "values", but run {run.run[:8]} takes projected gradients only'
            raise RunMismatch("uplink", problem, 'set uplink = "path" here, or values.accept = true on the server')
        check_named(run.engine, config.engine)
        self._log = self._log.bind(run=run.run[:8])
        blobs, self._has_mask = Blobs(run, self._boot, self._send), False
        self._blobs = blobs
        mask = await fetch_mask(run, self._state, self._session, self._topics, blobs.begin)
        blobs.end()
        self._has_mask = True
        (self._session.subscribe if run.values else self._session.unsubscribe)(self._topics.values)
        work = self._work = await in_worker(self._worker, Work, config, run, mask, self._state)
        kept = await asyncio.to_thread(self._state.load_update, run)
        self._log.info(
            "ready", weights=mask.size, rows=len(work.rows), left_out=work.left_out, peak_rss_mib=peak_rss_mib()
        )
        jobs = self._jobs = Jobs(
            run,
            work,
            blobs,
            self._state,
            keeps=run.mode == "buffered" or config.schedule is not None,
            kept=kept,
            allowance=self._allowance,
            worker=self._worker,
            tell=self._on_job_done,
            send=self._send,
        )
        self._machine = NodeMachine(
            run_id=run.run_id,
            mask_hash=run.mask_hash,
            base=work.digest,
            boot=self._boot,
            now=self._now(),
            max_staleness=run.max_staleness,
            pending=kept.update if kept is not None else None,
        )
        if self._server is not None:
            self._handle(e.ServerCame(self._now(), self._server))
        if self._session.link is not None:
            self._handle(e.Connected(self._now()))
        if self._round is not None:
            self._handle(e.FrameCame(self._now(), self._round))
        await jobs.run()

    def _on_job_done(self, answer: e.NodeEvent | None) -> None:
        if answer is not None:
            self._handle(answer)
        elif self._duty is not None:
            self._duty.changed()

    def _send(self, frame: Update | Want | Chunk) -> None:
        wants = isinstance(frame, Want)
        if wants and self._session.link is None:
            return  # it will be asked on the next connection; meanwhile, questions would pile up
        topic = self._topics.up(self._config.id, "want" if wants else "update")
        try:
            self._session.publish(topic, encode(frame))
        except (NotConnected, PayloadTooLarge) as error:  # an update goes out again, a want is asked again
            kind = type(frame).__name__
            self._counts[m.NOT_SENT.of(kind)] += 1
            self._seldom.say(self._log.warning, "not sent", kind, type(error).__name__, frame=kind, problem=str(error))

    # --- the duty cycle ---

    def _may_sleep(self, late: bool) -> bool:
        jobs, blobs = self._jobs, self._blobs
        if jobs is None:
            return late and (blobs is None or not blobs.arriving)
        if not late:
            return self._is_idle(jobs) or (self._at_rest and not jobs.busy and not self._is_behind)
        job = jobs.catching_up
        self._last_job = self._last_job or job  # only this one: catching up with every later one would never end
        return job is None or job is not self._last_job

    @property
    def _is_behind(self) -> bool:
        """Whether the newest round is of a later version than this node's."""
        frame, machine = self._round, self._machine
        return frame is not None and machine is not None and frame.header.version > machine.version

    def _is_idle(self, jobs: Jobs) -> bool:
        """Whether, for a while, the node has been up to date, and the newest round has not asked anything of it."""
        frame, machine = self._round, self._machine
        if jobs.busy or frame is None or machine is None or machine.slot is None:
            self._idle_since = None
        else:
            asked = frame.is_open and machine.slot in frame.asked - frame.heard
            since = self._now() if self._idle_since is None else self._idle_since
            self._idle_since = None if asked or frame.header.version != machine.version else since
        return self._idle_since is not None and self._now() >= self._idle_since + GRACE_S

    def _on_waking(self) -> None:
        self._at_rest, self._idle_since, self._last_job = False, None, None
        self._round = None  # the broker has it, or a newer one
        self._alarm.changed()

    def _wake_at(self) -> float | None:
        asleep = self._duty is not None and self._duty.wakes_in_s is not None
        return None if asleep or self._machine is None else self._machine.wake_at

    # --- connection and status ---

    def _on_connected(self, link: int) -> None:
        self._presence.connected(link)
        if self._duty is not None:
            self._duty.changed()
            if self._duty.parting:
                return
        if self._blobs is not None:
            self._blobs.ask_again()
        if self._machine is None:
            self._publish_status("starting")
            if self._descriptor is None:
                self._seldom.say(self._log.info, "waiting for a server")
        else:
            self._handle(e.Connected(self._now()))

    def _publish_status(self, status: str) -> None:
        if self._session.link is not None:
            payload = self._status(status, self._session.link).encode()
            self._session.publish(self._own_status, payload, retain=True)
            self._pulse.said(self._machine.version if self._machine else 0, self._now())

    def _farewell(self, link: int) -> NodeStatus:
        wakes_in_s = self._duty.wakes_in_s if self._duty is not None else None
        return self._status("stopped" if wakes_in_s is None else "asleep", link, wakes_in_s)

    def _status(self, status: str, link: int, wakes_in_s: int | None = None) -> NodeStatus:
        machine, work = self._machine, self._work
        return NodeStatus.model_validate(
            {
                "status": status,
                "boot": self._boot,
                "link": link,
                "host": socket.gethostname(),
                "run": self._descriptor.run if self._descriptor else None,
                "rows": len(work.rows) if work else 0,
                "version": machine.version if machine else 0,
                "digest": work.digest.hex() if work else None,
                "wakes_in_s": wakes_in_s,
            }
        )

    # --- messages ---

    def _on_message(self, message: Message) -> None:
        if self._duty is not None and self._duty.parting:
            return
        try:
            if message.topic == self._own_status:
                self._on_own_status(message)
            elif message.topic == self._topics.server:
                self._on_server(decode_control(message.payload, ServerState))
            elif message.topic == self._topics.run:
                self._on_descriptor(decode_control(message.payload, RunDescriptor))
            elif message.payload:
                self._on_frame(message)
        except WireError as error:
            self._counts[m.UNDECODABLE.of(type(error).__name__)] += 1
            key, said = (message.topic, type(error).__name__), {"topic": message.topic, "problem": str(error)}
            self._seldom.say(self._log.warning, "message dropped", *key, **said)

    def _on_own_status(self, message: Message) -> None:
        try:
            status = decode_control(message.payload, NodeStatus)
        except WireError:
            status = None
        verdict = self._presence.judge(
            status.boot if status else None,
            status.link if status else 0,
            online=status is not None and status.status in ("starting", "online"),
            retained=message.retained,
        )
        if verdict is Verdict.REPLACED:
            self._session.disown()
            host = status.host if status else "unknown"
            raise NodeReplaced(
                self._own_status,
                f"another process with this id runs on host {host}",
                "give each node an id of its own; once the other one is stopped, start this one again",
            )
        if verdict is Verdict.OVERWRITTEN:
            self._publish_status("online" if self._machine else "starting")

    def _on_server(self, state: ServerState) -> None:
        before, self._server = self._server, state
        anew = state.connected and (before is None or before.link != state.link)
        if anew and self._blobs is not None:
            self._blobs.ask_again()
        self._handle(e.ServerCame(self._now(), state))

    def _on_descriptor(self, descriptor: RunDescriptor) -> None:
        known = self._descriptor
        if descriptor == known:
            return
        check_descriptor(descriptor, self._config.federation)
        if known is not None and descriptor.run == known.run:
            check_changes(known, descriptor)
            self._descriptor = descriptor
            if not self._has_mask:
                self._news.set()  # its chunks may have another name and size now
            return
        self._descriptor = descriptor
        self._stop_steps()
        self._machine = self._work = self._jobs = None  # at once: what comes next is of the new run
        if self._round is not None and self._round.header.run != int.from_bytes(descriptor.run_id[:4], "little"):
            self._round = None  # else it overtook its run's descriptor: some brokers keep no order among topics
        self._news.set()

    def _on_frame(self, message: Message) -> None:
        reply = self._topics.reply(self._config.id)
        match decode(message.payload):
            case Round() as frame if message.topic == self._topics.round:
                before, self._round = self._round, frame
                self._handle(e.FrameCame(self._now(), frame))
                if self._jobs is not None and self._is_behind:
                    self._jobs.move_on()
                if before is not None and frame.header.version > before.header.version and not message.retained:
                    self._expect_displacement(frame)
            case (Welcome() | Entries() | Offer() | Refusal()) as frame if message.topic == reply:
                self._handle(e.FrameCame(self._now(), frame))
            case Chunk() as chunk if self._blobs is not None:
                (self._blobs.take_pushed if message.topic == self._topics.values else self._blobs.take)(chunk)
            case Want() as want if message.topic == reply and self._blobs is not None:
                self._blobs.answer(want)
            case frame:
                topic, kind = message.topic, type(frame).__name__
                self._counts[m.MISPLACED.of(kind)] += 1
                self._seldom.say(self._log.warning, "frame out of place", topic, kind, topic=topic, frame=kind)

    def _expect_displacement(self, frame: Round) -> None:
        """To a round that was opened just now, the server sends its newest entry's displacement after it."""
        newest = frame.entries[-1].displacement if frame.entries else None
        if newest is not None and self._blobs is not None:
            self._blobs.expect(newest)

    # --- events and effects ---

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _handle(self, event: e.NodeEvent) -> None:
        if self._machine is None or self._jobs is None:
            return
        effects = self._machine.handle(event)
        if isinstance(event, e.EntriesApplied) and self._pulse.due(self._machine.version, event.now):
            self._publish_status("online")  # now, while version and digest belong together
        for effect in effects:
            self._carry_out(effect, self._jobs)
        self._finish_if_due(self._machine)
        self._alarm.changed()
        if self._duty is not None:
            self._duty.changed()

    def _carry_out(self, effect: e.NodeEffect, jobs: Jobs) -> None:
        match effect:
            case e.PublishStatus():
                self._publish_status("online")
            case e.Send(Update() as update):
                jobs.put(update)
            case e.Send(Want() as want):
                self._send(want)
            case e.ApplyEntries() | e.FetchSnapshot() | e.ResetTheta() | e.StartSteps() | e.Forget():
                if isinstance(effect, e.ResetTheta) and self._work is not None:
                    self._work.digest = self._work.theta_0_digest  # the version that it says is 0 from now on
                if isinstance(effect, e.StartSteps | e.Forget):
                    self._at_rest = isinstance(effect, e.Forget) and effect.heard
                jobs.put(effect)
            case e.StopSteps():
                jobs.stop_steps()
            case e.Count(reason):
                self._counts[reason] += 1
                self._seldom.say(self._log.info, reason, round=effect.round)
            case e.End(error):
                raise error

    def _finish_if_due(self, machine: NodeMachine) -> None:
        if self._descriptor is None or machine.version != self._descriptor.rounds or self._told_finished:
            return
        self._told_finished = self._at_rest = True
        self._publish_status("online")
        digest = self._work.digest.hex() if self._work else None
        say_finished(self._log, self._session, self._counts, version=machine.version, digest=digest)
        self._finished.set()
