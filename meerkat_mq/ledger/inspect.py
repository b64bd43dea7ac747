"""Looks into a ledger for people: how the run stands, closed rounds, nodes' paths and GradIP. Only reads."""

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meerkat_mq.core import metrics as m
from meerkat_mq.core.clocks import elapsed, typical
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import gradip
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import NO_DIGEST, Coefficient, seed_for, seeds_of, virtual_path
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import LedgerError, RunMismatch
from meerkat_mq.ledger.losses import mean_loss, rising_now
from meerkat_mq.ledger.run import early_stopping_in_words, mode_in_words, settings_of, unseen_in_words
from meerkat_mq.ledger.shown import (
    NodeShown,
    RebuiltShown,
    RoundShown,
    RunShown,
    StepShown,
    TermShown,
    UpdateShown,
    utc,
)
from meerkat_mq.ledger.store import Closed, NodeRow, Products, Store, by_entry, without_flag
from meerkat_mq.ledger.verify import check_mask, run_of
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import RoundSettings, lane_of, shortened
from meerkat_mq.rounds.records import NOT_REFUSED, Judgement, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import REFUSES, RunDescriptor
from meerkat_mq.wire.messages import in_words

PAGE = 200
AT_ONCE = 100


def run_shown(ledger: Store, now: float | None = None) -> RunShown:
    """The run as it stands, at a time, or now. What it costs grows with the number of calibrations, not of rounds.

    Whether its server runs, a ledger does not say: `running` is None.
    """
    now = time.time() if now is None else now
    run, version = run_of(ledger), ledger.version
    settings = settings_of(run, ledger.rules)
    guards = settings.guards
    recent = ledger.updates_of(version - guards.window, version - 1)
    past = by_entry(recent)
    flagged = Guard(guards, run.directions, past, cumulative=settings.clips).flagged
    entries = ledger.closed(max(0, version - guards.window), guards.window)
    closed = [entry.closed for entry in entries]
    newest = ledger.terms()[-1:]
    heard = ledger.open_updates()
    paths = _Paths(
        _mean_gradip(ledger, settings, past),
        {judgement.node: judgement for judgement in ledger.newest_judgements()},
        ledger.early_stopped_since(),
    )
    short = {(record.node, record.version) for records in past for record in _shortened(records, settings)}
    given = sorted((record for records in (*past, heard) for record in records), key=lambda record: record.version)
    last = {record.node: record for record in given}
    nodes = (*ledger.nodes(), *ledger.refusing())
    seen = {node.node for node in nodes}
    metrics = ledger.metrics()
    evaluated = max(metrics, default=None)
    found = metrics[evaluated] if evaluated is not None else {}
    return RunShown(
        federation=run.federation,
        run=run.run,
        running=None,
        term=newest[0].term if newest else 0,
        server_id=newest[0].server_id if newest else "",
        host=newest[0].host if newest else "",
        round=version,
        rounds=run.count,
        accuracy=found.get("accuracy"),
        held_out_loss=found.get("loss"),
        evaluated=evaluated,
        base_accuracy=metrics.get(0, {}).get("accuracy"),
        heard=len(heard),
        closed_s=elapsed(closed[-1], now) if closed else None,
        round_s=typical(closed),
        loss=mean_loss(past[-1]) if past else None,
        early_stopping=_early_stopping(settings, sum(node.node not in paths.judgements for node in ledger.nodes())),
        nodes=tuple(
            _node_shown(node, last.get(node.node), version, flagged, short=short, paths=paths, now=now)
            for node in nodes
        ),
        mode=mode_in_words(settings),
        staleness=math.fsum(entry - record.version for entry, record in recent) / len(recent) if recent else None,
        warning="; ".join(filter(None, (rising_now(ledger), unseen_in_words(settings, seen, version)))),
        figures=found,
        base_figures=metrics.get(0, {}),
        counts=_counts(past, sum(entry.overdue for entry in entries), sum(map(_refuses, nodes)), len(short)),
    )


def _shortened(records: Sequence[UpdateRecord], settings: RoundSettings) -> list[UpdateRecord]:
    """Those of an entry of whose displacement less than half counts."""
    names = set(shortened(records, settings))
    return [record for record in records if record.values is not None and record.node in names]


def _refuses(node: NodeRow) -> bool:
    return (node.status or "").startswith(REFUSES)


def _counts(past: Iterable[Sequence[UpdateRecord]], overdue: int, refusing: int, shortened: int) -> Mapping[str, int]:
    refused = Counter(found.verdict for records in past for found in records if found.verdict not in NOT_REFUSED)
    counts: dict[str, int] = {m.REFUSED.of(in_words(verdict)): count for verdict, count in sorted(refused.items())}
    others = ((m.SHORTENED, shortened), (m.DEADLINE, overdue), (m.REFUSES, refusing))
    return counts | {name: count for name, count in others if count}


def _early_stopping(settings: RoundSettings, waiting: int) -> str:
    """What it does, and how many nodes no calibration has judged yet; "" where it is off."""
    words = early_stopping_in_words(settings)
    return f"{words}; {waiting:,} not judged yet" if settings.early_stops and waiting else words


@dataclass(frozen=True)
class _Paths:
    """What virtual paths show, by node."""

    gradip: Mapping[str, float]
    judgements: Mapping[str, Judgement]
    early_stopped_since: Mapping[str, int]


def _mean_gradip(ledger: Store, settings: RoundSettings, rounds: Iterable[Sequence[UpdateRecord]]) -> dict[str, float]:
    """Node to its mean |GradIP| over the steps that were not refused."""
    sizes: dict[str, list[float]] = {}
    for records in rounds:
        for record, found in measured(ledger, settings, records):
            sizes.setdefault(record.node, []).extend(map(abs, found))
    return {node: math.fsum(found) / len(found) for node, found in sizes.items() if found}


def measured(
    ledger: Store, settings: RoundSettings, records: Sequence[UpdateRecord]
) -> Iterator[tuple[UpdateRecord, tuple[float, ...]]]:
    """The updates of a round that were not refused, each with its GradIP; not those whose version has no products."""
    products = {version: ledger.products(version, settings) for version in {record.version for record in records}}
    for record in records:
        if record.verdict in NOT_REFUSED and (found := products[record.version]):
            yield record, gradip_of(ledger, record, found)


def gradip_of(ledger: Store, record: UpdateRecord, products: Products) -> tuple[float, ...]:
    """GradIP of each projected gradient of an update; LedgerError where its round had fewer directions."""
    lane = products[lane_of(record.slot, len(products))]
    if len(record.scalars) > len(lane):
        problem = f"holds {len(record.scalars)} projected gradients of {record.node} in round {record.version}"
        raise LedgerError(ledger.where, f"{problem}, of {len(lane)} directions", "`meerkat verify` says more")
    return gradip(record.scalars, lane)


def _node_shown(
    node: NodeRow,
    last: UpdateRecord | None,
    version: int,
    flagged: Mapping[str, Verdict],
    *,
    short: Container[tuple[str, int]],
    paths: _Paths,
    now: float,
) -> NodeShown:
    judgement = paths.judgements.get(node.node)
    status, why = without_flag(node.status or "")
    return NodeShown(
        **{name: getattr(node, name) for name in ("node", "slot", "boot", "updates", "packet_bytes")},
        host=node.host or "",
        status=status,
        seen_s=None if node.last_seen is None else elapsed(node.last_seen, now),
        rows=node.rows or 0,
        behind=None if last is None else max(0, version - last.version - 1),
        verdict="" if last is None else in_words(last.verdict),
        flagged=in_words(flagged[node.node]) if node.node in flagged else why,
        gradip=paths.gradip.get(node.node),
        judged=judgement.version if judgement else None,
        rho_later=judgement.rho_later if judgement else None,
        rho_quiet=judgement.rho_quiet if judgement else None,
        early_stopped_since=paths.early_stopped_since.get(node.node),
        displacement=last.values.size if last is not None and last.values is not None else 0,
        shortened=last is not None and (last.node, last.version) in short,
    )


def rounds_shown(ledger: Store, first: int, count: int) -> Iterator[RoundShown]:
    """At most `count` closed rounds from version `first` on."""
    run = run_of(ledger)
    settings = settings_of(run, ledger.rules)
    for start in range(first, first + count, PAGE):
        page = ledger.closed(start, min(PAGE, first + count - start))
        yield from (_round_shown(run, settings, closed, ledger.records(closed.entry.version)) for closed in page)
        if len(page) < PAGE:
            return


def round_shown(ledger: Store, version: int) -> RoundShown:
    """One closed round; RunMismatch where it did not close yet."""
    for shown in rounds_shown(ledger, version, 1):
        if shown.round == version:
            return shown
    raise RunMismatch(f"round {version}", f"did not close; {ledger.version} rounds have", "name an earlier one")


def path_shown(ledger: Store, node: str, first: int, count: int) -> Iterator[UpdateShown]:
    """What a node gave from theta of version `first` on, of at most `count` versions, the open one included.

    Raises:
        RunMismatch: the ledger knows no such node.
    """
    run = run_of(ledger)
    _check_known(ledger, node)
    for start in range(first, first + count, PAGE):
        for entry, record in ledger.updates(start, min(start + PAGE, first + count), node):
            yield _update_shown(run, record, entry)
        if start > ledger.version:
            return


def _check_known(ledger: Store, node: str) -> None:
    slots = ledger.slots()
    if node not in slots:
        known = ", ".join(sorted(slots)[:5]) or "none"
        raise RunMismatch(f"node {node}", "is not in the ledger", f"it knows {known}" + ", …" * (len(slots) > 5))


def steps_shown(ledger: Store, node: str | None, first: int, count: int) -> Iterator[StepShown]:
    """GradIP of closed rounds, of one node or of all: of at most `count` rounds from version `first` on.

    Updates that were refused are left out, and rounds that closed under a server that did not keep GradIP.

    Raises:
        RunMismatch: the ledger knows no such node, or the run does not measure GradIP.
        LedgerError: what is kept of a round has not the size that it must have.
    """
    run, end = run_of(ledger), min(first + count, ledger.version)
    settings = settings_of(run, ledger.rules)
    if node is not None:
        _check_known(ledger, node)
    if ledger.version and not ledger.products(ledger.version - 1, settings):
        problem = "is not measured in this run: its mask has no pre-training gradient"
        raise RunMismatch("GradIP", problem, "score the mask of the next one: `meerkat mask`")
    for version in range(first, end):
        for record, found in measured(ledger, settings, ledger.records(version)):
            if node in (None, record.node):
                yield from _steps_shown(run, record, found)


def _steps_shown(run: RunDescriptor, record: UpdateRecord, measured: Sequence[float]) -> Iterator[StepShown]:
    version, lane = record.version, lane_of(record.slot, run.directions)
    for step, (g, value) in enumerate(zip(record.scalars, measured, strict=False)):
        yield StepShown(version, record.node, lane, step, _seed(run, version, lane, step), g, value)


def _round_shown(
    run: RunDescriptor, settings: RoundSettings, closed: Closed, records: Sequence[UpdateRecord]
) -> RoundShown:
    entry = closed.entry
    return RoundShown(
        round=entry.version,
        term=closed.term,
        closed=utc(closed.closed),
        asked=closed.asked,
        overdue=closed.overdue,
        loss=mean_loss(records),
        digest="" if entry.digest == NO_DIGEST else entry.digest.hex(),
        previous=entry.previous.hex(),
        hash=entry.hash(run.run_id).hex(),
        terms=tuple(_term_shown(run, entry.version, term) for term in entry.terms),
        updates=tuple(_update_shown(run, record, entry.version) for record in records),
        displacement=entry.displacement.blob.hex() if entry.displacement else "",
        size=entry.displacement.size if entry.displacement else 0,
        buffer=settings.buffer_size if settings.takes_what_comes(entry.version) else 0,
    )


def _term_shown(run: RunDescriptor, version: int, term: Coefficient) -> TermShown:
    seed = _seed(run, version - term.age, term.lane, term.step)
    return TermShown(term.lane, term.step, seed, term.coefficient, term.age)


def _update_shown(run: RunDescriptor, record: UpdateRecord, entry: int | None) -> UpdateShown:
    lane = lane_of(record.slot, run.directions)
    return UpdateShown(
        round=record.version,
        node=record.node,
        slot=record.slot,
        lane=lane,
        boot=record.boot,
        weight=record.weight,
        seeds=tuple(_seed(run, record.version, lane, step) for step in range(len(record.scalars))),
        scalars=record.scalars,
        loss=record.loss,
        verdict=in_words(record.verdict),
        entry=entry,
        displacement=record.values.blob.hex() if record.values else "",
        size=record.values.size if record.values else 0,
    )


def _seed(run: RunDescriptor, version: int, lane: int, step: int) -> str:
    return f"{seed_for(run.run_id, version, lane, step):016x}"


# --- one path, rebuilt from mask and ledger alone ---


def rebuilt_path(
    ledger: Store, mask: Mask, version: int, node: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[RebuiltShown]:
    """A node's projected gradients from theta of a closed round, and how far from there each local step led it.

    Raises:
        RunMismatch: it is another run's mask, the round did not close, or the node gave nothing from its theta, or a
            displacement.
        LedgerError: what is kept of the round has not the size that it must have.
        BadValue: the node sent a projected gradient that leads nowhere: it was refused.
    """
    run = run_of(ledger)
    check_mask(mask, run)
    if version >= ledger.version:
        raise RunMismatch(f"round {version}", f"did not close; {ledger.version} rounds have", "name an earlier one")
    record = next((record for _, record in ledger.updates(version, version + 1, node)), None)
    if record is None:
        problem = f"gave nothing from theta of version {version}"
        raise RunMismatch(f"node {node}", problem, _where(ledger, version, node))
    if record.values is not None:
        problem = f"gave a displacement from theta of version {version}: how it came to that cannot be rebuilt"
        raise RunMismatch(f"node {node}", problem, "name a node that sends projected gradients")
    theta, lane = theta_of(ledger, mask, version, progress), lane_of(record.slot, run.directions)
    seeds, perturbations = seeds_of(run.run_id, version, lane, len(record.scalars)), run.perturbations
    products = ledger.products(version, settings_of(run, ledger.rules))
    measured = gradip_of(ledger, record, products) if products else (None,) * len(seeds)
    walk = virtual_path(theta, record.scalars, seeds, perturbations=perturbations, stream=run.stream, lr=run.lr)
    for step, walker in enumerate(walk):
        away = distance(walker, theta)
        for index in range(step * perturbations, (step + 1) * perturbations):
            seed, scalar = f"{seeds[index]:016x}", record.scalars[index]
            yield RebuiltShown(version, node, lane, index, seed, scalar, measured[index], away)


def _where(ledger: Store, version: int, node: str) -> str:
    """Which path of the node closed with the entry, from an older theta; else how to find one."""
    for record in ledger.records(version):
        if record.node == node:
            base = record.version
            return f"its update from theta of version {base} is in entry {version}: --round {base}"
    return "`meerkat ledger --node` says from which versions it gave something"


def theta_of(ledger: Store, mask: Mask, version: int, progress: Callable[[int, int], None]) -> Float32Array:
    """theta of a version, float32 (n,): theta_0 and the entries up to there; digests are left to verification."""
    run = run_of(ledger)
    replica = Replica(mask, run_id=run.run_id, stream=run.stream, digest_every=run.count + 1)
    while replica.version < version:
        progress(replica.version, version)
        entries = ledger.entries(replica.version, min(AT_ONCE, version - replica.version))
        if [entry.version for entry in entries] != list(range(replica.version, replica.version + len(entries))):
            raise RunMismatch(f"entry {replica.version}", "is missing, or one after it", "`meerkat verify` says more")
        replica.replay(ledger.changes(entries, mask.size))
    progress(version, version)
    return replica.theta


def distance(walker: Float32Array, theta: Float32Array) -> float:
    """‖walker − theta‖; float32 (n,) each."""
    return math.sqrt(float(np.square(np.subtract(walker, theta, dtype=np.float64)).sum()))
