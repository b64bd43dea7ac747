"""The ledger writer: carries out, in order, what changes the ledger and theta, and what has to be read from them.

Everything goes through one worker (the `Compute` port), so nothing here is ever done at the same time as anything else.
Updates are committed in groups: all of a round where everybody answers, else what came within 50 ms. Between two
groups one want is answered, so nobody's wants hold up the rounds; of a node's wants of one kind the newest counts.

Nobody is told of anything before its commit is back. What the disk cannot take for a while is tried again, from the
same place: a commit is all or nothing, so a failed one leaves no trace.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar, TypeVarTuple, assert_never

import structlog

from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import AnotherServer, LedgerError, LedgerUnavailable
from meerkat_mq.ledger.displacement import mean_of, measured
from meerkat_mq.ledger.recovery import follow, resumed
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import DAMAGED, Snapshots
from meerkat_mq.ledger.store import Sighting, Store
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import Share, UpdateRecord, Verdict
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime.disk import Patience, Spare
from meerkat_mq.runtime.ports import Clock, Compute, Failed, Timer
from meerkat_mq.runtime.steps import Done, Steps, until, work
from meerkat_mq.runtime.steps import Sequence as Running
from meerkat_mq.runtime.succession import Past
from meerkat_mq.wire.frames import Update
from meerkat_mq.wire.limits import chunks_fit, reply_room
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer
from meerkat_mq.wire.messages import Want as WantFrame
from meerkat_mq.wire.values import decode_values, encode_values

REPLY_ENTRIES = 1000
WANTS = 4096
GROUP_S = 0.05
TERM_PAUSE_S = 1.0  # between one term and the next: nobody can make a server write terms without end

Args = TypeVarTuple("Args")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class KeepSightings:
    """Keep news of nodes."""

    sightings: tuple[Sighting, ...]


@dataclass(frozen=True, slots=True)
class KeepMetrics:
    """Keep what theta of a version was found to be worth."""

    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class KeepValues:
    """Keep the displacement that an update announced; answered by ValuesFetched, then by `kept`."""

    node: str
    update: Update
    blob: bytes
    verdict: Verdict
    kept: Done = field(default=lambda _: None, compare=False)


@dataclass(frozen=True, slots=True)
class MeasureValues:
    """Measure the displacements among the updates that close with an entry; `done` takes these updates."""

    records: tuple[UpdateRecord, ...]
    done: Done = field(compare=False)


Commit = e.CommitSlot | e.CommitUpdate | e.CommitEntry | KeepSightings | KeepMetrics
Task = e.ApplyTerms | e.KeepSnapshot | e.TakeTerm | KeepValues | MeasureValues
Want = e.SendEntries | e.SendChunks


@dataclass(frozen=True)
class Holdings:
    """What a server process holds of its run."""

    run: Run
    ledger: Store  # of the run, or empty
    replica: Replica  # theta of the ledger's newest version
    snapshots: Snapshots  # of the ledger
    past: Past  # what the ledger held when the process started


class Owner(Protocol):
    """Whom the ledger writer answers."""

    def handle(self, event: e.ServerEvent) -> None:
        """Something is kept, or applied."""

    def reply(self, node: str, frame: Entries | Offer | Chunk | WantFrame) -> bool:
        """An answer to a node's want; False where it was dropped."""

    def distribute(self, blob: bytes) -> None:
        """The displacement of the entry that was committed last."""

    def header(self) -> Header:
        """The header of answers."""

    def outranked(self) -> None:
        """The ledger holds another server's term; AnotherServer ends this one now."""

    def took_term(self, term: int, machine: ServerMachine) -> None:
        """The server has a term, and a machine that begins where the ledger ends."""


class LedgerWriter:
    """Takes the machine's effects on the ledger and theta, and answers each.

    Errors that end the server leave through the Compute port: LedgerError (damaged, or its disk fails for long: nobody
    was told of what was not kept) and AnotherServer (the ledger holds another server's term).

    Args:
        compute: the worker that alone uses what is held.
        server_id: random, one a process; 16 hex digits.

    Attributes:
        committed: version and theta that the ledger holds.
    """

    def __init__(
        self,
        held: Holdings,
        *,
        compute: Compute,
        clock: Clock,
        server_id: str,
        owner: Owner,
    ) -> None:
        self.committed = (held.replica.version, held.replica.theta)
        self._run = held.run
        self._ledger = held.ledger
        self._replica = held.replica
        self._snapshots = held.snapshots
        self._compute = compute
        self._clock = clock
        self._server_id = server_id
        self._owner = owner
        self._spare = Spare()
        self._seldom = Seldom()
        self._term_at = float("-inf")
        self._newest_blob = b""  # of the last displacement that was applied
        self._queue: list[Commit | Task] = []
        self._wants: dict[tuple[type[Want], str], Want] = {}
        self._busy = False
        self._group_is_due: Done | None = None
        self._when_idle: list[Callable[[], None]] = []

    def put(self, order: Commit | Task | Want) -> None:
        """Queue an effect; of wants no more than 4,096, since a node asks again."""
        if not isinstance(order, Want):
            self._queue.append(order)
        elif (key := (type(order), order.node)) in self._wants or len(self._wants) < WANTS:
            self._wants[key] = order
        if self._group_is_due is not None and not (isinstance(order, Commit) and _can_wait(order)):
            self._end_group()
        elif not self._busy:
            self._busy = True
            Running(self._work_off())

    def holds(self, kind: type[Commit]) -> bool:
        """Whether such an effect waits behind what is being done."""
        return any(isinstance(order, kind) for order in self._queue)

    def when_idle(self, action: Callable[[], None]) -> None:
        """Do something once all that was queued is done, except wants: at once, where nothing is."""
        self._when_idle.append(action)
        if not self._busy:
            self._say_idle()

    def _say_idle(self) -> None:
        waiting, self._when_idle = self._when_idle, []
        for action in waiting:
            action()

    def _work_off(self) -> Steps[None]:
        yield from until(self._clock, self._clock.now())  # what is put together is committed together
        try:
            while self._queue or self._wants:
                yield from self._work_once()
        except AnotherServer:
            self._owner.outranked()
            raise
        self._busy = False
        self._say_idle()

    def _work_once(self) -> Steps[None]:
        """Commit a group, do the tasks that wait, and answer one want."""
        if not self._queue:
            self._say_idle()
        elif not self._wants and all(map(_can_wait, self._queue)):
            yield self._gather
        waiting, self._queue = self._queue, []
        yield from self._commit([order for order in waiting if isinstance(order, Commit)])
        for task in [order for order in waiting if isinstance(order, Task)]:
            yield from self._do(task)
            if isinstance(task, e.TakeTerm):
                break  # what is left was asked for by a machine that is no more
        if self._wants:
            yield from self._answer(self._wants.pop(next(iter(self._wants))))

    def _gather(self, done: Done, _: Failed) -> None:
        """Wait for more that can be committed together: until something comes that cannot wait, or for 50 ms."""
        timer = self._clock.at(self._clock.now() + GROUP_S, self._end_group)
        self._group_is_due = lambda result: _then(timer, done, result)

    def _end_group(self) -> None:
        due, self._group_is_due = self._group_is_due, None
        if due is not None:
            due(None)

    def _patiently(self, job: Callable[[*Args], Result], *args: *Args) -> Steps[Result]:
        """Work that leaves no trace where the ledger's disk cannot take it: it is tried again."""
        patience = Patience(self._clock.now())
        while True:
            try:
                result = yield from work(self._compute, job, *args)
            except LedgerUnavailable as error:
                pause_s = patience.after(error, self._clock.now())
            else:
                patience.worked(self._clock.now())
                return result
            yield from until(self._clock, self._clock.now() + pause_s)

    # --- commits ---

    def _commit(self, group: Sequence[Commit]) -> Steps[None]:
        if not group:
            return
        records = tuple(order.record for order in group if isinstance(order, e.CommitUpdate))
        yield from self._patiently(self._write, records, group)
        now = self._clock.now()
        if records:
            self._owner.handle(e.UpdatesCommitted(now, records))
        for order in group:
            if isinstance(order, e.CommitSlot):
                self._owner.handle(e.SlotCommitted(now, order.node))
            elif isinstance(order, e.CommitEntry):
                self.committed = (order.entry.version + 1, self._replica.theta)
                self._owner.handle(e.EntryCommitted(now, order))
                if order.entry.displacement is not None:
                    self._owner.distribute(self._newest_blob)

    def _write(self, records: tuple[UpdateRecord, ...], group: Sequence[Commit]) -> None:
        """One transaction; slots first, since updates name them, and updates before the entries that take them."""
        ledger = self._ledger
        with ledger.group():
            for order in group:
                if isinstance(order, e.CommitSlot):
                    ledger.commit_slot(order.node, order.slot, ledger.version)
            if records:
                ledger.commit_updates(records)
            for order in group:
                match order:
                    case e.CommitEntry(entry, of, asked, overdue, products, judgements):
                        ledger.commit_entry(entry, of, asked, overdue, products=products, judgements=judgements)
                    case KeepSightings(sightings):
                        ledger.commit_sightings(sightings)
                    case KeepMetrics(version, metrics):
                        ledger.commit_metrics(version, metrics)
                    case e.CommitSlot() | e.CommitUpdate():
                        pass
                    case _:
                        assert_never(order)

    # --- everything else ---

    def _do(self, task: Task) -> Steps[None]:
        match task:
            case e.ApplyTerms(version, terms, shares):
                after, displacement = yield from self._patiently(self._apply, terms, shares)
                self._owner.handle(e.TermsApplied(self._clock.now(), version, after, displacement))
            case KeepValues(node, update, blob, verdict, kept):
                yield from self._patiently(self._ledger.keep_blob, blob)
                # its update is committed at once, or never
                self._owner.handle(e.ValuesFetched(self._clock.now(), node, update, verdict))
                kept(None)
            case MeasureValues(records, done):
                load = partial(self._ledger.values, weights=self._run.mask.size)
                done((yield from self._patiently(measured, records, load, self._run.settings)))
            case e.KeepSnapshot(version, head):
                yield from work(self._compute, self._keep_snapshot, version, head)
            case e.TakeTerm(above):
                yield from until(self._clock, self._term_at)
                self._term_at = self._clock.now() + TERM_PAUSE_S
                term, machine = yield from self._patiently(self._take_term, above)
                self._owner.took_term(term, machine)
            case _:
                assert_never(task)

    def _apply(self, terms: Sequence[Coefficient], shares: Sequence[Share]) -> tuple[bytes, Displacement | None]:
        """Apply an entry to theta; the digest after it, and its displacement, which is kept."""
        if not shares:
            return self._replica.apply(terms), None
        size = self._run.mask.size
        blob = self._newest_blob = encode_values(mean_of(shares, self._ledger, size), self._run.codec)
        name = self._ledger.keep_blob(blob)
        return self._replica.apply(terms, decode_values(blob, name, size)), Displacement(name, len(blob))

    def _keep_snapshot(self, version: int, head: bytes) -> None:
        """Keep a snapshot: one that cannot be costs those who catch up, nobody else."""
        self._spare.write("snapshot", lambda: self._snapshots.keep(version, head, self._replica.theta))
        self._keep_mask()

    def _keep_mask(self) -> None:
        self._spare.write("mask", lambda: self._ledger.keep_mask(self._run.mask))

    def _answer(self, want: Want) -> Steps[None]:
        try:
            match want:
                case e.SendEntries(node, first):
                    answer = yield from work(self._compute, self._help, self._owner.header(), first)
                    if answer is not None:
                        self._owner.reply(node, answer)
                case e.SendChunks(node, request):
                    chunks = yield from work(self._compute, self._chunks, self._owner.header(), request)
                    for chunk in chunks:
                        if not self._owner.reply(node, chunk):
                            return
                case _:
                    assert_never(want)
        except LedgerUnavailable:
            pass  # a node asks again
        except LedgerError as error:  # whoever asks must not end a server, which may never need what is damaged
            self._seldom.say(structlog.get_logger().warning, DAMAGED, file=self._ledger.where, problem=error.problem)

    def _chunks(self, header: Header, want: WantFrame) -> list[Chunk]:
        return list(self._snapshots.chunks(header, want))

    def _help(self, header: Header, first: int) -> Entries | Offer | None:
        """A snapshot's offer where that is cheaper, or leads around damage; else as many entries as a reply takes."""
        room = self._run.settings.frame_bytes
        try:
            offer = self._snapshots.offer(header, first)
            if offer is not None and chunks_fit(offer.size, room):
                return offer
            chosen = self._ledger.entries_within(first, REPLY_ENTRIES, reply_room(room))
            sound = self._sound(chosen)
            if sound or not chosen:
                return Entries(header, sound) if sound else None
        except LedgerUnavailable:
            raise
        except LedgerError as error:  # it does not even decode
            self._seldom.say(structlog.get_logger().warning, DAMAGED, file=self._ledger.where, problem=error.problem)
        offer = self._snapshots.offer(header, first, at_any_cost=True)
        return offer if offer is not None and chunks_fit(offer.size, room) else None

    def _sound(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """Those before the first one whose hash is not what the entry after it says."""
        run_id, where = self._run.descriptor.run_id, self._ledger.where
        said = [entry.previous for entry in entries[1:]] + [
            self._ledger.said_of(entry.version) for entry in entries[-1:]
        ]
        for number, (entry, expected) in enumerate(zip(entries, said, strict=True)):
            if expected is not None and entry.hash(run_id) != expected:
                self._seldom.say(structlog.get_logger().warning, DAMAGED, file=where, entry=entry.version)
                return entries[:number]
        return entries

    def _take_term(self, above: int) -> tuple[int, ServerMachine]:
        """Take a term; theta goes to what is committed, and a machine goes on from there."""
        with self._ledger.group():
            if self._ledger.run is None:
                self._ledger.begin(self._run.descriptor, self._run.rules)
            term = self._ledger.take_term(above, self._server_id, socket.gethostname())
        self._spare.write("checkpoint", self._ledger.checkpoint)  # whoever copies the main file alone, has the run
        self._keep_mask()
        version, theta = self.committed
        self._replica.load(theta, version)
        follow(self._ledger, self._run, self._replica)  # another server may have gone on meanwhile
        self.committed = (self._replica.version, self._replica.theta)
        self._snapshots.sweep()
        return term, resumed(self._ledger, self._run, term=term, server_id=self._server_id)


def _then(timer: Timer, done: Done, result: object) -> None:
    timer.cancel()
    done(result)


def _can_wait(order: Commit | Task) -> bool:
    """Whether nobody waits for this to be kept."""
    return isinstance(order, KeepSightings | KeepMetrics) or (isinstance(order, e.CommitUpdate) and not order.last)
