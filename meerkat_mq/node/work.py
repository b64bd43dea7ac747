"""A node's model work in one run: blocking, and called from one worker thread only."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.core.directions import direction
from meerkat_mq.core.first_order import FirstOrderEngine
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.signal import LEAST
from meerkat_mq.core.step import Engine, Row
from meerkat_mq.engines.prefix import keeping
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import entry_of, make_engine, try_out, usable
from meerkat_mq.errors import ConfigError, DataError, within
from meerkat_mq.node.limits import Pace
from meerkat_mq.node.noise import Noise
from meerkat_mq.node.state import NodeState
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import EngineModel, StepResult, Stop
from meerkat_mq.tasks.data import read_rows
from meerkat_mq.tasks.load import task_of
from meerkat_mq.tasks.sources import data_files, place_of
from meerkat_mq.tasks.task import Task
from meerkat_mq.wire.descriptor import RunDescriptor

Stamp = tuple[tuple[str, int, int], ...]


class LocalRows:
    """The rows of a node's files, or of a data set `hf:…`; DataError where they cannot be read.

    Attributes:
        rows: as last read; at least one.
        left_out: how many more there were, which cannot be prepared.
    """

    def __init__(self, source: Path | str, read: Callable[[Path | str], list[Row]]) -> None:
        self._source = source
        self._read = read
        self._stamp = _stamp(self._source)
        self._usable: Callable[[Sequence[Row]], list[Row]] = list
        self.left_out = 0
        with within("data"):
            self.rows = self._read(source)

    def check(self, usable: Callable[[Sequence[Row]], list[Row]]) -> None:
        """Keep the rows that can be prepared, now and after each change; DataError where there are none."""
        self._usable = usable
        with within("data"):
            self.rows = self._checked(self.rows)

    def _checked(self, rows: list[Row]) -> list[Row]:
        kept = self._usable(rows)
        places = set(map(place_of, kept))
        self.left_out = sum(place_of(row) not in places for row in rows)  # a long text may have become several rows
        return kept

    def refresh(self) -> None:
        """Read the files again if one came, went or changed; what cannot be read is a warning, and the rows stay."""
        stamp = _stamp(self._source)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.rows = self._checked(self._read(self._source))
        except DataError as error:
            structlog.get_logger().warning("data refused, the rows before it stay", problem=str(error))
            return
        structlog.get_logger().info("data read again", rows=len(self.rows), left_out=self.left_out)


def _stamp(source: Path | str) -> Stamp:
    """Name, size and time of change of each file; () of a data set, and of what is not there."""
    if isinstance(source, str):
        return ()
    try:
        found = [(file, file.stat()) for file in data_files(source)]
    except (DataError, OSError):
        return ()
    return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file, stat in found)


class Work(EngineModel):
    """Model, data and theta of one node in one run: on its own files, within its limits."""

    def __init__(self, config: NodeConfig, run: RunDescriptor, mask: Mask, state: NodeState) -> None:
        """Load all of it; slow.

        Raises:
            MeerkatError: model, tokenizer, data or task do not fit the run.
        """
        self._pace = Pace(config.limits.cpu_share)
        name, described = config.engine or run.engine, run.task
        entry = entry_of(name)
        task = None if described is None else task_of(described)
        if entry.task == "needed" and config.model is None:
            raise ConfigError(
                "model",
                "is missing",
                "name the folder or hub id of the run's base model; or, for the onnx engine, its bundle",
            )
        read = entry.read if task is None else partial(read_rows, task=task)
        self._local = LocalRows(config.data, read)
        engine = _engine(name, config, run, mask, task)
        self._local.check(partial(usable, engine))
        try_out(name, engine, mask.theta_0, self._local.rows)
        super().__init__(
            run,
            Replica(mask, run_id=run.run_id, stream=run.stream, digest_every=run.digest_every),
            name=config.id,
            engine=engine,
            data=self._local.rows,
            take_steps=state.take_steps,
            values=config.values if config.uplink == "values" else None,
        )
        self.left_out = self._local.left_out
        self._noise: Noise | None = None
        if config.uplink == "path" and entry.task != "none":
            self._noise = Noise(engine, run)
            self._noise.first(mask.theta_0, self.data)
        self.kinds = getattr(engine, "kinds", lambda _: {})(mask)

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult | None:
        """The local steps of a round; none where `stop` was set before the first one: then no row was taken."""
        if not self._pace.begin(order.steps, stop):
            return None
        self._local.refresh()
        self.data, self.rows, self.left_out = self._local.rows, len(self._local.rows), self._local.left_out
        began, log = time.thread_time(), structlog.get_logger()
        result = super().step(order, stop, made)
        assert result is not None
        if not math.isfinite(result.loss):
            log.warning("a loss is not finite: reported as NaN, which is refused", round=order.version)
        if self._noise is not None:
            self._noise.stepped(len(result.scalars), lambda: self.place[0], self.data)
        cpu_s = round(time.thread_time() - began, 4)
        log.debug("stepped", round=order.version, loss=round(result.loss, 5), cpu_s=cpu_s)
        return result

    @property
    def signal(self) -> float | None:
        """What a status says: only too low a ratio, since a server of an older release refuses one with this key."""
        ratio = None if self._noise is None else self._noise.ratio
        return ratio if ratio is not None and ratio < LEAST else None

    def ends(self, stop: Stop) -> bool:
        """After each local step: rest, if another is to be made; whether none is."""
        return self._pace.ends(stop)


def _engine(name: str, config: NodeConfig, run: RunDescriptor, mask: Mask, task: Task | None) -> Engine[Any]:
    dtype = config.dtype or run.dtype
    adapter = None if config.adapter is None else str(config.adapter)
    keep = keeping(config.prefix, config.state_dir)
    completion = run.completion_fingerprint
    setup = Setup(mask, task, config.model, dtype, config.device, config.threads, adapter, keep, completion)
    with within("model") if config.model is not None and entry_of(name).extra is not None else nullcontext():
        engine = make_engine(name, setup, f"node {config.id}")
    if config.uplink == "values" and not isinstance(engine, FirstOrderEngine):
        problem = f'is "values", and the engine {name} has no method gradient'
        raise ConfigError("uplink", problem, 'set uplink = "path"')
    if dtype != "float32" and (share := getattr(engine, "surviving_share", None)):
        survival = share(mask.theta_0, direction(run.stream, 0, 0, mask.size), run.eps)
        structlog.get_logger().info(
            "perturbation after the cast", dtype=dtype, kept=round(survival.kept, 4), moved=round(survival.moved, 4)
        )
    return engine
