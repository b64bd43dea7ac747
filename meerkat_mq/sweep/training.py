"""Training a cell: a federation in memory, or first-order steps on the same mask; what it cost."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import gradip
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.engines.evaluate import evaluate, first_order
from meerkat_mq.engines.torch.engine import Prepared, TransformersEngine
from meerkat_mq.errors import BadValue, RunError
from meerkat_mq.rounds.guards import NOT_REFUSED
from meerkat_mq.rounds.memory import SERVER, MemoryFederation, MemoryNode
from meerkat_mq.rounds.policy import RoundSettings, lane_of
from meerkat_mq.rounds.records import Judgement, Verdict
from meerkat_mq.sweep.plan import PASSES_OF_A_GRADIENT
from meerkat_mq.tasks.task import Evaluation
from meerkat_mq.wire.frames import Frame, Update, encode

LOOK_S = 0.004  # virtual: between two looks at the federation, less than a round lasts
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
    """An engine that counts forward passes."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.passes = 0
        self.write = engine.write
        self.prepare = engine.prepare

    def losses(self, batch: Prepared) -> Float32Array:
        """As the engine's."""
        self.passes += 1
        return self._engine.losses(batch)


@dataclass
class Traffic:
    """Counts the bytes of every frame that is delivered, and tells how far the run is."""

    settings: RoundSettings
    report: Report
    sample: Callable[[], None]
    up: int = 0
    down: int = 0
    _frame: Frame | None = None
    _size: int = 0

    def __call__(self, sender: str, receiver: str, frame: Frame) -> Sequence[float]:
        """Deliver it once, after a millisecond."""
        if frame is not self._frame:  # a round's frame goes to every node
            self._frame, self._size = frame, len(encode(frame))
        if receiver == SERVER:
            self.up += self._size
        else:
            self.down += self._size
        if isinstance(frame, Update):
            self.report(frame.header.version / self.settings.count)
            self.sample()
        return (0.001,)


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

    def train(self) -> Trained:
        """Run all rounds, or as many as there are before every loss is lost."""
        engine = CountingEngine(self.engine)
        nodes = [MemoryNode(f"node-{number}", engine, rows, self.batch_size) for number, rows in enumerate(self.shards)]
        traffic = Traffic(self.settings, self.report, self.sample)
        federation = MemoryFederation(
            self.settings, self.mask, nodes, digest_every=self.settings.digest_every, deliver=traffic
        )
        ended, curve = None, list[tuple[int, float, float]]()
        federation.start()
        for target in self._targets():
            self.watch.start()
            ended = self._until(federation, target)
            self.watch.stop()
            if ended is not None:
                break
            if self.every:
                self.engine.write(federation.replica.theta)
                with np.errstate(all="ignore"):  # what diverges may hold anything
                    found = evaluate(self.engine, self.evaluation)
                curve.append((target, found.accuracy, found.loss))
        verdicts = Counter(record.verdict for records in federation.records for record in records)
        return Trained(
            theta=federation.replica.theta,
            rounds=len(federation.entries),
            passes=engine.passes,
            cpu_seconds=self.watch.cpu,
            wall_seconds=self.watch.wall,
            bytes_up=traffic.up / len(nodes),
            bytes_down=traffic.down / len(nodes),
            refused=sum(count for verdict, count in verdicts.items() if verdict not in NOT_REFUSED),
            judgements=federation.judgements,
            gradips=_gradips(federation),
            ended=ended,
            curve=curve,
        )

    def _targets(self) -> Sequence[int]:
        count = self.settings.count
        return [*range(self.every, count, self.every), count] if self.every else [count]

    def _until(self, federation: MemoryFederation, entries: int) -> str | None:
        """Run up to so many entries; returns what ended it before."""
        last_s = federation.now + self.settings.deadline_s
        while len(federation.entries) < entries:
            before = len(federation.entries)
            try:
                federation.run(until=federation.now + LOOK_S)
            except (RunError, BadValue) as error:
                return str(error)
            if federation.errors:
                return str(federation.errors[0][1])
            if federation.records and all(record.verdict in UNUSABLE for record in federation.records[-1]):
                return f"no update of round {len(federation.records) - 1} has numbers that can be used"
            if len(federation.entries) > before:
                last_s = federation.now + self.settings.deadline_s
            elif federation.now > last_s:
                return "no round closed before its deadline"
        return None


def _gradips(federation: MemoryFederation) -> list[NodeGradIP]:
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
