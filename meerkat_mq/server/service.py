"""The server as an asyncio service: its ledger, and its driver's ports bound to MQTT, threads and the loop's clock."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import structlog

from meerkat_mq.config import ServerConfig
from meerkat_mq.engines.registry import entry_of
from meerkat_mq.errors import ConfigError, LedgerUnavailable, MeerkatError, TooFewNodes
from meerkat_mq.extras import need
from meerkat_mq.ledger.files import DIFFERENCE_FILE, check_remains
from meerkat_mq.ledger.losses import RisingLoss, rising_from
from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.run import Run, as_begun, check_same, kept_guards_in_words
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.mqtt import Marker, Session, Will
from meerkat_mq.observe.events import Observer
from meerkat_mq.observe.process import Threads
from meerkat_mq.runtime.disk import Patience, Spare
from meerkat_mq.runtime.loop import LoopClock, Ports, ThreadCompute
from meerkat_mq.runtime.server import ServerDriver
from meerkat_mq.runtime.succession import Past
from meerkat_mq.runtime.writer import Holdings, KeepSightings, LedgerWriter
from meerkat_mq.server.alive import alive
from meerkat_mq.server.monitor import Evaluator, Monitor
from meerkat_mq.server.run import check_room, prepare_run
from meerkat_mq.wire.snapshot import Difference
from meerkat_mq.wire.topics import SERVER_NAME, Topics

CLOSE_S = 1.0
OUTBOX_BYTES = 64 * 2**20
SIGHTINGS_EVERY_S = 1.0
AGAIN_S = 2.0  # between two tries to write the model
ONCE_S = 60.0  # for it, of a server that ends with its run

Result = TypeVar("Result")


async def serve(config: ServerConfig, *, replace: bool = False, observer: Observer = lambda event: None) -> None:
    """Run one server until cancelled; with `config.once`, until its run is finished.

    Where `state_dir` holds a ledger, its run goes on. Whenever the server ends, the model as it stands is in
    `state_dir/difference.mkd`.

    Args:
        config: federation.toml.
        replace: take over from a server that is online.
        observer: is told of every round and evaluation, on the event loop.

    Raises:
        MeerkatError: with what to do about it.
    """
    if config.evaluation is not None:
        if (extra := entry_of(config.engine).extra) is not None:
            need(extra, "evaluation")
        if isinstance(config.evaluation.data, str):
            need("datasets", config.evaluation.data)
    off_the_loop = asyncio.get_running_loop().run_in_executor
    try:
        await asyncio.to_thread(config.state_dir.mkdir, parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
        raise ConfigError(f"state_dir {config.state_dir}", problem, "name a folder that can be written") from error
    with alive(config.state_dir) as alone, Threads(1, "ledger") as worker:
        ledger = await patiently(lambda: off_the_loop(worker, Ledger.open, config.state_dir / LEDGER_FILE))
        try:
            run = await patiently(lambda: off_the_loop(worker, _prepare, config, ledger))
            evaluator = await asyncio.to_thread(Evaluator, config, run) if config.evaluation else None
            held, rising = await patiently(lambda: off_the_loop(worker, _recover, ledger, run))
            every = config.evaluation.every if config.evaluation else 1
            monitor = Monitor(observer, evaluator, every, run, rising)
            await Server(config, held, worker, monitor, replace=replace, alone=alone).run()
        finally:
            with suppress(TimeoutError):  # a replay may take minutes; a ledger that nobody closed is whole
                async with asyncio.timeout(CLOSE_S):
                    await off_the_loop(worker, ledger.close)


async def patiently(job: Callable[[], Awaitable[Result]]) -> Result:
    """Do what reads or writes the ledger, and changes nothing where it raises, again while its disk cannot take it."""
    now = asyncio.get_running_loop().time
    patience = Patience(now())
    while True:
        try:
            result = await job()
        except LedgerUnavailable as error:
            await asyncio.sleep(patience.after(error, now()))
        else:
            patience.worked(now())
            return result


def _prepare(config: ServerConfig, ledger: Ledger) -> Run:
    begun = ledger.run
    check_remains(ledger.path, begun, ledger.version)
    if begun is not None:
        config, asked = as_begun(config, ledger.rules), config
        for problem in kept_guards_in_words(config.guards, asked.guards):
            structlog.get_logger().warning("the run keeps its guards", problem=problem)
    run = prepare_run(config, begun)
    if begun is not None:
        check_same(run, begun, ledger.rules, str(ledger.path))
    check_room(config, run)
    return run


def _recover(ledger: Ledger, run: Run) -> tuple[Holdings, RisingLoss]:
    snapshots = Snapshots(ledger, run.descriptor)
    replica = recovered(ledger, run, snapshots)
    return Holdings(run, ledger, replica, snapshots, Past.of(ledger)), rising_from(ledger)


class Server:
    """One server process.

    Args:
        worker: the thread of the ledger.
        replace: whether to take over from a server that is online.
        alone: whether no other process uses this server's ledger.
    """

    def __init__(
        self, config: ServerConfig, held: Holdings, worker: Executor, monitor: Monitor, *,
        replace: bool, alone: bool = True,
    ) -> None:  # fmt: skip
        run = held.run
        self._config = config
        self._run = run
        self._monitor = monitor
        self._topics = topics = Topics(config.federation)
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
            farewell=self._farewell,
            kind_of=self._kind_of,
            outbox_bytes=OUTBOX_BYTES + 2 * len(run.blob),
            retained_first=True,  # rounds go before replies
            name=SERVER_NAME,
            marker=Marker(config.state_dir, config.broker, f"meerkat-{config.federation}-server"),
        )  # fmt: skip
        monitor.received = self._session.received
        self._others = Threads(thread_name_prefix="compute")
        self._driver = ServerDriver(
            config.federation,
            secrets.token_hex(8),
            held,
            transport=self._session,
            clock=LoopClock(self._ports),
            ledger_work=ThreadCompute(self._ports, worker),
            measure_work=ThreadCompute(self._ports, self._others),
            other_work=ThreadCompute(self._ports, self._others),
            monitor=monitor,
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
            evaluate = self._monitor.run(self._driver.writer.put)
            coroutines = (self._session.run(), self._ports.run(), self._keep_sightings(), evaluate)
            work = [tasks.create_task(coroutine) for coroutine in coroutines]
            if self._config.once:
                await self._wait_for_nodes()
            await self._monitor.finished.wait()
            await self._monitor.finish(self._driver.writer.committed[1])
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
                await self._monitor.enough_nodes.wait()
        except TimeoutError:
            raise TooFewNodes(
                f"federation {self._config.federation}",
                f"{self._monitor.online} of {self._run.settings.fewest_nodes} nodes came within {wait_s:g} s",
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
        if news := self._monitor.sightings(self._driver.flagged):
            writer.put(KeepSightings(news))

    def _farewell(self, link: int) -> Will | None:
        """Nothing before the first term: what stands there is another server's."""
        return Will(self._topics.server, self._driver.parting(link).encode()) if self._driver.machine else None

    def _kind_of(self, topic: str) -> str:
        parsed = self._topics.parse_up(topic)
        if parsed is None:
            return topic.removeprefix(f"{self._topics.root}/").split("/", 1)[0]
        return f"{parsed[1]}/{parsed[0]}" if parsed[0] in self._monitor.statuses else parsed[1]


class ModelFile:
    """Writes `difference.mkd`, the model as the ledger says, where this server is in charge; if need be, again."""

    def __init__(self, folder: Path, held: Holdings, writer: LedgerWriter, worker: Executor) -> None:
        self._path = folder / DIFFERENCE_FILE
        self._held = held
        self._writer = writer
        self._worker = worker
        self._spare = Spare()
        self._version = 0

    async def leave(self) -> bool:
        """Write it, unless no round closed since; whether it lies there, or is another server's. Raises LedgerError."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._write)

    async def complete(self, *, once: bool) -> None:
        """Write it at the end of a run, however long that takes, or, in a server that ends with its run, for a minute.

        Raises:
            ConfigError: in that minute the disk did not take it.
        """
        gives_up = asyncio.get_running_loop().time() + ONCE_S
        while not await self._left():
            if once and asyncio.get_running_loop().time() > gives_up:
                raise ConfigError(str(self._path), "cannot be written", "free space, and start the server again")
            await asyncio.sleep(AGAIN_S)
        structlog.get_logger().info("model saved", file=str(self._path))

    async def _left(self) -> bool:
        try:
            return await self.leave()
        except LedgerUnavailable:
            return False

    def _write(self) -> bool:
        if not self._held.ledger.in_charge:
            return True
        version, theta = self._writer.committed
        if version == self._version:
            return True
        run = self._held.run
        difference = Difference(run.mask, theta, run.descriptor.run_id, version)
        if not self._spare.write(DIFFERENCE_FILE, lambda: difference.save(self._path)):
            return False
        self._version = version
        return True
