"""The node as an asyncio service: its driver's ports bound to MQTT, a worker thread and the loop's clock."""

import asyncio
import secrets
import threading
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.registry import entry_of
from meerkat_mq.errors import DataError, within
from meerkat_mq.extras import need
from meerkat_mq.mqtt import Marker, Session, Will
from meerkat_mq.node.duty import DutyCycle
from meerkat_mq.node.limits import Allowance, NodeCompute
from meerkat_mq.node.state import NodeState
from meerkat_mq.node.work import Work
from meerkat_mq.observe.figures import log_keys
from meerkat_mq.observe.process import Threads, peak_rss_mib
from meerkat_mq.runtime.loop import LoopClock, Ports
from meerkat_mq.runtime.model import Model, NodeProfile
from meerkat_mq.runtime.node import NodeDriver
from meerkat_mq.runtime.policy import NodePolicy
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor
from meerkat_mq.wire.topics import Topics


async def run_node(config: NodeConfig) -> None:
    """Run one node until cancelled; with `exit_when_finished`, until its run is finished.

    Raises:
        MeerkatError: with what to do about it.
    """
    extra = entry_of(config.engine or "transformers").extra
    if (config.model or config.bundle) is not None and extra is not None:
        need(extra, f"node {config.id}")
    if isinstance(config.data, str):
        need("datasets", config.data)
    with within("data"):
        if isinstance(config.data, Path) and not config.data.exists():
            raise DataError(
                str(config.data), "there is no such file", "name the node's rows: a JSON, CSV or TSV file, or a folder"
            )
    with within("policy.tasks"):
        policy = NodePolicy.of(config.policy)
    allowance = Allowance(config.limits)
    with NodeState(config.state_dir) as state, Threads(1, "model") as worker:
        config = await _with_bundle(config, worker)
        await _Node(config, policy, state, allowance, worker).run()


async def _with_bundle(config: NodeConfig, worker: Executor) -> NodeConfig:
    """The configuration, with the folder of the bundle that it names, which is fetched first.

    Raises:
        ModelError: as `fetch_bundle`.
    """
    if config.bundle is None:
        return config
    from meerkat_mq.engines.onnx.fetch import fetch_bundle  # noqa: PLC0415 - needs the extra

    log = structlog.get_logger().bind(node=config.id, url=config.bundle.url)
    folder, stop = config.state_dir / "bundles" / config.bundle.sha256[:32], threading.Event()
    log.info("bundle wanted", folder=str(folder))

    def say(problem: str) -> None:
        log.warning("bundle not fetched yet", problem=problem)

    try:
        fetching = partial(fetch_bundle, config.bundle, folder, say, stop)
        await asyncio.get_running_loop().run_in_executor(worker, fetching)
    finally:
        stop.set()
    return config.model_copy(update={"model": str(folder)})


class _Node:
    """One node process. It is its driver's monitor, and tells people."""

    def __init__(
        self, config: NodeConfig, policy: NodePolicy, state: NodeState, allowance: Allowance, worker: Executor
    ) -> None:
        self._config = config
        self._state = state
        self._log = structlog.get_logger().bind(node=config.id, federation=config.federation)
        topics, client_id = Topics(config.federation), f"meerkat-{config.federation}-{config.id}"
        status = topics.up(config.id, "status")
        self._finished = asyncio.Event()
        self._ports = Ports()
        self._compute = NodeCompute(self._ports, worker, allowance)
        self._session = Session(
            config.broker,
            client_id,
            subscriptions=[(topic, 1) for topic in (topics.server, topics.run, topics.round, topics.reply(config.id))],
            on_message=lambda message: self._driver.received(message.topic, message.payload, retained=message.retained),
            on_connected=lambda link: self._driver.connected(link),  # noqa: PLW0108 - the driver is made below
            on_disconnected=lambda _: self._driver.disconnected(),
            will=lambda link: Will(status, self._driver.status("lost", link).encode()),
            farewell=lambda link: Will(status, self._farewell(link).encode()),
            kind_of=lambda topic: topic.removeprefix(f"{topics.root}/").removeprefix(f"up/{config.id}/").split("/")[0],
            name=config.id,
            marker=Marker(config.state_dir, config.broker, client_id),
        )
        self._driver = NodeDriver(
            NodeProfile(
                config.id,
                config.federation,
                config.uplink == "values",
                keeps=config.schedule is not None,
                engine=config.engine,
            ),
            secrets.randbits(32),
            transport=self._session,
            store=state,
            compute=self._compute,
            clock=LoopClock(self._ports),
            make_model=lambda run, mask: Work(config, run, mask, state),
            monitor=self,
            policy=policy,
        )
        self._duty = None if config.schedule is None else DutyCycle(config.schedule, self._session, self._driver)

    async def run(self) -> None:
        """Work until cancelled, or until the run is finished."""
        attendance = self._session if self._duty is None else self._duty
        async with asyncio.TaskGroup() as tasks:
            parts = (attendance.run(), self._ports.run(), self._compute.run_steps())
            work = [tasks.create_task(part) for part in parts]
            try:
                if not self._config.exit_when_finished:
                    await asyncio.Event().wait()
                await self._finished.wait()
            finally:
                self._driver.stop()
            for task in work:
                task.cancel()

    def _farewell(self, link: int) -> NodeStatus:
        wakes_in_s = self._duty.wakes_in_s if self._duty is not None else None
        return self._driver.status("stopped" if wakes_in_s is None else "asleep", link, wakes_in_s)

    # --- what the driver tells ---

    def ready(self, run: RunDescriptor, mask: Mask, model: Model) -> None:
        """The node has a run's mask and model."""
        self._log = self._log.bind(run=run.run[:8])
        self._log.info(
            "ready", weights=mask.size, rows=model.rows, left_out=model.left_out, peak_rss_mib=peak_rss_mib()
        )

    def changed(self) -> None:
        """The node may have nothing more to do."""
        if self._duty is not None:
            self._duty.changed()

    def finished(self, version: int, theta: bytes) -> None:
        """The node has all entries of its run."""
        sent, received = self._session.sent, self._session.received
        for direction, traffic in (("sent", sent), ("received", received)):
            for kind, count in traffic.items():
                self._log.info("traffic", direction=direction, kind=kind, **vars(count))
        self._log.info(
            "finished",
            version=version,
            digest=theta.hex(),
            peak_rss_mib=peak_rss_mib(),
            sent_bytes=sum(count.packet_bytes for count in sent.values()),
            received_bytes=sum(count.packet_bytes for count in received.values()),
            **log_keys(self._driver.counts),
        )
        self._finished.set()
