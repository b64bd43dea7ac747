"""Bugs to plant, each the kind that exactly-once systems have: the simulator must see every one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.gradip import each_inner_product
from meerkat_mq.core.path import Coefficient, short_hash
from meerkat_mq.ledger.recovery import resumed
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.store import KeptSnapshot, Term
from meerkat_mq.rounds import open_round
from meerkat_mq.rounds.open_round import OpenRound
from meerkat_mq.rounds.policy import RoundSettings, counted, lane_of, shares_of, terms_of
from meerkat_mq.rounds.records import Share, UpdateRecord, Verdict
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.rounds.window import Committed, Window
from meerkat_mq.runtime import measure, writer
from meerkat_mq.runtime.writer import LedgerWriter
from meerkat_mq.wire.messages import Reason, Update
from meerkat_mq.wire.snapshot import Snapshot, decode_snapshot
from meerkat_mq.wire.values import encode_values
from meerkat_mq.worlds.replica import SharedReplica
from meerkat_mq.worlds.store import MemoryStore

Machine = Any  # its private methods are what is broken here


class Altered:
    """A store that answers some questions otherwise."""

    def __init__(self, store: Any, answers: dict[str, Callable[[Any], object]]) -> None:
        self._store = store
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        if name in self._answers:
            return lambda: self._answers[name](self._store)
        return getattr(self._store, name)


def resume_with(patch: pytest.MonkeyPatch, **answers: Callable[[Any], object]) -> None:
    """Let machines be made of a ledger that answers otherwise."""
    patch.setattr(writer, "resumed", lambda ledger, *of, **to: resumed(Altered(ledger, answers), *of, **to))


def apply_a_duplicate(patch: pytest.MonkeyPatch) -> None:
    """An update that comes twice counts twice."""
    why_dropped = ServerMachine._why_dropped

    def broken(self: Machine, name: str, update: Update) -> str | None:
        reason = why_dropped(self, name, update)
        return None if reason == "duplicate" else reason

    def acknowledge(self: OpenRound, record: UpdateRecord) -> None:
        name = (
            record.node
            if (record.version, record.node) not in self.acknowledged
            else f"{record.node} {len(self.acknowledged)}"
        )
        self.acknowledged[record.version, name] = record
        self.awaited.discard(record.node)
        self.answered.add(name)

    patch.setattr(ServerMachine, "_why_dropped", broken)
    patch.setattr(OpenRound, "acknowledge", acknowledge)


def term_in_the_identity(patch: pytest.MonkeyPatch) -> None:
    """After a restart, the same node's update for the same round is another update."""

    def commit_updates(self: MemoryStore, records: Sequence[UpdateRecord]) -> None:
        with self.group():
            for record in records:
                self.ledger.updates.setdefault(record.version, {})[record.slot + 1000 * self.term] = (None, record)

    def close(self: MemoryStore, entry: int, records: Sequence[UpdateRecord]) -> None:
        among = {(record.version, record.node) for record in records}
        for version in {record.version for record in records}:
            for place, (_, record) in self.ledger.updates[version].items():
                if (record.version, record.node) in among:
                    self.ledger.updates[version][place] = (entry, record)

    patch.setattr(MemoryStore, "commit_updates", commit_updates)
    patch.setattr(MemoryStore, "_close", close)
    resume_with(patch, open_updates=lambda ledger: (), heard=lambda ledger: {})


def publish_before_commit(patch: pytest.MonkeyPatch) -> None:
    """What is published need not be in the ledger yet."""
    commit = LedgerWriter._commit

    def broken(self: Machine, group: Sequence[Any]) -> Iterator[Any]:
        late: list[Any] = []

        def put_off(*work: Any) -> Iterator[Any]:
            late.append(work)
            yield from ()

        self._patiently = put_off
        yield from commit(self, group)
        del self._patiently
        for work in late:
            yield from self._patiently(*work)

    patch.setattr(LedgerWriter, "_commit", broken)


def forget_the_term(patch: pytest.MonkeyPatch) -> None:
    """Only the broker remembers the term."""

    def take_term(self: Machine, above: int, server_id: str, host: str) -> int:
        with self.group():
            self.ledger.terms.pop(above + 1, None)
            self.ledger.terms[above + 1] = Term(above + 1, server_id, host, 0.0)
        self._mine = (above + 1, server_id)
        return above + 1

    patch.setattr(MemoryStore, "take_term", take_term)


def accept_a_stale_round(patch: pytest.MonkeyPatch) -> None:
    """An update for an earlier round counts in this one."""
    why_dropped, why_refused = ServerMachine._why_dropped, ServerMachine._why_refused

    def dropped(self: Machine, name: str, update: Update) -> str | None:
        if update.header.version < self.version:
            update = replace(update, header=replace(update.header, version=self.version))
        return why_dropped(self, name, update)

    def refused(self: Machine, name: str, update: Update) -> Reason | None:
        return None if update.header.version < self.version else why_refused(self, name, update)

    patch.setattr(ServerMachine, "_why_dropped", dropped)
    patch.setattr(ServerMachine, "_why_refused", refused)


def lose_an_update_on_resume(patch: pytest.MonkeyPatch) -> None:
    """A server that starts again does so without the open round: it waits for everybody anew."""
    resume_with(patch, open_updates=lambda ledger: ())


def add_in_arrival_order(patch: pytest.MonkeyPatch) -> None:
    """Sums are made in float32, one after the other, as the updates lie."""

    def terms_of(records: Sequence[UpdateRecord], settings: RoundSettings, version: int) -> tuple[Coefficient, ...]:
        heard = [found for record in reversed(records) if (found := counted(record, settings)) is not None]
        total, terms = np.float32(sum(record.weight for record in heard)), []
        lr = settings.lr / settings.perturbations
        for age, lane in sorted({(version - r.version, lane_of(r.slot, settings.directions)) for r in heard}):
            place, part = (version - age, lane), np.float32(settings.staleness_weight(age) / 256)
            members = [r for r in heard if (r.version, lane_of(r.slot, settings.directions)) == place]
            for step in range(max([len(record.scalars) for record in members], default=0)):
                g = np.float32(0)
                for record in [record for record in members if step < len(record.scalars)]:
                    g += part * np.float32(record.weight) * np.float32(record.scalars[step])
                terms.append(Coefficient(lane, step, float(np.float32(lr) * (g / total)), age))
        return tuple(terms)

    patch.setattr(open_round, "terms_of", terms_of)


def skip_the_digest_check(patch: pytest.MonkeyPatch) -> None:
    """An update counts whatever theta it was made from."""
    why_refused = ServerMachine._why_refused

    def broken(self: Machine, name: str, update: Update) -> Reason | None:
        return why_refused(self, name, replace(update, base=self._window.base(update.header.version)[:8]))

    patch.setattr(ServerMachine, "_why_refused", broken)


def non_atomic_snapshot(patch: pytest.MonkeyPatch) -> None:
    """A snapshot is written in place and believed; what is missing of it reads as zeros."""
    keep = Snapshots.keep

    def broken(self: Machine, version: int, head: bytes, theta: Any) -> None:
        torn = theta.copy()
        torn[4:] = 0
        keep(self, version, head, torn)
        for _ in range(8):  # the rest comes piece by piece
            self._ledger._step()
        keep(self, version, head, theta)

    def load(self: Machine, kept: KeptSnapshot) -> Snapshot:
        blob = self._ledger.snapshot(kept)
        return decode_snapshot(blob, short_hash(blob), self._run.weights)

    patch.setattr(Snapshots, "keep", broken)
    patch.setattr(Snapshots, "_load", load)


def keep_an_update_that_came_too_late(patch: pytest.MonkeyPatch) -> None:
    """An update that is committed after its round was decided counts as one of the round's."""
    close = MemoryStore._close

    def broken(self: Machine, entry: int, records: Sequence[UpdateRecord]) -> None:
        late = [record for found, record in self.ledger.updates.get(entry, {}).values() if found is None]
        every = {(record.version, record.slot): record for record in (*late, *records)}
        close(self, entry, list(every.values()))

    patch.setattr(MemoryStore, "_close", broken)


def lose_judgements_on_resume(patch: pytest.MonkeyPatch) -> None:
    """A server that starts again asks everybody for all local steps."""
    resume_with(patch, newest_judgements=lambda ledger: ())


def count_all_steps_of_an_early_stopped_node(patch: pytest.MonkeyPatch) -> None:
    """A virtual path counts whole, though its node is early-stopped."""
    patch.setattr(open_round, "terms_of", lambda records, *more: terms_of(_unmarked(records), *more))


def _unmarked(records: Sequence[UpdateRecord]) -> list[UpdateRecord]:
    stopped = Verdict.EARLY_STOPPED
    return [replace(r, verdict=Verdict.ACCEPTED) if r.verdict is stopped else r for r in records]


def measure_the_round_after(patch: pytest.MonkeyPatch) -> None:
    """GradIP is made with the directions of another round."""

    def broken(g_p: Any, run: bytes, version: int, **shape: Any) -> Iterator[float]:
        return each_inner_product(g_p, run, version + 1, **shape)

    patch.setattr(measure, "each_inner_product", broken)


# --- of buffered runs, and of values nodes --------------------------------------------------------------------------


def count_an_update_in_two_entries(patch: pytest.MonkeyPatch) -> None:
    """What came while an entry closed enters each later one, until it is too old."""

    def open_again(self: Window) -> Committed:
        return {place: record for place, record in self._waiting.items() if self.spans(record.version, self.head)}

    patch.setattr(Window, "open", open_again)


def weigh_by_the_wrong_age(patch: pytest.MonkeyPatch) -> None:
    """An update weighs as if it were a version older than it is."""

    def broken(records: Sequence[UpdateRecord], settings: RoundSettings, version: int) -> tuple[Coefficient, ...]:
        wider = settings.model_copy(update={"mode": "buffered", "max_staleness": settings.max_staleness + 1})
        return tuple(replace(term, age=term.age - 1) for term in terms_of(records, wider, version + 1))

    patch.setattr(open_round, "terms_of", broken)


def draw_stale_directions_anew(patch: pytest.MonkeyPatch) -> None:
    """A stale update's directions are drawn with the seeds of the entry's version."""
    seed = SharedReplica._seed
    patch.setattr(SharedReplica, "_seed", lambda self, version, term: seed(self, version, replace(term, age=0)))


def drop_stale_updates_on_resume(patch: pytest.MonkeyPatch) -> None:
    """A server that starts again goes on with the head's updates alone."""

    def newest(ledger: Any) -> list[UpdateRecord]:
        return [record for record in ledger.open_updates() if record.version == ledger.version]

    resume_with(patch, open_updates=newest)


def forget_whom_it_heard_on_resume(patch: pytest.MonkeyPatch) -> None:
    """A server that starts again takes what an entry holds already."""
    resume_with(patch, heard=lambda ledger: {})


def open_the_window_too_wide(patch: pytest.MonkeyPatch) -> None:
    """An update may be a version older than the run says."""
    patch.setattr(Window, "spans", lambda self, base, entry: entry - self._max_staleness - 1 <= base <= entry)


def distribute_the_mean_itself(patch: pytest.MonkeyPatch) -> None:
    """The mean displacement is not encoded as the run says."""
    patch.setattr(writer, "encode_values", lambda values, codec: encode_values(values, "float32"))


def weigh_displacements_alike(patch: pytest.MonkeyPatch) -> None:
    """The mean displacement is the plain one, whatever the path nodes and the ages."""

    def broken(*args: Any) -> tuple[Share, ...]:
        shares = shares_of(*args)
        return tuple(replace(share, weight=1 / len(shares)) for share in shares)

    patch.setattr(open_round, "shares_of", broken)


# Each with the faults that bring it to light.
BUGS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]] = {
    apply_a_duplicate: ("duplicate",),
    term_in_the_identity: ("crash",),
    publish_before_commit: ("crash", "freeze"),
    forget_the_term: ("crash", "broker crash"),
    accept_a_stale_round: ("reorder",),
    lose_an_update_on_resume: ("crash",),
    add_in_arrival_order: (),
    skip_the_digest_check: ("hostile",),
    non_atomic_snapshot: ("crash", "freeze"),
    keep_an_update_that_came_too_late: (),
    lose_judgements_on_resume: ("crash",),
    count_all_steps_of_an_early_stopped_node: (),
    measure_the_round_after: (),
    count_an_update_in_two_entries: (),
    weigh_by_the_wrong_age: (),
    draw_stale_directions_anew: (),
    drop_stale_updates_on_resume: ("crash",),
    forget_whom_it_heard_on_resume: ("crash",),
    open_the_window_too_wide: (),
    distribute_the_mean_itself: (),
    weigh_displacements_alike: (),
}
