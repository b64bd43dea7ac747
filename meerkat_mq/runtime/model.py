"""What a node's driver needs of its model and of its disk, and who looks on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, cast

from meerkat_mq.config import NodeValuesConfig
from meerkat_mq.core.batches import Batches
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.first_order import FirstOrderEngine, first_order_steps
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry, check_steps, digest, seeds_of, short_hash
from meerkat_mq.core.replica import Change, Replica
from meerkat_mq.core.step import Engine, Row, local_steps
from meerkat_mq.core.values import Residual
from meerkat_mq.errors import BadValue
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.ports import Compute, Failed
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer, Update, Values
from meerkat_mq.wire.snapshot import decode_snapshot
from meerkat_mq.wire.values import decode_values, encode_values

Place = tuple[Float32Array, int]  # theta and its version
Draw = Callable[[str, int, int, int], Float32Array]


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """What sets a node apart.

    Attributes:
        keeps: whether it keeps every update on disk until it is acknowledged; in a buffered run each node does.
    """

    name: str  # its id
    federation: str
    values: bool = False  # whether it sends displacements instead of projected gradients
    keeps: bool = False
    engine: str | None = None  # that its owner names; None: any engine of this package


@dataclass(frozen=True, slots=True)
class KeptUpdate:
    """An update that is not acknowledged yet, and the blob of its displacement (b"" without one)."""

    update: Update
    blob: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of the local steps of a round."""

    scalars: tuple[float, ...]  # projected gradients; () of a values node
    loss: float  # mean
    values: Values | None = None  # names the displacement of a values node
    blob: bytes = field(default=b"", repr=False)  # the displacement, encoded; b"" without one


StepsEnd = Callable[[StepResult | None], None]


class Stop(Protocol):
    """Tells local steps to end."""

    def is_set(self) -> bool:
        """Whether the present local step is the last one."""

    def wait(self, timeout: float) -> bool:
        """Wait until it is set, for so many seconds at most; whether it is."""


class Model(ABC):
    """Model, data and theta of one node in one run. Its methods block, and are called by the node's worker only.

    Args:
        replica: theta, at theta_0.
        residual: of a values node: what its codec lost so far.

    Attributes:
        rows: how many rows of data it has; `left_out`: how many more cannot be prepared.
        kinds: of the weights in the mask, each with the name of a matrix; empty where the engine does not tell them.
    """

    rows: int
    left_out: int = 0
    kinds: Mapping[str, str] = MappingProxyType({})

    def __init__(self, run: RunDescriptor, replica: Replica, residual: Residual | None = None) -> None:
        self._run = run
        self._replica = replica
        self._residual = residual

    @property
    def signal(self) -> float | None:
        """Signal to noise of its projected gradients (`core.signal`), where it is too low; else None."""
        return None

    @property
    def place(self) -> Place:
        """Where `go_to` leads back to."""
        return self._replica.theta, self._replica.version

    def go_to(self, place: Place) -> None:
        """Have theta be what it was."""
        self._replica.load(*place)

    def apply(self, entries: tuple[Entry, ...], blob: bytes) -> tuple[bytes, ...]:
        """Apply entries, the last one with its displacement, b"" for none; returns digests, zeros where none is due.

        Raises:
            WireError: a step of an entry is longer than any of this run can be, or the blob is not its displacement.
            NotFinite: theta would not be finite.
        """
        if self._run.max_step is not None:
            for entry in entries:
                check_steps(entry, self._run.max_step)
        changes: list[Change] = [(entry.terms, None) for entry in entries[:-1]]
        added = entries[-1].displacement
        displacement = None if added is None else decode_values(blob, added.blob, self._run.weights)
        return self._replica.replay([*changes, (entries[-1].terms, displacement)])

    def load(self, blob: bytes, offer: Offer) -> tuple[bytes, bytes]:
        """Go to a snapshot's theta; returns the hash of the last entry before it, and theta's digest.

        Raises:
            WireError: it is damaged or not what was offered; theta is as it was.
        """
        snapshot = decode_snapshot(blob, offer.blob, self._run.weights)
        if (snapshot.run_id, snapshot.version) != (self._run.run_id, offer.version):
            raise BadValue("snapshot", f"is of run {snapshot.run_id.hex()}, version {snapshot.version}")
        self._replica.load(snapshot.theta, snapshot.version)
        return snapshot.head, digest(snapshot.theta)

    def reset(self) -> None:
        """Back to theta_0."""
        self._replica.reset()

    def forget(self, version: int, heard: bool) -> None:
        """The update from theta of `version` is acknowledged, or came too late."""
        if self._residual is not None:
            self._residual.forget(version, heard=heard)

    @abstractmethod
    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult | None:
        """The local steps of a round from the present theta, `made` at most; `stop` ends them after the present one.

        All that the order asks for counts as taken from the data. None: not even the first one was made, and no row
        was taken.
        """


class EngineModel(Model):
    """A model on an engine and rows.

    Args:
        engine: may be shared by all nodes of a process: whoever steps writes theta first.
        take_steps: moves the node's data pointer on; returns where it was.
        values: of a values node: how it steps.
        draw: makes directions.
    """

    def __init__(
        self,
        run: RunDescriptor,
        replica: Replica,
        *,
        name: str,
        engine: Engine[Any],
        data: Sequence[Row],
        take_steps: Callable[[str, int], int],
        values: NodeValuesConfig | None,
        draw: Draw = direction,
    ) -> None:
        super().__init__(run, replica, None if values is None else Residual(values.codec, run.weights))
        self._name = name
        self.engine = engine
        self.data = data
        self.rows = len(data)
        self._take_steps = take_steps
        self._values = values
        self._draw = draw

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult | None:
        """The local steps of a round from the present theta, so many at most."""
        run, data, theta = self._run, self.data, self._replica.theta
        first = self._take_steps(run.run, order.steps)
        batches = Batches(run.run_id, self._name, data, run.batch_size, range(first, first + made))
        ends = partial(self.ends, stop)
        if self._values is None:
            seeds = seeds_of(run.run_id, order.version, order.lane, made * run.perturbations)
            scalars, loss = local_steps(
                self.engine, theta, seeds, batches,
                stream=run.stream, eps=order.eps, lr=run.lr, draw=self._draw, stop=ends,
            )  # fmt: skip
            return StepResult(scalars, loss)
        assert self._residual is not None
        engine = cast("FirstOrderEngine[Any]", self.engine)  # it was looked at when it was made
        displacement, loss, steps = first_order_steps(engine, theta, batches, self._values, ends)
        blob = encode_values(self._residual.add(order.version, displacement), self._values.codec)
        return StepResult((), loss, Values(short_hash(blob), len(blob), steps), blob)

    def ends(self, stop: Stop) -> bool:
        """After each local step: whether no other is to be made."""
        return stop.is_set()


class StepCompute(Compute, Protocol):
    """A node's worker: it also knows how to stop local steps, and when they may begin."""

    def steps(self, model: Model, order: StartSteps, done: StepsEnd, failed: Failed) -> None:
        """Do local steps; `done` takes None where none was made, since they may not begin now."""

    def stop_steps(self) -> None:
        """End the local steps after the one that is being made."""

    def move_on(self) -> None:
        """The run is ahead of this node: local steps that wait until they may begin wait no longer."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a server got of a node on one day.

    Attributes:
        day: "2026-11-29", in UTC.
        directions: numbers that measure a row, at most.
        run: that measured last.
        bytes: of masks, snapshots and displacements that were fetched.
    """

    day: str = ""
    directions: float = 0.0
    run: str = ""
    bytes: int = 0

    def then(self, day: str, run: str, first: float, more: float, most: float) -> "Spent | None":
        """After `more` directions, and `first` where the run did not measure last; None: more than `most` in a day."""
        begun = self._on(day)
        directions = begun.directions + more + (0.0 if begun.run == run else first)
        return replace(begun, directions=directions, run=run) if directions <= most else None

    def fetching(self, day: str, size: int, most: int) -> "Spent | None":
        """After so many bytes more; None: more than `most` in a day."""
        begun = self._on(day)
        return replace(begun, bytes=begun.bytes + size) if begun.bytes + size <= most else None

    def _on(self, day: str) -> "Spent":
        return self if self.day == day else Spent(day)


class NodeStore(Protocol):
    """What a node keeps between starts. Losing it costs a `want` or a step, never correctness. Every method blocks."""

    def has_taken_part(self) -> bool:
        """Whether this node has made local steps in some run."""

    def load_mask(self, mask_hash: bytes) -> Mask | None:
        """The mask with this hash, if it was kept and is whole."""

    def keep_mask(self, mask: Mask) -> None:
        """Keep a mask, and no other."""

    def load_update(self, run: RunDescriptor) -> KeptUpdate | None:
        """The update that was kept, if it is of this run and whole."""

    def keep_update(self, run: RunDescriptor, kept: KeptUpdate) -> None:
        """Keep an update, and no other."""

    def forget_update(self) -> None:
        """Keep no update."""

    def spend(self, run: str, first: float, more: float, most: float) -> bool:
        """Count directions of a row today, as `Spent.then` does; False: they are too many, and none was counted."""

    def fetch(self, size: int, most: int) -> bool:
        """Count bytes that will be fetched, as `Spent.fetching` does; False: too many today, and none was counted."""


class NodeMonitor(Protocol):
    """Who looks on at a node."""

    def ready(self, run: RunDescriptor, mask: Mask, model: Model) -> None:
        """The node has a run's mask and model."""

    def changed(self) -> None:
        """Something was received or done: the node may have nothing more to do."""

    def finished(self, version: int, theta: bytes) -> None:
        """The node has all entries of its run; with the digest of theta."""


MakeModel = Callable[[RunDescriptor, Mask], Model]
