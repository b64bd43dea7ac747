"""A node: carries its machine's effects out on MQTT and in a worker thread."""

import asyncio
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.errors import DataError, NodeReplaced, NotConnected, WireError, within
from meerkat_mq.mqtt import Message, Presence, Session, Verdict, Will
from meerkat_mq.node.blob_fetch import BlobFetch
from meerkat_mq.node.mask_fetch import check_descriptor, fetch_mask
from meerkat_mq.node.state import NodeState
from meerkat_mq.node.work import Work
from meerkat_mq.observe.process import peak_rss_mib
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.alarm import Alarm
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Refusal, Round, Update, Want, Welcome
from meerkat_mq.wire.topics import Topics

Args = TypeVarTuple("Args")
Result = TypeVar("Result")
Job = e.ApplyEntries | e.FetchSnapshot | e.ResetTheta | e.StartSteps

SILENCES = 5  # of a server that offered a snapshot


async def run_node(config: NodeConfig) -> None:
    """Run one node until cancelled; with `exit_when_finished`, until its run is finished.

    Raises:
        MeerkatError: with what to do about it.
    """
    with within("data"):
        if isinstance(config.data, Path) and not config.data.is_file():
            raise DataError(str(config.data), "there is no such file", "give the node its data: a JSONL file")
    with NodeState(config.state_dir) as state, ThreadPoolExecutor(1, "model") as worker:
        await _Node(config, state, worker).run()


class _Node:
    def __init__(self, config: NodeConfig, state: NodeState, worker: ThreadPoolExecutor) -> None:
        self._config = config
        self._state = state
        self._worker = worker
        self._boot = secrets.randbits(32)
        self._log = structlog.get_logger().bind(node=config.id, federation=config.federation)
        self._topics = Topics(config.federation)
        self._own_status = self._topics.up(config.id, "status")
        self._presence = Presence(self._boot)
        self._machine: NodeMachine | None = None
        self._work: Work | None = None
        self._fetch: BlobFetch | None = None
        self._descriptor: RunDescriptor | None = None
        self._news = asyncio.Event()
        self._server: ServerState | None = None
        self._round: Round | None = None
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._counts: Counter[str] = Counter()
        self._told_finished = False
        self._finished = asyncio.Event()
        self._alarm = Alarm(
            lambda: self._machine.wake_at if self._machine else None, lambda: self._handle(e.Tick(self._now()))
        )
        topics = self._topics
        self._session = Session(
            config.broker,
            f"meerkat-{config.federation}-{config.id}",
            subscriptions=[(topic, 1) for topic in (topics.server, topics.run, topics.round, topics.reply(config.id))],
            on_message=self._on_message,
            on_connected=self._on_connected,
            on_disconnected=lambda reason: self._presence.disconnected(),
            will=lambda link: Will(self._own_status, self._status("lost", link).encode()),
            farewell=lambda link: Will(self._own_status, self._status("stopped", link).encode()),
            kind_of=lambda topic: topic.removeprefix(f"{topics.root}/").removeprefix(f"up/{config.id}/").split("/")[0],
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(coroutine) for coroutine in (self._session.run(), self._alarm.run())]
            runs = tasks.create_task(self._follow_runs())
            if not self._config.exit_when_finished:
                await asyncio.Event().wait()
            await self._finished.wait()
            for task in (runs, *work):
                task.cancel()

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

    async def _take_part(self, descriptor: RunDescriptor) -> None:
        self._told_finished = False
        self._jobs = asyncio.Queue()
        self._log = self._log.bind(run=descriptor.run[:8])
        mask = await fetch_mask(
            descriptor,
            self._state,
            self._session,
            self._topics,
            lambda name, size: self._begin_fetch(name, size, term=0),
        )
        self._fetch = None
        work = self._work = await self._in_worker(Work, self._config, descriptor, mask, self._state)
        self._log.info("ready", weights=mask.size, rows=len(work.rows), peak_rss_mib=peak_rss_mib())
        self._machine = NodeMachine(
            run_id=descriptor.run_id,
            mask_hash=descriptor.mask_hash,
            base=work.digest,
            boot=self._boot,
            now=self._now(),
        )
        if self._server is not None:
            self._handle(e.ServerCame(self._now(), self._server))
        if self._session.link is not None:
            self._handle(e.Connected(self._now()))
        if self._round is not None:
            self._handle(e.FrameCame(self._now(), self._round))
        while True:
            await self._do(await self._jobs.get(), work)

    async def _do(self, job: Job, work: Work) -> None:
        match job:
            case e.ApplyEntries(entries):
                digests = await self._in_worker(work.apply, entries)
                work.digest = next((found for found in reversed(digests) if any(found)), work.digest)
                self._handle(e.EntriesApplied(self._now(), entries, digests))
            case e.FetchSnapshot(offer):
                self._handle(await self._load_snapshot(offer, work))
            case e.ResetTheta():
                await self._in_worker(work.reset)
            case e.StartSteps(version):
                scalars, loss = await self._in_worker(work.step, job)
                self._handle(e.StepsDone(self._now(), version, scalars, loss))

    async def _load_snapshot(self, offer: Offer, work: Work) -> e.SnapshotLoaded | e.SnapshotMissed:
        try:
            work.check_offer(offer)
            fetch = self._begin_fetch(offer.blob, offer.size, term=offer.header.term)
            blob = await fetch.collect(silences=SILENCES)
            head, work.digest = await self._in_worker(work.load, blob, offer)
        except (NotConnected, WireError) as error:
            self._log.warning("snapshot missed", round=offer.version, problem=str(error))
            return e.SnapshotMissed(self._now(), offer.version)
        finally:
            self._fetch = None
        self._log.info("snapshot loaded", round=offer.version, bytes=offer.size)
        return e.SnapshotLoaded(self._now(), offer.version, head, work.digest)

    def _begin_fetch(self, name: bytes, size: int, *, term: int) -> BlobFetch:
        """From now on, chunks are taken for this blob."""
        run = self._descriptor
        assert run is not None
        header = Header.of(run.run_id, term, 0, run.mask_hash)

        def ask(chunks: tuple[int, ...]) -> None:
            self._log.info("asking for chunks", blob=name.hex()[:8], first=chunks[0], count=len(chunks))
            want = Want(header, self._boot, blob=name, chunks=chunks)
            self._session.publish(self._topics.up(self._config.id, "want"), encode(want))

        self._fetch = BlobFetch(name, size, ask)
        return self._fetch

    async def _in_worker(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    # --- connection and status ---

    def _on_connected(self, link: int) -> None:
        self._presence.connected(link)
        if self._machine is None:
            self._publish_status("starting")
            if self._descriptor is None:
                self._log.info("waiting for a server")
        else:
            self._handle(e.Connected(self._now()))

    def _publish_status(self, status: str) -> None:
        if self._session.link is not None:
            payload = self._status(status, self._session.link).encode()
            self._session.publish(self._own_status, payload, retain=True)

    def _status(self, status: str, link: int) -> NodeStatus:
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
            }
        )

    # --- messages ---

    def _on_message(self, message: Message) -> None:
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
            self._counts[f"undecodable: {type(error).__name__}"] += 1
            self._log.warning("message dropped", topic=message.topic, problem=str(error))

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
                self._own_status, f"another process with this id runs on host {host}", "give each node an id of its own"
            )
        if verdict is Verdict.OVERWRITTEN:
            self._publish_status("online" if self._machine else "starting")

    def _on_server(self, state: ServerState) -> None:
        self._server = state
        self._handle(e.ServerCame(self._now(), state))

    def _on_descriptor(self, descriptor: RunDescriptor) -> None:
        if self._descriptor is not None and descriptor.run == self._descriptor.run:
            return
        check_descriptor(descriptor, self._config.federation)
        self._descriptor = descriptor
        self._machine = self._work = self._round = None  # at once: what comes next is of the new run
        self._news.set()

    def _on_frame(self, message: Message) -> None:
        reply = self._topics.reply(self._config.id)
        match decode(message.payload):
            case Round() as frame if message.topic == self._topics.round:
                self._round = frame
                self._handle(e.FrameCame(self._now(), frame))
            case (Welcome() | Entries() | Offer() | Refusal()) as frame if message.topic == reply:
                self._handle(e.FrameCame(self._now(), frame))
            case Chunk() as chunk:
                if self._fetch is not None:
                    self._fetch.add(chunk)
            case frame:
                self._counts[f"misplaced: {type(frame).__name__}"] += 1
                self._log.warning("frame out of place", topic=message.topic, frame=type(frame).__name__)

    # --- events and effects ---

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _handle(self, event: e.NodeEvent) -> None:
        if self._machine is None:
            return
        for effect in self._machine.handle(event):
            self._carry_out(effect)
        self._alarm.changed()
        self._finish_if_due(self._machine)

    def _carry_out(self, effect: e.NodeEffect) -> None:
        match effect:
            case e.PublishStatus():
                self._publish_status("online")
            case e.Send(frame):
                topic = self._topics.up(self._config.id, "update" if isinstance(frame, Update) else "want")
                self._session.publish(topic, encode(frame))
            case e.ApplyEntries() | e.FetchSnapshot() | e.ResetTheta() | e.StartSteps():
                if isinstance(effect, e.ResetTheta) and self._work is not None:
                    self._work.digest = self._work.theta_0_digest  # the version that it says is 0 from now on
                self._jobs.put_nowait(effect)
            case e.Count(reason):
                self._counts[reason] += 1
                self._log.info(reason, round=self._machine.version if self._machine else None)
            case e.End(error):
                raise error

    def _finish_if_due(self, machine: NodeMachine) -> None:
        if self._descriptor is None or machine.version != self._descriptor.rounds or self._told_finished:
            return
        self._told_finished = True
        self._publish_status("online")
        self._log.info(
            "finished",
            round=machine.version,
            digest=self._work.digest.hex() if self._work else None,
            peak_rss_mib=peak_rss_mib(),
            counts=dict(self._counts),
            sent={kind: vars(count) for kind, count in self._session.sent.items()},
            received={kind: vars(count) for kind, count in self._session.received.items()},
        )
        self._finished.set()
