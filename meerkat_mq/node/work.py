"""A node's model work in one run: blocking, and called from one worker thread only."""

import json
import time
from pathlib import Path
from typing import Any

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry, digest, seeds_of
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import Engine, Row, local_steps
from meerkat_mq.core.toy import QuadraticEngine
from meerkat_mq.errors import BadValue, ConfigError, DataError, within
from meerkat_mq.model.data import read_rows
from meerkat_mq.node.state import NodeState
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.wire.descriptor import RunDescriptor, Task
from meerkat_mq.wire.messages import Offer
from meerkat_mq.wire.snapshot import decode_snapshot

_TOY_REMEDY = 'give JSON lines such as {"seed": 7}'


class Work:
    """Model, data and theta of one node in one run.

    Attributes:
        rows: the node's data.
        digest: of the newest theta at or before the machine's version whose digest is due; belongs to the event loop.
        theta_0_digest: 16 bytes.
    """

    def __init__(self, config: NodeConfig, descriptor: RunDescriptor, mask: Mask, state: NodeState) -> None:
        """Load all of it; slow.

        Raises:
            MeerkatError: model, tokenizer, data or task do not fit the run.
        """
        self._descriptor = descriptor
        self._node = config.id
        self._state = state
        self._replica = Replica(
            mask, run_id=descriptor.run_id, stream=descriptor.stream, digest_every=descriptor.digest_every
        )
        self.engine: Engine[Any]
        if descriptor.engine == "toy":
            self.rows, self.engine = _toy_rows(config), QuadraticEngine(mask.size)
        else:
            self.rows, self.engine = _load(config, descriptor, mask)
        self.digest = self.theta_0_digest = digest(self._replica.theta)

    def apply(self, entries: tuple[Entry, ...]) -> tuple[bytes, ...]:
        """Apply entries to theta; returns the digests, zeros where none is due."""
        return self._replica.replay(entry.terms for entry in entries)

    def check_offer(self, offer: Offer) -> None:
        """Refuse, as BadValue, a snapshot that no server of this run can offer."""
        weights = self._descriptor.weights
        if offer.size > 5 * weights + 2**16:
            raise BadValue("offer", f"{offer.size} bytes for {weights} weights")

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

    def step(self, order: StartSteps) -> tuple[tuple[float, ...], float]:
        """The local steps of a round from the present theta: (projected gradients, mean loss)."""
        run = self._descriptor
        began, first = time.thread_time(), self._state.take_steps(run.run, order.steps)
        numbers = [
            batch_rows(run.run_id, self._node, len(self.rows), run.batch_size, step)
            for step in range(first, first + order.steps)
        ]
        scalars, loss = local_steps(
            self.engine,
            self._replica.theta,
            seeds_of(run.run_id, order.version, order.lane, order.steps * run.perturbations),
            [[self.rows[number] for number in batch] for batch in numbers],
            stream=run.stream,
            eps=order.eps,
            lr=run.lr,
        )
        structlog.get_logger().debug(
            "stepped", round=order.version, loss=round(loss, 5), cpu_s=round(time.thread_time() - began, 4)
        )
        return scalars, loss


def _toy_rows(config: NodeConfig) -> list[Row]:
    try:
        lines = enumerate(Path(config.data).read_text(encoding="utf-8").splitlines(), start=1)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data: {config.data}", f"cannot be read ({error})", _TOY_REMEDY) from error
    rows = [_toy_row(line, f"data: {config.data}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"data: {config.data}", "holds no rows", _TOY_REMEDY)
    return rows


def _toy_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"is not JSON ({error})", _TOY_REMEDY) from error
    if not isinstance(row, dict) or type(row.get("seed")) is not int or not 0 <= row["seed"] < 2**64:
        raise DataError(where, "has no integer seed from 0 to 2**64 - 1", _TOY_REMEDY)
    return row


def _load(config: NodeConfig, descriptor: RunDescriptor, mask: Mask) -> tuple[list[Row], Engine[Any]]:
    task = descriptor.task
    assert task is not None
    if config.model is None:
        raise ConfigError("model", "is missing", "name the folder or hub id of the run's base model")
    with within("data"):
        rows = read_rows(config.data, task)
    with within("model"):
        return rows, _load_engine(config, config.model, task, descriptor, mask)


def _load_engine(config: NodeConfig, source: str, task: Task, descriptor: RunDescriptor, mask: Mask) -> Engine[Any]:
    import torch  # noqa: PLC0415 - a toy node never imports torch

    from meerkat_mq.model.engine import TransformersEngine  # noqa: PLC0415
    from meerkat_mq.model.load import load_model  # noqa: PLC0415

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dtype = config.dtype or descriptor.dtype
    engine = TransformersEngine(load_model(source, dtype=dtype, device=config.device), mask, task)
    engine.check(mask)
    if dtype != "float32":
        survival = engine.surviving_share(mask.theta_0, direction(descriptor.stream, 0, 0, mask.size), descriptor.eps)
        structlog.get_logger().info(
            "perturbation after the cast", dtype=dtype, kept=round(survival.kept, 4), moved=round(survival.moved, 4)
        )
    return engine
