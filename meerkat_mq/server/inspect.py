"""Looks into a ledger for people: how the run stands, closed rounds, one node's path. Only reads."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from meerkat_mq.core.path import NO_DIGEST, seed_for
from meerkat_mq.errors import RunMismatch
from meerkat_mq.observe.tables import NodeShown, RoundShown, RunShown, TermShown, UpdateShown
from meerkat_mq.rounds.events import UpdateRecord, Verdict
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import lane_of
from meerkat_mq.server.ledger import Closed, Ledger, NodeRow
from meerkat_mq.server.verify import run_of, settings_of
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import in_words

PAGE = 200


def run_shown(ledger: Ledger, now: float | None = None) -> RunShown:
    """The run as it stands. What it costs does not grow with the number of rounds.

    Args:
        ledger: of a run.
        now: seconds since 1970; default: the clock's.
    """
    now = time.time() if now is None else now
    run, version = run_of(ledger), ledger.version
    guards = settings_of(run, ledger.rules).guards
    past = ledger.past(guards.window)
    flagged = Guard(guards, run.directions, past).flagged
    closed = [entry.closed for entry in ledger.closed(max(0, version - guards.window), guards.window)]
    newest = ledger.terms()[-1:]
    heard = ledger.records(version)
    last = {record.node: record for records in (*past, heard) for record in records}
    return RunShown(
        federation=run.federation,
        run=run.run,
        term=newest[0].term if newest else 0,
        server_id=newest[0].server_id if newest else "",
        host=newest[0].host if newest else "",
        version=version,
        rounds=run.rounds,
        heard=len(heard),
        closed_s=now - closed[-1] if closed else None,
        round_s=(closed[-1] - closed[0]) / (len(closed) - 1) if len(closed) > 1 else None,
        loss=_loss(past[-1]) if past else None,
        nodes=tuple(_node_shown(node, last.get(node.node), version, flagged, now) for node in ledger.nodes()),
    )


def _loss(records: Iterable[UpdateRecord]) -> float | None:
    """Mean over the accepted ones."""
    losses = [record.loss for record in records if record.verdict is Verdict.ACCEPTED]
    return math.fsum(losses) / len(losses) if losses else None


def _node_shown(
    node: NodeRow, last: UpdateRecord | None, version: int, flagged: Mapping[str, Verdict], now: float
) -> NodeShown:
    return NodeShown(
        node=node.node,
        slot=node.slot,
        host=node.host or "",
        status=node.status or "",
        seen_s=None if node.last_seen is None else now - node.last_seen,
        boot=node.boot,
        rows=node.rows or 0,
        updates=node.updates,
        packet_bytes=node.packet_bytes,
        behind=None if last is None else max(0, version - last.version - 1),
        verdict="" if last is None else in_words(last.verdict),
        flagged=in_words(flagged[node.node]) if node.node in flagged else "",
    )


def rounds_shown(ledger: Ledger, first: int, count: int) -> Iterator[RoundShown]:
    """At most `count` closed rounds from version `first` on."""
    run = run_of(ledger)
    for start in range(first, first + count, PAGE):
        page = ledger.closed(start, min(PAGE, first + count - start))
        yield from (_round_shown(run, closed, ledger.records(closed.entry.version)) for closed in page)
        if len(page) < PAGE:
            return


def round_shown(ledger: Ledger, version: int) -> RoundShown:
    """One closed round.

    Raises:
        RunMismatch: it did not close yet.
    """
    for shown in rounds_shown(ledger, version, 1):
        if shown.version == version:
            return shown
    raise RunMismatch(f"round {version}", f"did not close; {ledger.version} rounds have", "name an earlier one")


def path_shown(ledger: Ledger, node: str, first: int, count: int) -> Iterator[UpdateShown]:
    """What a node gave to the rounds from version `first` on, at most `count` of them, the open one included.

    Raises:
        RunMismatch: the ledger knows no such node.
    """
    run, slots = run_of(ledger), ledger.slots()
    if node not in slots:
        known = ", ".join(sorted(slots)[:5]) or "none"
        raise RunMismatch(f"node {node}", "is not in the ledger", f"it knows {known}" + ", …" * (len(slots) > 5))
    for version in range(first, min(first + count, ledger.version + 1)):
        for record in ledger.records(version):
            if record.node == node:
                yield _update_shown(run, record)


def _round_shown(run: RunDescriptor, closed: Closed, records: Sequence[UpdateRecord]) -> RoundShown:
    entry = closed.entry
    return RoundShown(
        version=entry.version,
        term=closed.term,
        closed=closed.closed,
        asked=closed.asked,
        overdue=closed.overdue,
        loss=_loss(records),
        digest="" if entry.digest == NO_DIGEST else entry.digest.hex(),
        previous=entry.previous.hex(),
        hash=entry.hash(run.run_id).hex(),
        terms=tuple(
            TermShown(term.lane, term.step, _seed(run, entry.version, term.lane, term.step), term.coefficient)
            for term in entry.terms
        ),
        updates=tuple(_update_shown(run, record) for record in records),
    )


def _update_shown(run: RunDescriptor, record: UpdateRecord) -> UpdateShown:
    lane = lane_of(record.slot, run.directions)
    return UpdateShown(
        version=record.version,
        node=record.node,
        slot=record.slot,
        lane=lane,
        boot=record.boot,
        weight=record.weight,
        seeds=tuple(_seed(run, record.version, lane, step) for step in range(len(record.scalars))),
        scalars=record.scalars,
        loss=record.loss,
        verdict=in_words(record.verdict),
    )


def _seed(run: RunDescriptor, version: int, lane: int, step: int) -> str:
    return f"{seed_for(run.run_id, version, lane, step):016x}"
