"""A run's report from its state_dir: running, interrupted or finished. Only reads, also while a server writes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from meerkat_mq.core import metrics as m
from meerkat_mq.core.clocks import elapsed
from meerkat_mq.core.path import NO_DIGEST
from meerkat_mq.ledger.inspect import PAGE, measured
from meerkat_mq.ledger.losses import RisingLoss, mean_loss, watched_loss
from meerkat_mq.ledger.run import settings_of
from meerkat_mq.ledger.shown import utc
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.store import Closed, NodeRow, Term
from meerkat_mq.ledger.verify import run_of
from meerkat_mq.observe.charts import Point
from meerkat_mq.observe.events import Evaluated
from meerkat_mq.observe.figures import Magnitudes
from meerkat_mq.observe.measure import measure_of
from meerkat_mq.observe.report import NodeFacts, NodeReport, Report, Standing, facts_of
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import NOT_REFUSED, UpdateRecord
from meerkat_mq.server.alive import is_alive
from meerkat_mq.tasks.load import task_of
from meerkat_mq.wire.messages import in_words

PAGE_FILE = "report.html"
Progress = Callable[[int, int], None]


def read_report(folder: Path, progress: Progress = lambda done, total: None) -> Report:
    """The report of the run in a state_dir; `progress` is told how many rounds are read, of how many.

    Raises:
        LedgerError: there is no ledger, or it cannot be used.
        ConfigError: the facts beside it cannot be used.
    """
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        run, version = run_of(ledger), ledger.version
        facts, settings = facts_of(folder, run), settings_of(run, ledger.rules)
        history, rows, metrics = _History(ledger, settings), ledger.nodes(), ledger.metrics()
        for closed in _closed(ledger, version):
            history.take(closed, ledger.records(closed.entry.version))
            progress(closed.entry.version + 1, version)
        evaluations = _evaluations(metrics, history.rising)
        terms = ledger.terms()
        history.counts |= {m.STARTED: len(terms)} if len(terms) > 1 else {}
        known = vars(facts) | {
            "model": facts.model or run.model or f"{run.engine} engine",
            "seconds": history.seconds(terms) if facts.seconds is None else facts.seconds,
            "counts": facts.counts or history.counts,
            "nodes": {row.node: _node(row, history, facts.nodes.get(row.node, NodeFacts())) for row in rows},
        }
        return Report(
            **known,
            descriptor=run,
            standing=_standing(version >= run.count, is_alive(folder, terms[-1].host if terms else "")),
            closed=version,
            losses=history.losses,
            evaluations=evaluations,
            at=utc(time.time()),
            digest=history.digest,
            classes=task_of(run.task).classes if run.task else (),
            magnitudes={node: found.points for node, found in sorted(history.magnitudes.items())},
            judgements={found.node: found for found in ledger.newest_judgements()},
            early_stopping=settings.early_stopping,
            warning=history.rising.warning,
        )


def _closed(ledger: Ledger, version: int) -> Iterator[Closed]:
    """The rounds before a version: those that close while it is read are not of this report."""
    for start in range(0, version, PAGE):
        yield from ledger.closed(start, min(PAGE, version - start))


def _standing(finished: bool, alive: bool | None) -> Standing:
    if finished:
        return Standing.FINISHED
    return Standing.UNKNOWN if alive is None else Standing.RUNNING if alive else Standing.INTERRUPTED


@dataclass
class _History:
    """What the closed rounds add up to, round by round.

    Attributes:
        proven: node to the newest version whose theta it was seen to hold, by the digest in an update.
    """

    ledger: Ledger
    settings: RoundSettings
    losses: list[Point] = field(default_factory=list)
    rising: RisingLoss = field(default_factory=RisingLoss)
    counts: Counter[str] = field(default_factory=Counter)
    updates: Counter[str] = field(default_factory=Counter)  # of each node
    proven: dict[str, int] = field(default_factory=dict)
    magnitudes: dict[str, Magnitudes] = field(default_factory=dict)
    digest: str = ""  # the newest, hex
    closings: list[tuple[int, float]] = field(default_factory=list)

    def take(self, closed: Closed, records: Sequence[UpdateRecord]) -> None:
        """A round, and the updates that closed with it."""
        version = closed.entry.version
        loss, watched = mean_loss(records), watched_loss(records)
        self.losses += [] if loss is None else [(version, loss)]
        if watched is not None:
            self.rising.closed(version, watched)
        self.counts[m.DEADLINE] += closed.overdue
        self.closings.append((closed.term, closed.closed))
        if closed.entry.digest != NO_DIGEST:
            self.digest = closed.entry.digest.hex()
        for record in records:
            self.updates[record.node] += 1
            checked = record.version - record.version % self.settings.digest_every
            self.proven[record.node] = max(checked, self.proven.get(record.node, 0))
            if record.verdict not in NOT_REFUSED:
                self.counts[m.REFUSED.of(in_words(record.verdict))] += 1
        self.counts = +self.counts
        if self.settings.local_steps > 1:  # over rounds of one step each, GradIP says nothing
            for record, found in measured(self.ledger, self.settings, records):
                magnitudes = self.magnitudes.setdefault(record.node, Magnitudes())
                for value in found:
                    magnitudes.add(value)

    def seconds(self, terms: Sequence[Term]) -> float | None:
        """That servers worked on the rounds, about: pauses between a server and the next do not count."""
        taken = {term.term: term.taken for term in terms}
        spans, before = [], (0, 0.0)
        for term, at in self.closings:
            began = before[1] if term == before[0] else taken.get(term, at)
            spans.append(elapsed(began, at) or 0.0)
            before = term, at
        return sum(spans) if spans else None


def _evaluations(metrics: Mapping[int, Mapping[str, float]], rising: RisingLoss) -> list[Evaluated]:
    for version, figures in sorted(metrics.items()):
        if "loss" in figures:
            rising.evaluated(version, figures["loss"])
    return [
        Evaluated(version=version, rows=int(figures.get("rows", 0)), figures=figures)
        for version, figures in sorted(metrics.items())
        if measure_of(figures) is not None
    ]


def _node(row: NodeRow, history: _History, facts: NodeFacts) -> NodeReport:
    known = vars(facts) | {"sent_bytes": row.packet_bytes if facts.sent_bytes is None else facts.sent_bytes}
    return NodeReport(
        **known,
        updates=history.updates[row.node],
        rows=sum(facts.labels) if facts.labels else row.rows,
        proven=history.proven.get(row.node),
    )
