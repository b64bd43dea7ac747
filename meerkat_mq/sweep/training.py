"""Training a cell: a federation in memory, or first-order steps on the same mask; what it cost."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import gradip
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.engines.evaluate import evaluate, first_order
from meerkat_mq.engines.torch.engine import Prepared, TransformersEngine
from meerkat_mq.rounds.guards import NOT_REFUSED
from meerkat_mq.rounds.policy import RoundSettings, lane_of
from meerkat_mq.rounds.records import Judgement, Verdict
from meerkat_mq.sweep.plan import PASSES_OF_A_GRADIENT
from meerkat_mq.tasks.task import Evaluation
from meerkat_mq.wire.topics import Topics
from meerkat_mq.worlds.broker import Message
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.quiet import quiet
from meerkat_mq.worlds.run import FEDERATION

UNUSABLE = (Verdict.NOT_FINITE, Verdict.TOO_LARGE)
WORSE_THAN_A_GUESS = 1.1
WORSE_THAN_BEFORE = 1.5

Report = Callable[[float], None]


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
        curve: (round, accuracy, loss).
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
    curve: Sequence[tuple[int, float, float]] = ()


@dataclass
class Stopwatch:
    """CPU and wall seconds of the stretches between `start` and `stop`."""

    cpu: float = 0.0
    wall: float = 0.0
    _began: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """A stretch begins."""
        self._began = (time.process_time(), time.monotonic())

    def stop(self) -> None:
        """It ends."""
        self.cpu += time.process_time() - self._began[0]
        self.wall += time.monotonic() - self._began[1]


class CountingEngine:
    """An engine that counts forward passes.

    Attributes:
        error: what it failed with; a node would only say that it failed.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.passes = 0
        self.error: Exception | None = None

    def write(self, theta: Float32Array) -> None:
        """As the engine's."""
        with self._noting():
            self._engine.write(theta)

    def prepare(self, rows: Sequence[Row]) -> Prepared:
        """As the engine's."""
        with self._noting():
            return self._engine.prepare(rows)

    def losses(self, batch: Prepared) -> Float32Array:
        """As the engine's."""
        self.passes += 1
        with self._noting():
            return self._engine.losses(batch)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = error
            raise


class Traffic:
    """Counts the bytes of every frame, up as it reaches the broker, down as it reaches a node; tells how far a run is.

    Args:
        updates: that the run will take.
        report: takes the share of them that has come.
        sample: called with every update.

    Attributes:
        up: bytes of all nodes' frames; down: of all frames to them.
    """

    def __init__(self, updates: int, report: Report, sample: Callable[[], None]) -> None:
        self.up = self.down = 0
        root = Topics(FEDERATION).root
        self._to_nodes = tuple(f"{root}/{kind}" for kind in ("round", "down/", "values"))
        self._updates = updates
        self._came = 0
        self._report = report
        self._sample = sample

    def routed(self, message: Message) -> None:
        """A message has reached the broker."""
        if message.topic.endswith(("/update", "/want")):
            self.up += len(message.payload)
        if message.topic.endswith("/update"):
            self._came += 1
            self._report(min(1.0, self._came / self._updates))
            self._sample()

    def delivered(self, message: Message) -> None:
        """A message has reached a client."""
        if message.topic.startswith(self._to_nodes):
            self.down += len(message.payload)


@dataclass
class Federated:
    """One federated cell.

    Attributes:
        every: rounds between points of the curve; 0: none.
        sample: called at least once a round.
    """

    engine: TransformersEngine
    mask: Mask
    settings: RoundSettings
    shards: Sequence[Sequence[Row]]
    batch_size: int
    evaluation: Sequence[Row]
    every: int
    report: Report
    sample: Callable[[], None]
    watch: Stopwatch = field(default_factory=Stopwatch)

    @quiet()
    def train(self) -> Trained:
        """Run all rounds, or as many as there are before every loss is lost.

        Raises:
            Exception: what the engine failed with.
        """
        engine, settings = CountingEngine(self.engine), self.settings
        parts = [NodePart(f"node-{number}", engine, rows) for number, rows in enumerate(self.shards)]
        traffic = Traffic(settings.count * len(parts), self.report, self.sample)
        federation = Federation(
            settings.model_copy(update={"batch_size": self.batch_size}),
            self.mask,
            parts,
            routed=traffic.routed,
            delivered=traffic.delivered,
        )
        ended, curve = None, list[tuple[int, float, float]]()
        federation.start()
        for target in self._targets():
            self.watch.start()
            ended = self._until(federation, engine, target)
            self.watch.stop()
            if ended is not None:
                break
            if self.every:
                self.engine.write(federation.theta)
                with np.errstate(all="ignore"):  # what diverges may hold anything
                    found = evaluate(self.engine, self.evaluation)
                curve.append((target, found.accuracy, found.loss))
        verdicts = Counter(record.verdict for records in federation.records for record in records)
        return Trained(
            theta=federation.theta,
            rounds=federation.version,
            passes=engine.passes,
            cpu_seconds=self.watch.cpu,
            wall_seconds=self.watch.wall,
            bytes_up=traffic.up / len(parts),
            bytes_down=traffic.down / len(parts),
            refused=sum(count for verdict, count in verdicts.items() if verdict not in NOT_REFUSED),
            judgements=federation.judgements,
            gradips=_gradips(federation),
            ended=ended,
            curve=curve,
        )

    def _targets(self) -> Sequence[int]:
        count = self.settings.count
        return [*range(self.every, count, self.every), count] if self.every else [count]

    def _until(self, federation: Federation, engine: CountingEngine, entries: int) -> str | None:
        """Run up to so many entries; returns what ended it before."""
        while (version := federation.version) < entries:
            over = partial(_is_over, federation, engine, version)
            federation.run(federation.clock.now() + self.settings.deadline_s, over)
            if engine.error is not None:
                raise engine.error
            if federation.errors:
                return str(federation.errors[0][1])
            if federation.version == version:
                return "no round closed before its deadline"
            if all(record.verdict in UNUSABLE for record in federation.store.records(version)):
                return f"no update of round {version} has numbers that can be used"
        return None


def _is_over(federation: Federation, engine: CountingEngine, version: int) -> bool:
    """Whether a round is, or the whole run."""
    return federation.version > version or bool(federation.errors) or engine.error is not None


def _gradips(federation: Federation) -> list[NodeGradIP]:
    return [
        NodeGradIP(version, record.node, gradip(record.scalars, products[lane_of(record.slot, len(products))]))
        for version, (records, products) in enumerate(zip(federation.records, federation.products, strict=True))
        if products and federation.settings.calibrates(version)
        for record in records
    ]


def train_first_order(
    engine: TransformersEngine,
    mask: Mask,
    rows: Sequence[Row],
    *,
    nodes: int,
    batch_size: int,
    steps: int,
    lr: float,
    seed: int,
    report: Report,
    sample: Callable[[], None],
) -> Trained:
    """AdamW with back-propagation on all nodes' rows in one place: a bound, no federation.

    A step takes the next nodes × batch_size rows of one shuffled order of them all, whoever's they are.
    """

    def progress(done: int, total: int) -> None:
        report(done / total)
        sample()

    watch = Stopwatch()
    watch.start()
    theta = first_order(
        engine, mask.theta_0, rows, steps=steps, lr=lr, batch_size=nodes * batch_size, seed=seed, progress=progress
    )
    watch.stop()
    return Trained(theta, 0, PASSES_OF_A_GRADIENT * nodes * steps, watch.cpu, watch.wall)


def diverged(trained: Trained, after: Evaluation, before: Evaluation, classes: int) -> bool:
    """Whether training broke the model.

    It ended before its time; or left a loss that is not finite, or over 1.1 × that before and that of a guess, ln C; or
    one over 1.5 × that before, with a lower accuracy than before.
    """
    return (
        trained.ended is not None
        or not math.isfinite(after.loss)
        or after.loss > WORSE_THAN_A_GUESS * max(before.loss, math.log(classes))
        or (after.loss > WORSE_THAN_BEFORE * before.loss and after.accuracy < before.accuracy)
    )
