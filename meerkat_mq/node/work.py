"""A node's model work in one run: blocking, and called from one worker thread only."""

import math
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.first_order import FirstOrderEngine, first_order_steps
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry, check_steps, digest, seeds_of, short_hash
from meerkat_mq.core.replica import Change, Replica
from meerkat_mq.core.step import Engine, Row, local_steps
from meerkat_mq.core.values import Residual
from meerkat_mq.engines.protocol import Rounds, Setup
from meerkat_mq.engines.registry import entry_of, make_engine, try_out, usable
from meerkat_mq.errors import BadValue, ConfigError, within
from meerkat_mq.node.limits import Pace
from meerkat_mq.node.rows import LocalRows
from meerkat_mq.node.state import NodeState
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import Place, StepResult, Stop
from meerkat_mq.tasks.data import read_rows
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer, Values
from meerkat_mq.wire.snapshot import decode_snapshot
from meerkat_mq.wire.values import encode_values


class Work:
    """Model, data and theta of one node in one run: `runtime.model.Model` on real data."""

    def __init__(self, config: NodeConfig, descriptor: RunDescriptor, mask: Mask, state: NodeState) -> None:
        """Load all of it; slow.

        Raises:
            MeerkatError: model, tokenizer, data or task do not fit the run.
        """
        self._descriptor = descriptor
        self._node = config.id
        self._state = state
        self._pace = Pace(config.limits.cpu_share)
        self._settings = config.values
        self._residual = Residual(config.values.codec, mask.size) if config.uplink == "values" else None
        self._replica = Replica(
            mask, run_id=descriptor.run_id, stream=descriptor.stream, digest_every=descriptor.digest_every
        )
        entry, task = entry_of(descriptor.engine), descriptor.task
        if entry.task == "needed" and config.model is None:
            raise ConfigError("model", "is missing", "name the folder or hub id of the run's base model")
        read = entry.read if task is None else partial(read_rows, task=task)
        self._rows = LocalRows(config.data, read)
        self.engine = _engine(config, descriptor, mask)
        self._rows.check(partial(usable, self.engine))
        try_out(descriptor.engine, self.engine, mask.theta_0, self._rows.rows)

    @property
    def rows(self) -> int:
        """How many rows the node's data had before the last steps."""
        return len(self._rows.rows)

    @property
    def left_out(self) -> int:
        """Rows of the node's data that cannot be prepared."""
        return self._rows.left_out

    @property
    def place(self) -> Place:
        """Where `go_to` leads back to."""
        return self._replica.theta, self._replica.version

    def go_to(self, place: Place) -> None:
        """Have theta be what it was."""
        self._replica.load(*place)

    def apply(self, entries: tuple[Entry, ...], displacement: Float32Array | None) -> tuple[bytes, ...]:
        """Apply entries to theta, the last one with what its displacement decodes to, float32 (n,).

        Returns:
            The digests, zeros where none is due.
        """
        self._check_steps(entries)
        changes: list[Change] = [(entry.terms, None) for entry in entries[:-1]]
        return self._replica.replay([*changes, (entries[-1].terms, displacement)])

    def _check_steps(self, entries: tuple[Entry, ...]) -> None:
        """Refuse, as BadValue, entries of which a step is longer than any of this run can be."""
        bound = self._descriptor.max_step
        if bound is not None:
            for entry in entries:
                check_steps(entry, bound)

    def load(self, blob: bytes, offer: Offer) -> tuple[bytes, bytes]:
        """Stand where a snapshot stands; returns the hash of the last entry behind it, and theta's digest.

        Raises:
            WireError: it is damaged or not what was offered; theta is as it was.
        """
        snapshot = decode_snapshot(blob, offer.blob, self._descriptor.weights)
        if (snapshot.run_id, snapshot.version) != (self._descriptor.run_id, offer.version):
            raise BadValue("snapshot", f"is of run {snapshot.run_id.hex()}, version {snapshot.version}")
        self._replica.load(snapshot.theta, snapshot.version)
        return snapshot.head, digest(snapshot.theta)

    def reset(self) -> None:
        """Back to theta_0."""
        self._replica.reset()

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult | None:
        """The local steps of a round from the present theta, so many at most.

        Returns:
            None where `stop` was set before the first one: no step was made, and none was taken of the data.
        """
        run = self._descriptor
        if not self._pace.begin(order.steps, stop):
            return None
        self._rows.refresh()
        began, first = time.thread_time(), self._state.take_steps(run.run, order.steps)
        rows = self._rows.rows
        numbers = [
            batch_rows(run.run_id, self._node, len(rows), run.batch_size, step) for step in range(first, first + made)
        ]
        batches = [[rows[number] for number in batch] for batch in numbers]
        walk = self._walk if self._residual is None else self._displace
        result = walk(order, batches, stop)
        if not math.isfinite(result.loss):
            structlog.get_logger().warning(
                "a loss is not finite: reported as NaN, which is refused", round=order.version
            )
        structlog.get_logger().debug(
            "stepped", round=order.version, loss=round(result.loss, 5), cpu_s=round(time.thread_time() - began, 4)
        )
        return result

    def _walk(self, order: StartSteps, batches: list[list[Row]], stop: Stop) -> StepResult:
        run = self._descriptor
        scalars, loss = local_steps(
            self.engine,
            self._replica.theta,
            seeds_of(run.run_id, order.version, order.lane, len(batches) * run.perturbations),
            batches,
            stream=run.stream,
            eps=order.eps,
            lr=run.lr,
            stop=lambda: self._pace.ends(stop),
        )
        return StepResult(scalars, loss)

    def _displace(self, order: StartSteps, batches: list[list[Row]], stop: Stop) -> StepResult:
        assert self._residual is not None
        engine = cast("FirstOrderEngine[Any]", self.engine)  # it was looked at when it was made
        displacement, loss, steps = first_order_steps(
            engine, self._replica.theta, batches, self._settings, lambda: self._pace.ends(stop)
        )
        blob = encode_values(self._residual.add(order.version, displacement), self._settings.codec)
        return StepResult((), loss, Values(short_hash(blob), len(blob), steps), blob)

    def forget(self, version: int, heard: bool) -> None:
        """The update from theta of `version` is heard, or came too late."""
        if self._residual is not None:
            self._residual.forget(version, heard=heard)


def _engine(config: NodeConfig, run: RunDescriptor, mask: Mask) -> Engine[Any]:
    dtype = config.dtype or run.dtype
    setup = Setup(mask, run.task, config.model, dtype, config.device, config.threads)
    with within("model") if config.model is not None and entry_of(run.engine).task == "needed" else nullcontext():
        engine = make_engine(run.engine, setup, f"node {config.id}")
    if config.uplink == "values" and not isinstance(engine, FirstOrderEngine):
        problem = f'is "values", and the engine {run.engine} has no method gradient'
        raise ConfigError("uplink", problem, 'set uplink = "path"')
    if dtype != "float32" and isinstance(engine, Rounds):
        survival = engine.surviving_share(mask.theta_0, direction(run.stream, 0, 0, mask.size), run.eps)
        structlog.get_logger().info(
            "perturbation after the cast", dtype=dtype, kept=round(survival.kept, 4), moved=round(survival.moved, 4)
        )
    return engine
