"""What people get to see of a run: rounds as they close, evaluations, and how it ended."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

import structlog

from meerkat_mq.core import metrics as m
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import gradip
from meerkat_mq.core.path import digest
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import reason
from meerkat_mq.ledger.losses import RisingLoss, mean_loss, watched_loss
from meerkat_mq.ledger.rows import Products, Sighting
from meerkat_mq.mqtt import MessageCount
from meerkat_mq.observe.events import Evaluated, Observer, RoundClosed, RunFinished, Warned
from meerkat_mq.observe.figures import log_keys, rounded
from meerkat_mq.rounds.events import EntryCommitted
from meerkat_mq.rounds.guards import NOT_REFUSED
from meerkat_mq.rounds.policy import lane_of
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.server.evaluation import Evaluator
from meerkat_mq.tasks.task import Evaluation
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor
from meerkat_mq.wire.frames import MAX_SLOTS

LAST_WORDS_S = 10.0


class Monitor:
    """Tells the observer and the log; evaluates theta beside the rounds.

    Attributes:
        statuses: the last status of each node.
        counts: everything counted, by reason.
    """

    def __init__(
        self,
        observer: Observer,
        evaluator: Evaluator | None,
        every: int,
        run: RunDescriptor,
        rising: RisingLoss | None = None,
    ) -> None:
        """Look on at a run.

        Args:
            observer: is told.
            evaluator: of theta, if there is one.
            every: rounds between evaluations.
            run: what is run.
            rising: watches its loss, from where the ledger stands; default: from its first round.
        """
        self.statuses: dict[str, NodeStatus] = {}
        self.counts: Counter[str] = Counter()
        self._observe = observer
        self._evaluator = evaluator
        self._every = every
        self._rounds = run.count
        self._window = run.max_staleness
        self._products: dict[int, Products] = {}
        self._log = structlog.get_logger().bind(federation=run.federation, run=run.run[:8])
        self._began: float | None = None
        self._due: tuple[int, float, Float32Array] | None = None
        self._is_due, self._evaluated = asyncio.Event(), asyncio.Event()
        self._evaluated.set()
        self._seldom = Seldom()
        self._spoken = asyncio.Event()
        self._noted: dict[str, tuple[NodeStatus, int, int]] = {}
        self._rising = rising or RisingLoss()

    def _seconds(self) -> float:
        now = asyncio.get_running_loop().time()
        self._began = now if self._began is None else self._began
        return now - self._began

    def opened(self) -> None:
        """The first round opens: the run's clock starts."""
        self._seconds()

    def stood(self, version: int, theta: Float32Array) -> None:
        """theta stands at a version; evaluate it if that is due. Of those that wait only the newest one is kept."""
        if self._evaluator is None or (version % self._every and version != self._rounds):
            return
        if self._due is not None:
            self.counts[m.EVALUATION_LEFT_OUT] += 1
        self._due = version, self._seconds() if version else 0.0, theta
        self._evaluated.clear()
        self._is_due.set()

    def closed(self, commit: EntryCommitted, online: int, bytes_up: int) -> None:
        """A round was committed."""
        records = [found for found in commit.records if found.verdict in NOT_REFUSED]
        loss = mean_loss(commit.records)
        recent = {
            version: found for version, found in self._products.items() if version >= commit.version - self._window
        }
        self._products = recent | {commit.version: commit.products}
        paths = {found.node: path for found in records if (path := self._gradip(found))}
        event = RoundClosed(
            commit.version,
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
        """A node said where it stands."""
        if node not in self.statuses and len(self.statuses) >= MAX_SLOTS:
            self.counts[m.TOO_MANY_NODES] += 1
            return
        self.statuses[node] = status
        if all(self._has_spoken(status) for status in self.statuses.values()):
            self._spoken.set()

    def _has_spoken(self, status: NodeStatus) -> bool:
        return status.status in ("lost", "stopped", "asleep") or status.version == self._rounds

    def sightings(self, received: Mapping[str, MessageCount]) -> tuple[Sighting, ...]:
        """What is new of nodes since the last call; `received` counts by "kind/node"."""
        news, now = list[Sighting](), time.time()
        for node, status in self.statuses.items():
            counts = {kind: received.get(f"{kind}/{node}") or MessageCount() for kind in ("update", "want", "status")}
            standing = (status, counts["update"].messages, sum(count.packet_bytes for count in counts.values()))
            before, self._noted[node] = self._noted.get(node, (None, 0, 0)), standing
            if standing != before:
                more = standing[1] - before[1], standing[2] - before[2]
                news.append(Sighting(node, status.boot, status.host, status.status, status.rows, now, *more))
        return tuple(news)

    async def run(self, keep: Callable[[int, Mapping[str, float]], None]) -> None:
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

    def _tell(
        self, version: int, seconds: float, found: Evaluation, keep: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        said = {name: rounded(value, 4) for name, value in found.figures.items()}
        self._log.info("evaluated", version=version, **said)
        self._observe(Evaluated(version, seconds, found.rows, found.figures))
        self._warn(self._rising.evaluated(version, found.loss))
        figures = {**found.figures, "rows": float(found.rows)}
        keep(version, {name: value for name, value in figures.items() if math.isfinite(value)})

    async def finish(self, theta: Float32Array, updates: Mapping[str, MessageCount]) -> None:
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
        self._observe(
            RunFinished(self._rounds, seconds, final, dict(self.statuses), dict(updates), dict(self.counts))
        )  # fmt: skip
