"""Training a cell: a federation in memory, or first-order steps on the same mask; what it cost."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import gradip
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.engines.evaluate import Judge, as_classes, evaluate, first_order
from meerkat_mq.engines.torch.engine import Prepared, TransformersEngine
from meerkat_mq.rounds.policy import RoundSettings, lane_of
from meerkat_mq.rounds.records import NOT_REFUSED, Judgement, Verdict
from meerkat_mq.sweep.grid import Cell
from meerkat_mq.sweep.plan import PASSES_OF_A_GRADIENT
from meerkat_mq.tasks.task import Evaluation
from meerkat_mq.wire.topics import Topics
from meerkat_mq.worlds.broker import VirtualMessage
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.quiet import quiet
from meerkat_mq.worlds.run import FEDERATION

UNUSABLE = (Verdict.NOT_FINITE, Verdict.TOO_LARGE)
WORSE_THAN_A_GUESS = 1.1
WORSE_THAN_BEFORE = 1.5

Report = Callable[[float], None]
Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class NodeGradIP:
    """GradIP of each step of a node in a calibration round, so that other thresholds can be tried on it."""

    version: int
    node: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Trained:
    """What training came to.

    Attributes:
        theta: float32 (n,), of the last whole round.
        passes: forward passes of all nodes.
        bytes_up: of encoded frames, a node; bytes_down: likewise.
        refused: updates that did not count.
        ended: what stopped it before its time, in words.
        curve: (round, accuracy, loss, CPU seconds of training so far).
    """

    theta: Float32Array
    rounds: int
    passes: int
    cpu_seconds: float
    wall_seconds: float
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    refused: int = 0
    judgements: Sequence[Judgement] = ()
    gradips: Sequence[NodeGradIP] = ()
    ended: str | None = None
    curve: Sequence[tuple[int, float, float, float]] = ()


@dataclass
class Stopwatch:
    """CPU and wall seconds of what was done while it ran."""

    cpu: float = 0.0
    wall: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a stretch."""
        cpu, wall = time.process_time(), time.monotonic()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.monotonic() - wall


class CountingEngine:
    """An engine that counts forward passes, and keeps its error: a node would only say that it failed."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.passes = 0
        self.error: Exception | None = None

    def write(self, theta: Float32Array) -> None:
        """As the engine's."""
        self._noting(self._engine.write, theta)

    def prepare(self, rows: Sequence[Row]) -> Prepared:
        """As the engine's."""
        return self._noting(self._engine.prepare, rows)

    def losses(self, batch: Prepared) -> Float32Array:
        """As the engine's."""
        self.passes += 1
        return self._noting(self._engine.losses, batch)

    def _noting(self, call: Callable[[Given], Found], given: Given) -> Found:
        try:
            return call(given)
        except Exception as error:
            self.error = error
            raise


class Traffic:
    """Counts the bytes of every frame, up as it reaches the broker, down as it reaches a node.

    Of all updates that a run will take, `report` takes the share that has come.
    """

    def __init__(self, updates: int, report: Report) -> None:
        self.up = self.down = 0
        root = Topics(FEDERATION).root
        self._to_nodes = tuple(f"{root}/{kind}" for kind in ("round", "down/", "values"))
        self._updates = updates
        self._came = 0
        self._report = report

    def routed(self, message: VirtualMessage) -> None:
        """A message has reached the broker."""
        if message.topic.endswith(("/update", "/want")):
            self.up += len(message.payload)
        if message.topic.endswith("/update"):
            self._came += 1
            self._report(min(1.0, self._came / self._updates))

    def delivered(self, message: VirtualMessage) -> None:
        """A message has reached a client."""
        if message.topic.startswith(self._to_nodes):
            self.down += len(message.payload)


@quiet()
def train_federated(
    engine: TransformersEngine,
    mask: Mask,
    shards: Sequence[Sequence[Row]],
    settings: RoundSettings,
    *,
    evaluation: Sequence[Row] = (),
    figures: Judge = as_classes,
    every: int = 0,
    report: Report,
) -> Trained:
    """Run all rounds, or as many as there are before every loss is lost.

    Args:
        engine: of all nodes.
        mask: of the run.
        shards: each node's rows.
        settings: of the rounds.
        evaluation: rows for the points of the curve, one `every` so many rounds; 0: none.
        figures: what the task makes of scores.
        report: takes the share that is done, with every update.

    Raises:
        Exception: what the engine failed with.
    """
    counting, watch, curve = CountingEngine(engine), Stopwatch(), list[tuple[int, float, float, float]]()
    parts = [NodePart(f"node-{number}", counting, rows) for number, rows in enumerate(shards)]
    traffic = Traffic(settings.count * len(parts), report)
    federation = Federation(settings, mask, parts, routed=traffic.routed, delivered=traffic.delivered)
    ended = None
    federation.start()
    for target in [*(range(every, settings.count, every) if every else ()), settings.count]:
        with watch.running():
            ended = _until(federation, counting, target)
        if ended is not None:
            break
        if every:
            engine.write(federation.theta)
            with np.errstate(all="ignore"):  # what diverges may hold anything
                found = evaluate(engine, evaluation, figures=figures)
            curve.append((target, found.accuracy, found.loss, round(watch.cpu, 2)))
    return Trained(
        theta=federation.theta,
        rounds=federation.version,
        passes=counting.passes,
        cpu_seconds=watch.cpu,
        wall_seconds=watch.wall,
        bytes_up=traffic.up / len(parts),
        bytes_down=traffic.down / len(parts),
        refused=sum(record.verdict not in NOT_REFUSED for records in federation.records for record in records),
        judgements=federation.judgements,
        gradips=_gradips(federation),
        ended=ended,
        curve=curve,
    )


def _until(federation: Federation, engine: CountingEngine, entries: int) -> str | None:
    """Run up to so many entries; returns what ended it before."""
    while (version := federation.version) < entries:
        deadline = federation.clock.now() + federation.settings.deadline_s
        federation.run(deadline, lambda: bool(federation.version > version or federation.errors or engine.error))
        if engine.error is not None:
            raise engine.error
        if federation.errors:
            return str(federation.errors[0][1])
        if federation.version == version:
            return "no round closed before its deadline"
        if all(record.verdict in UNUSABLE for record in federation.store.records(version)):
            return f"no update of round {version} has numbers that can be used"
    return None


def _gradips(federation: Federation) -> list[NodeGradIP]:
    return [
        NodeGradIP(version, record.node, gradip(record.scalars, products[lane_of(record.slot, len(products))]))
        for version, (records, products) in enumerate(zip(federation.records, federation.products, strict=True))
        if products and federation.settings.calibrates(version)
        for record in records
    ]


def train_first_order(
    cell: Cell, engine: TransformersEngine, mask: Mask, shards: Sequence[Sequence[Row]], report: Report
) -> Trained:
    """AdamW with back-propagation on all nodes' rows in one place: a bound, no federation.

    A step takes the next nodes × batch_size rows of one shuffled order of them all, whoever's they are.
    """
    assert cell.lr is not None
    watch, steps = Stopwatch(), cell.gradient_steps
    with watch.running():
        theta = first_order(
            engine,
            mask.theta_0,
            [row for shard in shards for row in shard],
            steps=steps,
            lr=cell.lr,
            batch_size=cell.plan.nodes * cell.plan.batch_size,
            seed=cell.seed,
            progress=lambda done, total: report(done / total),
        )
    return Trained(theta, 0, PASSES_OF_A_GRADIENT * cell.plan.nodes * steps, watch.cpu, watch.wall)


def diverged(trained: Trained, after: Evaluation, before: Evaluation, classes: int) -> bool:
    """Whether training broke the model.

    It ended before its time; or left a loss that is not finite, or over 1.1 × that before and that of a guess, ln C; or
    one over 1.5 × that before, with a lower accuracy than before. A task without classes has no such guess.
    """
    return (
        trained.ended is not None
        or not math.isfinite(after.loss)
        or after.loss > WORSE_THAN_A_GUESS * max(before.loss, math.log(max(1, classes)))
        or (after.loss > WORSE_THAN_BEFORE * before.loss and after.accuracy < before.accuracy)
    )
