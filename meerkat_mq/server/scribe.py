"""The one writer: carries out, in order and off the loop, what changes the ledger and theta."""

import asyncio
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar, TypeVarTuple

from meerkat_mq.core.path import Displacement, Term
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import LedgerUnavailable
from meerkat_mq.ledger.displacement import mean_of
from meerkat_mq.ledger.recovery import follow, resumed
from meerkat_mq.ledger.rows import Sighting
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.observe.spare import Spare
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import Share, UpdateRecord, Verdict
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.server.patience import patiently
from meerkat_mq.server.succession import Past
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
    """Keep the displacement that an update announced; answered by ValuesCame."""

    node: str
    update: Update
    blob: bytes
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A want was added to those that wait."""


Commit = e.CommitSlot | e.CommitUpdate | e.CommitEntry | KeepSightings | KeepMetrics
Task = e.JudgeRound | e.ApplyTerms | e.KeepSnapshot | e.TakeTerm | KeepValues
Want = e.SendEntries | e.SendChunks
Work = Commit | Task | _Wanted


class Desk(Protocol):
    """Who the scribe answers; called on the event loop."""

    def handle(self, event: e.ServerEvent) -> None:
        """Something is kept, or applied."""

    def reply(self, node: str, frame: Entries | Offer | Chunk | WantFrame) -> None:
        """An answer to a node's want, or a want of the server's."""

    def distribute(self, blob: bytes) -> None:
        """The displacement of the entry that was committed last."""

    def header(self) -> Header:
        """The header of answers."""

    def took_term(self, term: int, machine: ServerMachine) -> None:
        """The server has a term, and a machine that stands where the ledger does."""


class Scribe:
    """Takes the machine's effects on the ledger and theta, and answers each. Making one reads the ledger, so blocks.

    Updates are committed in groups: all of a round where everybody answers, else what came within 50 ms. Between two
    groups one want is answered, so nobody's wants hold up the rounds; of a node's wants of one kind the newest counts.

    Attributes:
        server_id: random, one a process; 16 hex digits.
        committed: version and theta that the ledger holds.
        past: what it held before this server.
        spare: writes what the run can do without.
    """

    def __init__(self, ledger: Ledger, replica: Replica, run: Run, snapshots: Snapshots, worker: Executor) -> None:
        self.server_id = secrets.token_hex(8)
        self.committed = (replica.version, replica.theta)
        self.past = Past.of(ledger)
        self.spare = Spare()
        self._ledger = ledger
        self._replica = replica
        self._run = run
        self._snapshots = snapshots
        self._worker = worker
        self._term_at = float("-inf")
        self._newest_blob = b""  # of the last displacement that was applied
        self._queue: asyncio.Queue[Work] = asyncio.Queue()
        self._wants: dict[tuple[type[Want], str], Want] = {}

    def put(self, work: Commit | Task | Want) -> None:
        """Queue an effect; of wants no more than 4,096, since a node asks again."""
        if not isinstance(work, Want):
            self._queue.put_nowait(work)
        elif (key := (type(work), work.node)) in self._wants or len(self._wants) < WANTS:
            self._wants[key] = work
            self._queue.put_nowait(_Wanted())

    async def idle(self) -> None:
        """Wait until all that was queued is done."""
        await self._queue.join()

    async def in_charge(self, action: Callable[[], None]) -> None:
        """Do something off the loop, unless the ledger is another server's, or not yet this one's."""

        def act() -> None:
            if self._ledger.in_charge:
                action()

        await self._off_the_loop(act)

    async def run(self, desk: Desk) -> None:
        """Work until cancelled.

        Raises:
            LedgerError: the ledger is damaged, or its disk fails for long; nobody was told of what was not kept.
            AnotherServer: the ledger holds another server's term.
        """
        while True:
            waiting = await self._gather()
            await self._commit(desk, [work for work in waiting if isinstance(work, Commit)])
            for task in [work for work in waiting if isinstance(work, Task)]:
                await self._do(desk, task)
                if isinstance(task, e.TakeTerm):
                    break  # what is left was asked for by a machine that is no more
            if self._wants:
                await self._answer(desk, self._wants.pop(next(iter(self._wants))))
            for _ in waiting:
                self._queue.task_done()

    async def _gather(self) -> list[Work]:
        """What came since the last time; what can wait for more does, for a moment."""
        if self._wants and self._queue.empty():
            return []
        waiting = [await self._queue.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(GROUP_S):
                while _can_wait(waiting[-1]):
                    waiting.append(await self._queue.get())
        while not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        return waiting

    async def _off_the_loop(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def _patiently(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        """Off the loop, what leaves no trace where the ledger's disk cannot take it: it is tried again."""
        return await patiently(lambda: self._off_the_loop(function, *args))

    # --- commits ---

    async def _commit(self, desk: Desk, group: Sequence[Commit]) -> None:
        if not group:
            return
        records = tuple(work.record for work in group if isinstance(work, e.CommitUpdate))
        await self._patiently(self._write, records, group)
        now = asyncio.get_running_loop().time()
        if records:
            desk.handle(e.UpdatesCommitted(now, records))
        for work in group:
            if isinstance(work, e.CommitSlot):
                desk.handle(e.SlotCommitted(now, work.node))
            elif isinstance(work, e.CommitEntry):
                self.committed = (work.entry.version + 1, self._replica.theta)
                kept = e.EntryCommitted(now, work.entry.version, work.records, work.products, work.judgements)
                desk.handle(kept)
                if work.entry.displacement is not None:
                    desk.distribute(self._newest_blob)

    def _write(self, records: tuple[UpdateRecord, ...], group: Sequence[Commit]) -> None:
        ledger = self._ledger
        with ledger.group():
            for work in group:
                if isinstance(work, e.CommitSlot):
                    ledger.commit_slot(work.node, work.slot, ledger.version)
            if records:
                ledger.commit_updates(records)
            for work in group:
                match work:
                    case e.CommitEntry(entry, of, asked, overdue, products, judgements):
                        ledger.commit_entry(entry, of, asked, overdue, products=products, judgements=judgements)
                    case KeepSightings(sightings):
                        ledger.commit_sightings(sightings)
                    case KeepMetrics(version, metrics):
                        ledger.commit_metrics(version, metrics)

    # --- everything else ---

    async def _do(self, desk: Desk, task: Task) -> None:
        now = asyncio.get_running_loop().time
        match task:
            case e.JudgeRound(term, version, judge):
                outcome = await self._off_the_loop(judge)
                desk.handle(e.RoundJudged(now(), term, version, outcome))
            case e.ApplyTerms(version, terms, shares):
                after, displacement = await self._patiently(self._apply, terms, shares)
                desk.handle(e.TermsApplied(now(), version, after, displacement))
            case KeepValues(node, update, blob, verdict):
                await self._patiently(self._ledger.keep_blob, blob)
                desk.handle(e.ValuesCame(now(), node, update, verdict))  # it commits the update at once, or never
            case e.KeepSnapshot(version, head):
                await self._off_the_loop(self._keep_snapshot, version, head)
            case e.TakeTerm(above):
                await asyncio.sleep(self._term_at - now())
                self._term_at = now() + TERM_PAUSE_S
                desk.took_term(*await self._patiently(self._take_term, above))

    def _apply(self, terms: Sequence[Term], shares: Sequence[Share]) -> tuple[bytes, Displacement | None]:
        """Apply an entry to theta; the digest after it, and its displacement, which is kept."""
        if not shares:
            return self._replica.apply(terms), None
        size = self._run.mask.size
        blob = self._newest_blob = encode_values(mean_of(shares, self._ledger, size), self._run.codec)
        name = self._ledger.keep_blob(blob)
        return self._replica.apply(terms, decode_values(blob, name, size)), Displacement(name, len(blob))

    def _keep_snapshot(self, version: int, head: bytes) -> None:
        """Keep a snapshot: one that cannot be costs those who catch up, nobody else."""
        self.spare.write("snapshot", lambda: self._snapshots.keep(version, head, self._replica.theta))
        self._keep_mask()

    def _keep_mask(self) -> None:
        self.spare.write("mask", lambda: self._ledger.keep_mask(self._run.mask))

    async def _answer(self, desk: Desk, want: Want) -> None:
        with suppress(LedgerUnavailable):  # a node asks again
            match want:
                case e.SendEntries(node, first):
                    answer = await self._off_the_loop(self._help, desk.header(), first)
                    if answer is not None:
                        desk.reply(node, answer)
                case e.SendChunks(node, request):
                    for chunk in await self._off_the_loop(self._chunks, desk.header(), request):
                        desk.reply(node, chunk)

    def _chunks(self, header: Header, want: WantFrame) -> list[Chunk]:
        return list(self._snapshots.chunks(header, want))

    def _help(self, header: Header, first: int) -> Entries | Offer | None:
        """A snapshot's offer where that is cheaper, else as many entries as a reply takes."""
        offer, room = self._snapshots.offer(header, first), self._run.settings.frame_bytes
        if offer is not None and chunks_fit(offer.size, room):
            return offer
        chosen = self._ledger.entries_within(first, REPLY_ENTRIES, reply_room(room))
        return Entries(header, chosen) if chosen else None

    def _take_term(self, above: int) -> tuple[int, ServerMachine]:
        """Take a term; theta goes to what is committed, and a machine goes on from there."""
        with self._ledger.group():
            if self._ledger.run is None:
                self._ledger.begin(self._run.descriptor, self._run.rules)
            term = self._ledger.take_term(above, self.server_id, socket.gethostname())
        self.spare.write("checkpoint", self._ledger.checkpoint)  # whoever copies the main file alone, has the run
        self._keep_mask()
        version, theta = self.committed
        self._replica.load(theta, version)
        follow(self._ledger, self._run, self._replica)  # another server may have gone on meanwhile
        self.committed = (self._replica.version, self._replica.theta)
        self._snapshots.sweep()
        return term, resumed(self._ledger, self._run, term=term, server_id=self.server_id)


def _can_wait(work: Work) -> bool:
    """Whether nobody waits for this to be kept."""
    return isinstance(work, KeepSightings | KeepMetrics) or (isinstance(work, e.CommitUpdate) and not work.last)
