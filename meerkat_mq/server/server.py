"""The server as an asyncio service: its driver's ports bound to MQTT, threads and the loop's clock."""

import asyncio
import secrets
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress

import structlog

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.errors import MeerkatError, TooFewNodes
from meerkat_mq.ledger.run import early_stopping_in_words, mode_in_words, trust_in_words
from meerkat_mq.mqtt import Marker, MessageCount, Session, Will
from meerkat_mq.observe.events import Observer, RunStarted
from meerkat_mq.observe.process import Threads
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime.loop import LoopClock, Ports, ThreadCompute
from meerkat_mq.runtime.server import ServerDriver
from meerkat_mq.runtime.writer import Holdings, KeepMetrics, KeepSightings
from meerkat_mq.server.model_file import ModelFile
from meerkat_mq.server.monitor import Monitor
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.topics import SERVER_NAME, Topics

OUTBOX_BYTES = 64 * 2**20
SIGHTINGS_EVERY_S = 1.0


class Server:
    """One server process. It is its driver's monitor, and tells people.

    Args:
        config: federation.toml.
        held: what the process holds of its run.
        worker: the thread of the ledger.
        monitor: looks on.
        observer: is told of the run's start.
        replace: whether to take over from a server that is online.
        alone: whether no other process uses this server's ledger.
    """

    def __init__(
        self, config: ServerConfig, held: Holdings, worker: Executor, monitor: Monitor, observer: Observer, *,
        replace: bool, alone: bool = True,
    ) -> None:  # fmt: skip
        run = held.run
        self._config = config
        self._run = run
        self._monitor = monitor
        self._observe = observer
        self._log = structlog.get_logger().bind(federation=config.federation, run=run.descriptor.run[:8])
        self._topics = topics = Topics(config.federation)
        self._online = 0
        self._is_first_term = True
        self._finished, self._enough_nodes = asyncio.Event(), asyncio.Event()
        self._ports = Ports()
        self._session = Session(
            config.broker,
            # One a process, which it alone knows: whoever connected with it, would push this server off.
            f"meerkat-{config.federation}-server-{secrets.token_hex(8)}",
            subscriptions=[(topics.up("+", kind), 1) for kind in ("status", "update", "want")],
            on_message=lambda message: self._driver.received(message.topic, message.payload, retained=message.retained),
            on_connected=lambda link: self._driver.connected(link),  # noqa: PLW0108 - the driver is made below
            on_disconnected=lambda _: self._driver.disconnected(),
            will=lambda link: Will(topics.server, self._driver.state("lost", link).encode()),
            farewell=lambda link: Will(topics.server, self._driver.parting(link).encode()),
            kind_of=self._kind_of,
            outbox_bytes=OUTBOX_BYTES + 2 * len(run.blob),
            name=SERVER_NAME,
            marker=Marker(config.state_dir, config.broker, f"meerkat-{config.federation}-server"),
        )  # fmt: skip
        self._others = Threads(thread_name_prefix="compute")
        self._driver = ServerDriver(
            config.federation,
            secrets.token_hex(8),
            held,
            transport=self._session,
            clock=LoopClock(self._ports),
            ledger_work=ThreadCompute(self._ports, worker),
            other_work=ThreadCompute(self._ports, self._others),
            monitor=self,
            replace=replace,
            alone=alone,
        )
        self._model = ModelFile(config.state_dir, held, self._driver.writer, worker)

    async def run(self) -> None:
        """Serve until cancelled; with `config.once`, until the run is finished."""
        try:
            with self._others:
                try:
                    await self._run_all()
                finally:
                    self._driver.stop()  # the threads are waited for
        except BaseException:
            with suppress(MeerkatError):  # what went wrong first is what has to be said
                await self._model.leave()
            raise

    async def _run_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            coroutines = (
                self._session.run(), self._ports.run(), self._keep_sightings(), self._monitor.run(self._keep_metrics),
            )  # fmt: skip
            work = [tasks.create_task(coroutine) for coroutine in coroutines]
            if self._config.once:
                await self._wait_for_nodes()
            await self._finished.wait()
            await self._monitor.finish(self._driver.writer.committed[1], self._updates())
            await self._writer_is_idle()
            self._note_sightings()
            await self._writer_is_idle()
            await self._model.complete(once=self._config.once)
            if not self._config.once:
                await asyncio.Event().wait()
            for task in work:
                task.cancel()

    async def _writer_is_idle(self) -> None:
        idle = asyncio.Event()
        self._driver.writer.when_idle(idle.set)
        await idle.wait()

    async def _wait_for_nodes(self) -> None:
        wait_s = self._config.wait_for_nodes_s
        try:
            async with asyncio.timeout(wait_s):
                await self._enough_nodes.wait()
        except TimeoutError:
            raise TooFewNodes(
                f"federation {self._config.federation}",
                f"{self._online} of {self._run.settings.fewest_nodes} nodes came within {wait_s:g} s",
                "start more nodes, or lower rounds.min_nodes and rounds.min_updates",
            ) from None

    async def _keep_sightings(self) -> None:
        while True:
            await asyncio.sleep(SIGHTINGS_EVERY_S)
            self._note_sightings()

    def _note_sightings(self) -> None:
        writer = self._driver.writer
        if self._driver.machine is None or writer.holds(KeepSightings):
            return  # while the disk is full, news must not pile up: they are summed up until they are asked for
        if news := self._monitor.sightings(self._session.received):
            writer.put(KeepSightings(news))

    def _keep_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        self._driver.writer.put(KeepMetrics(version, metrics))

    # --- what the driver tells ---

    def counted(self, reason: str) -> None:
        """Something noteworthy happened."""
        self._monitor.counts[reason] += 1

    def heard_from(self, node: str, status: NodeStatus) -> None:
        """A node said what it does."""
        self._monitor.heard_from(node, status)

    def took_term(self, term: int, machine: ServerMachine) -> None:
        """This server is in charge."""
        if not self._is_first_term:
            return
        self._is_first_term = False
        settings = self._run.settings
        if said := mode_in_words(settings):
            self._log.info("mode", how=said)
        if said := trust_in_words(settings):
            self._log.warning("nothing compares updates", means=said)
        if said := early_stopping_in_words(settings):
            self._log.info("early stopping", how=said)
        self._observe(RunStarted(self._run.descriptor, term))

    def stood(self, version: int, theta: Float32Array) -> None:
        """theta is committed at a version."""
        self._monitor.stood(version, theta)

    def opened(self) -> None:
        """A round is open."""
        self._monitor.opened()

    def closed(self, event: e.EntryCommitted, online: int) -> None:
        """A round was committed."""
        self._monitor.closed(event, online, sum(count.payload_bytes for count in self._updates().values()))

    def changed(self, online: int, *, is_open: bool, finished: bool) -> None:
        """The machine was told something."""
        self._online = online
        if finished:
            self._finished.set()
        if finished or is_open or online >= self._run.settings.fewest_nodes:
            self._enough_nodes.set()

    # --- traffic ---

    def _kind_of(self, topic: str) -> str:
        parsed = self._topics.parse_up(topic)
        if parsed is None:
            return topic.removeprefix(f"{self._topics.root}/").split("/", 1)[0]
        return f"{parsed[1]}/{parsed[0]}" if parsed[0] in self._monitor.statuses else parsed[1]

    def _updates(self) -> dict[str, MessageCount]:
        return {
            kind.removeprefix("update/"): count
            for kind, count in self._session.received.items()
            if kind.startswith("update/")
        }
