"""What people get to see of a run: rounds as they close, evaluations on held-out data, and how it ended."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import structlog

from meerkat_mq.config import ServerConfig
from meerkat_mq.core import metrics as m
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import gradip
from meerkat_mq.core.path import digest
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.engines.evaluate import as_classes, evaluate
from meerkat_mq.engines.prefix import keeping
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import entry_of, make_engine, try_out, usable
from meerkat_mq.errors import ConfigError, printable, reason, within
from meerkat_mq.ledger.losses import RisingLoss, mean_loss, watched_loss
from meerkat_mq.ledger.run import (
    UNSEEN_AFTER,
    Run,
    early_stopping_in_words,
    mode_in_words,
    trust_in_words,
    unseen_in_words,
)
from meerkat_mq.ledger.store import Products, Sighting, with_flag
from meerkat_mq.mqtt import MessageCount
from meerkat_mq.observe.events import Evaluated, Observer, RoundClosed, RunFinished, RunStarted, Warned
from meerkat_mq.observe.figures import log_keys, rounded
from meerkat_mq.rounds.events import CommitEntry
from meerkat_mq.rounds.policy import lane_of
from meerkat_mq.rounds.records import NOT_REFUSED, UpdateRecord
from meerkat_mq.runtime.ports import ServerMonitor
from meerkat_mq.runtime.writer import KeepMetrics
from meerkat_mq.tasks.data import read_rows
from meerkat_mq.tasks.load import task_of
from meerkat_mq.tasks.task import Evaluation
from meerkat_mq.wire.descriptor import NodeStatus

LAST_WORDS_S = 10.0


class Evaluator:
    """The server's own model, looked at through theta."""

    def __init__(self, config: ServerConfig, run: Run) -> None:
        """Load model and data; slow. They may not fit the mask, or the task: MeerkatError."""
        assert config.evaluation is not None
        name, model, described = config.engine, config.model, run.descriptor.task
        task = None if described is None else task_of(described)
        if task is not None and entry_of(name).task == "needed" and model is None:
            raise ConfigError("evaluation", "needs a [model] section", "add model.source, or drop [evaluation]")
        read = entry_of(name).read if task is None else partial(read_rows, task=task)
        with within("evaluation.data"):
            rows = read(config.evaluation.data)
        completion = run.descriptor.completion_fingerprint
        setup = Setup(run.mask, task, keep=keeping(config.prefix, config.state_dir), completion=completion)
        if model is not None:
            adapter = None if model.adapter is None else str(model.adapter)
            setup = replace(setup, model=model.source, dtype=model.dtype, device=model.device, adapter=adapter)
        with nullcontext() if model is None else within("model.source"):
            self._engine = make_engine(name, setup, "evaluation")
        with within("evaluation.data"):
            self._rows = usable(self._engine, rows)
        try_out(name, self._engine, run.mask.theta_0, self._rows)
        self._figures = as_classes if task is None else task.evaluation
        self._batch_size = config.evaluation.batch_size

    async def evaluate(self, theta: Float32Array) -> Evaluation:
        """What the task makes of theta."""
        return await asyncio.to_thread(self._evaluate, theta)

    def _evaluate(self, theta: Float32Array) -> Evaluation:
        self._engine.write(theta)
        return evaluate(self._engine, self._rows, self._batch_size, self._figures)


class Monitor(ServerMonitor):
    """Tells the observer and the log; evaluates theta beside the rounds.

    Attributes:
        statuses: the last status of each node.
        counts: everything counted, by reason.
        received: what came to the server, by "kind/node".
        online: how many nodes are.
        finished: set once the run's end has been published.
        enough_nodes: set once a round can open.
    """

    def __init__(
        self,
        observer: Observer,
        evaluator: Evaluator | None,
        every: int,
        run: Run,
        rising: RisingLoss | None = None,
    ) -> None:
        """Look on at a run; `every` are the rounds between evaluations.

        `rising` watches the loss from where the ledger stands; by default, from its first round.
        """
        self.statuses: dict[str, NodeStatus] = {}
        self.counts: Counter[str] = Counter()
        self.received: Mapping[str, MessageCount] = {}
        self.online = 0
        self.finished, self.enough_nodes = asyncio.Event(), asyncio.Event()
        self._observe = observer
        self._evaluator = evaluator
        self._every = every
        self._run = run
        self._is_first_term = True
        self._rounds = run.settings.count
        self._products: dict[int, Products] = {}
        self._log = structlog.get_logger().bind(federation=run.descriptor.federation, run=run.descriptor.run[:8])
        self._began: float | None = None
        self._due: tuple[int, float, Float32Array] | None = None
        self._is_due, self._evaluated = asyncio.Event(), asyncio.Event()
        self._evaluated.set()
        self._seldom = Seldom()
        self._spoken = asyncio.Event()
        self._spoken.set()  # until it is asked about, for that takes a look at each node
        self._noted: dict[str, tuple[NodeStatus, str, int, int]] = {}
        self._rising = rising or RisingLoss()
        self._closed = 0

    def _seconds(self) -> float:
        now = asyncio.get_running_loop().time()
        self._began = now if self._began is None else self._began
        return now - self._began

    def counted(self, reason: str) -> None:
        """Something noteworthy happened."""
        self.counts[reason] += 1

    def took_term(self, term: int) -> None:
        """This server is in charge: say once what kind of run it is."""
        if not self._is_first_term:
            return
        self._is_first_term, settings = False, self._run.settings
        if said := mode_in_words(settings):
            self._log.info("mode", how=said)
        if said := trust_in_words(settings):
            self._log.warning("nothing compares updates", means=said)
        if said := early_stopping_in_words(settings):
            self._log.info("early stopping", how=said)
        self._observe(RunStarted(self._run.descriptor))

    def changed(self, online: int, *, is_open: bool, finished: bool) -> None:
        """The machine was told something; with the first open round, the run's clock starts."""
        self.online = online
        if is_open:
            self._seconds()
        if finished:
            self.finished.set()
        if finished or is_open or online >= self._run.settings.fewest_nodes:
            self.enough_nodes.set()

    def stood(self, version: int, theta: Float32Array) -> None:
        """theta stands at a version; evaluate it if that is due. Of those that wait only the newest one is kept."""
        if self._evaluator is None or (version % self._every and version != self._rounds):
            return
        if self._due is not None:
            self.counts[m.EVALUATION_LEFT_OUT] += 1
        self._due = version, self._seconds() if version else 0.0, theta
        self._evaluated.clear()
        self._is_due.set()

    def closed(self, commit: CommitEntry, online: int) -> None:
        """A round was committed."""
        self._closed += 1
        if self._closed == UNSEEN_AFTER and (said := unseen_in_words(self._run.settings, self.statuses, self._closed)):
            self._log.warning("trusted nodes were not seen", problem=said)
            self._observe(Warned(said))
        version = commit.entry.version
        bytes_up = sum(count.payload_bytes for count in self._updates().values())
        oldest = version - self._run.settings.max_staleness
        records = [found for found in commit.records if found.verdict in NOT_REFUSED]
        loss = mean_loss(commit.records)
        recent = {at: found for at, found in self._products.items() if at >= oldest}
        self._products = recent | {version: commit.products}
        paths = {found.node: path for found in records if (path := self._gradip(found))}
        event = RoundClosed(
            version,
            self._seconds(),
            math.nan if loss is None else loss,
            len(commit.records),
            online,
            bytes_up,
            paths,
            commit.judgements,
        )
        self._log.info("round closed", round=event.round, loss=rounded(event.loss, 5), heard=event.heard, online=online)
        self._observe(event)
        if (watched := watched_loss(commit.records)) is not None:
            self._warn(self._rising.closed(event.round, watched))

    def _warn(self, text: str) -> None:
        if text:
            self._log.warning("the run goes wrong", problem=text)
            self._observe(Warned(text))

    def _gradip(self, record: UpdateRecord) -> tuple[float, ...]:
        """Of an update, along the directions of its own version; () where these are not measured, or not known here."""
        products = self._products.get(record.version, ())
        return gradip(record.scalars, products[lane_of(record.slot, len(products))]) if products else ()

    def heard_from(self, node: str, status: NodeStatus) -> None:
        """A node said where it stands, or why it takes no part."""
        before, self.statuses[node] = self.statuses.get(node), status
        if status.refuses is not None and (before is None or before.refuses != status.refuses):
            self.counts[m.REFUSES] += 1
            self._seldom.say(
                self._log.warning, "a node refuses the run", node, node=node, problem=printable(status.refuses)
            )
        if status.signal is not None and (before is None or before.signal is None):
            self.counts[m.NOISY] += 1
            self._seldom.say(self._log.warning, m.NOISY, node, node=node, signal_to_noise=status.signal)
        if not self._spoken.is_set() and all(map(self._has_spoken, self.statuses.values())):
            self._spoken.set()

    def _has_spoken(self, status: NodeStatus) -> bool:
        over = status.status in ("lost", "stopped", "asleep") or status.refuses is not None
        return over or status.version == self._rounds

    def _updates(self) -> dict[str, MessageCount]:
        return {
            kind.removeprefix("update/"): count for kind, count in self.received.items() if kind.startswith("update/")
        }

    def sightings(self, flagged: Callable[[str], str] = lambda node: "") -> tuple[Sighting, ...]:
        """What is new of nodes since the last call; `flagged` says why one stands out by what it sends, or ""."""
        news, now = list[Sighting](), time.time()
        for node, status in self.statuses.items():
            counts = {
                kind: self.received.get(f"{kind}/{node}") or MessageCount() for kind in ("update", "want", "status")
            }
            noise = "" if status.signal is None else f"{m.NOISY}: signal to noise {status.signal:.3g}"
            said = with_flag(status.in_words, "; ".join(filter(None, (flagged(node), noise))))
            standing = (status, said, counts["update"].messages, sum(count.packet_bytes for count in counts.values()))
            before, self._noted[node] = self._noted.get(node, (None, "", 0, 0)), standing
            if standing != before:
                more = standing[2] - before[2], standing[3] - before[3]
                news.append(Sighting(node, status.boot, status.host, said, status.rows, now, *more))
        return tuple(news)

    async def run(self, keep: Callable[[KeepMetrics], None]) -> None:
        """Evaluate until cancelled; `keep` takes what was found of each version.

        What a model raises costs the run this figure, and nothing else.
        """
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            assert self._due is not None
            assert self._evaluator is not None
            (version, seconds, theta), self._due = self._due, None
            try:
                found = await self._evaluator.evaluate(theta)
            except Exception as error:  # of any kind: CUDA out of memory, for one
                self.counts[m.EVALUATION_FAILED] += 1
                say, said = self._log.warning, {"version": version, "problem": reason(error)}
                self._seldom.say(say, m.EVALUATION_FAILED, type(error).__name__, **said)
            else:
                self._tell(version, seconds, found, keep)
            if self._due is None:
                self._evaluated.set()

    def _tell(self, version: int, seconds: float, found: Evaluation, keep: Callable[[KeepMetrics], None]) -> None:
        said = {name: rounded(value, 4) for name, value in found.figures.items()}
        self._log.info("evaluated", version=version, **said)
        self._observe(Evaluated(rows=found.rows, figures=found.figures, version=version, seconds=seconds))
        self._warn(self._rising.evaluated(version, found.loss))
        figures = {**found.figures, "rows": float(found.rows)}
        keep(KeepMetrics(version, {name: value for name, value in figures.items() if math.isfinite(value)}))

    async def finish(self, theta: Float32Array) -> None:
        """Wait for the last evaluation and for the nodes at hand to say where they stand; then tell how it ended."""
        seconds = self._seconds()
        if not all(self._has_spoken(status) for status in self.statuses.values()):
            self._spoken.clear()
            try:
                async with asyncio.timeout(LAST_WORDS_S):
                    await self._spoken.wait()
            except TimeoutError:
                self._log.warning("some nodes did not say where they stand")
        await self._evaluated.wait()
        final = digest(theta).hex()
        counted = log_keys(self.counts)
        self._log.info("run finished", rounds=self._rounds, seconds=round(seconds, 2), digest=final, **counted)
        self._observe(RunFinished(self._rounds, seconds, final, self._updates(), dict(self.counts)))
