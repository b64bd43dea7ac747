"""A node of a federation in memory: its data and its steps; and the displacements that everybody knows there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from meerkat_mq.config import Codec, NodeValuesConfig
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.first_order import FirstOrderEngine, first_order_steps
from meerkat_mq.core.path import Displacement, Entry, seeds_of, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import Engine, Row, local_steps
from meerkat_mq.core.values import Residual, mean_displacement
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Share
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.values import decode_values, encode_values

Walk = tuple[e.StartSteps, float, int]  # the task, when it began, and how many local steps will be made


@dataclass
class MemoryNode:
    """One node: its machine, its theta, its data.

    Attributes:
        step_s: virtual seconds that a round's local steps take.
        steps_done: where it stands in its data.
        values: of a values node: how it steps; None of a path node.
        alive: False from `crash` until it is started again.
        held: what came while it is frozen; None while it is not.
    """

    name: str
    engine: Engine[Any]
    rows: Sequence[Row]
    batch_size: int
    step_s: float = 0.01
    values: NodeValuesConfig | None = None
    alive: bool = False
    boot: int = 0
    link: int = 0
    steps_done: int = 0
    held: list[e.NodeEvent] | None = None
    walk: Walk | None = None
    residual: Residual | None = None
    machine: NodeMachine = field(init=False)
    replica: Replica = field(init=False)

    def begin(self, size: int) -> None:
        """A new process, of a run with `size` weights, knows nothing of the steps of the one before."""
        self.walk = None
        self.residual = None if self.values is None else Residual(self.values.codec, size)

    def walk_from(self, task: e.StartSteps, now: float) -> float:
        """Begin local steps; returns when they will be done."""
        self.walk = task, now, task.steps
        return now + self.step_s

    def stop(self, now: float) -> float:
        """The local step that is being made is the last one; returns when it will be done."""
        if self.walk is None:
            return now
        task, began, _ = self.walk
        each = self.step_s / task.steps
        made = min(1 + int((now - began) / each), task.steps) if each else task.steps
        self.walk = task, began, made
        return max(began + made * each, now)

    def batches(self, run_id: bytes, steps: int) -> list[list[Row]]:
        """The rows of the next local steps."""
        first, self.steps_done = self.steps_done, self.steps_done + steps
        numbers = [
            batch_rows(run_id, self.name, len(self.rows), self.batch_size, step) for step in range(first, first + steps)
        ]
        return [[self.rows[number] for number in batch] for batch in numbers]

    def path(
        self,
        settings: RoundSettings,
        version: int,
        lane: int,
        steps: int,
        eps: float,
        *,
        stream: str,
        draw: Callable[[str, int, int, int], Float32Array],
    ) -> tuple[tuple[float, ...], float]:
        """A path node's local steps from theta of `version`; returns what `local_steps` returns."""
        return local_steps(
            self.engine,
            self.replica.theta,
            seeds_of(settings.run_id, version, lane, steps * settings.perturbations),
            self.batches(settings.run_id, steps),
            stream=stream,
            eps=eps,
            lr=settings.lr,
            draw=draw,
        )

    def displace(self, run_id: bytes, version: int, steps: int) -> tuple[bytes, float]:
        """A values node's local steps from theta of `version`: the blob of its displacement, and the mean loss."""
        assert self.values is not None
        assert self.residual is not None
        displacement, loss, _ = first_order_steps(
            cast("FirstOrderEngine[Any]", self.engine), self.replica.theta, self.batches(run_id, steps), self.values
        )  # fmt: skip
        return encode_values(self.residual.add(version, displacement), self.values.codec), loss

    def status(self, word: str) -> NodeStatus:
        """What the node says of itself, or the broker in its name."""
        return NodeStatus.model_validate(
            {"status": word, "boot": self.boot, "link": self.link, "host": "memory", "rows": len(self.rows)}
        )

    def forget(self, version: int, heard: bool) -> None:
        """The update from theta of `version` is heard, or came too late."""
        if self.residual is not None:
            self.residual.forget(version, heard=heard)


class Displacements:
    """All of a run, as they decode.

    Attributes:
        arrays: float32 (n,), by hash of the blob.
    """

    def __init__(self, size: int, codec: Codec) -> None:
        """Those of entries are encoded with `codec`; `size` is n."""
        self.arrays: dict[bytes, Float32Array] = {}
        self._size = size
        self._codec = codec

    def keep(self, blob: bytes) -> Displacement:
        """Keep one; returns its name."""
        name = short_hash(blob)
        if name not in self.arrays:
            self.arrays[name] = decode_values(blob, name, self._size)
        return Displacement(name, len(blob))

    def get(self, named: Displacement | None) -> Float32Array | None:
        """What it decodes to; None of none."""
        return None if named is None else self.arrays[named.blob]

    def of(self, entry: Entry) -> Float32Array | None:
        """What an entry's decodes to; None without one."""
        return self.get(entry.displacement)

    def largest(self, name: bytes) -> float:
        """Largest magnitude of a value."""
        return float(np.abs(self.arrays[name]).max())

    def mean(self, shares: Sequence[Share]) -> Displacement | None:
        """The mean of the shares, encoded and kept; None without any."""
        if not shares:
            return None
        parts = [(share.weight, self.arrays[share.blob]) for share in shares]
        return self.keep(encode_values(mean_displacement(parts, self._size), self._codec))
