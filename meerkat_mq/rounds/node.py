"""A node's machine: follows the head of the ledger, and steps when it is asked."""

from dataclasses import dataclass
from functools import singledispatchmethod

from meerkat_mq.core.path import NO_DIGEST, Entry
from meerkat_mq.errors import RunMismatch
from meerkat_mq.rounds.events import (
    ApplyEntries,
    Connected,
    Count,
    End,
    EntriesApplied,
    FrameCame,
    NodeEffect,
    NodeEvent,
    PublishStatus,
    ResetTheta,
    Send,
    ServerCame,
    StartSteps,
    StepsDone,
    Tick,
)
from meerkat_mq.rounds.policy import lane_of
from meerkat_mq.wire.frames import Entries, Header, Reason, Refusal, Round, Update, Want, Welcome

RETRY_S = 2.0
RESYNCHRONISATIONS = 3


@dataclass(frozen=True, slots=True)
class _Done:
    version: int
    scalars: tuple[float, ...]
    loss: float


class NodeMachine:
    """One node process in one run.

    Attributes:
        version: theta's version on this node.
        slot: given by the server's welcome.
    """

    def __init__(self, *, run_id: bytes, mask_hash: bytes, base: bytes, boot: int, now: float) -> None:
        """A node that stands at theta_0.

        Args:
            run_id: 16 bytes.
            mask_hash: 16 bytes.
            base: 16 bytes, the digest of theta_0.
            boot: random u32 of this process.
            now: present time.
        """
        self._run_id = run_id
        self._mask_hash = mask_hash
        self._boot = boot
        self._theta_0 = base
        self._rank = (0, "")
        self._trusted_term = 0
        self._frame: Round | None = None
        self._done: _Done | None = None
        self._busy = False
        self._ask_at = now + RETRY_S
        self._lacking = True
        self._resynchronisations = 0
        self._effects: list[NodeEffect] = []
        self.slot: int | None = None
        self._stand_at_theta_0()

    def _stand_at_theta_0(self) -> None:
        self.version = 0
        self._head = self._mask_hash
        self._base = self._theta_0

    @property
    def wake_at(self) -> float | None:
        """When the machine wants its next Tick; None: not before another event."""
        return self._ask_at if self._lacking else None

    def handle(self, event: NodeEvent) -> list[NodeEffect]:
        """Take one event; returns the effects to carry out, in order."""
        self._on(event)
        self._advance(event.now)
        effects, self._effects = self._effects, []
        return effects

    @singledispatchmethod
    def _on(self, event: NodeEvent) -> None:
        raise TypeError(f"unknown event {event!r}")

    @_on.register
    def _(self, event: Connected) -> None:
        self._ask_at = event.now + RETRY_S
        self._effects.append(PublishStatus())

    @_on.register
    def _(self, event: Tick) -> None:
        pass

    @_on.register
    def _(self, event: ServerCame) -> None:
        rank = event.state.rank
        if rank < self._rank:
            self._effects.append(Count("stale server"))
        elif rank > self._rank:
            if rank[0] > self._rank[0]:
                self._frame = None
            self._rank = rank
            self._effects.append(PublishStatus())

    # --- frames ---

    @_on.register
    def _(self, event: FrameCame) -> None:
        frame = event.frame
        if (frame.header.run, frame.header.mask) != (self._header().run, self._header().mask):
            self._effects.append(Count("of another run"))
        elif frame.header.term < self._rank[0]:
            self._effects.append(Count("stale term"))
        else:
            if frame.header.term > self._rank[0]:
                self._rank = (frame.header.term, "")
            self._take(frame)

    @singledispatchmethod
    def _take(self, frame: Round | Welcome | Entries | Refusal) -> None:
        raise TypeError(f"unknown frame {frame!r}")

    @_take.register
    def _(self, frame: Round) -> None:
        newest = self._frame.header if self._frame is not None else frame.header
        if (frame.header.term, frame.header.version) < (newest.term, newest.version):
            self._effects.append(Count("old round"))
            return
        if self._frame is None or frame.header.version > self._frame.header.version:
            self._ask_at = float("-inf")
        self._frame = frame
        if self.slot in frame.heard and frame.header.version == self.version:
            self._resynchronisations = 0
        if self._wanted() and self._done is not None and self._done.version == self.version:
            self._send()

    @_take.register
    def _(self, frame: Welcome) -> None:
        if frame.boot == self._boot:
            self.slot = frame.slot

    @_take.register
    def _(self, frame: Entries) -> None:
        if not self._busy:
            self._follow(frame.entries, frame.header.term)

    @_take.register
    def _(self, frame: Refusal) -> None:
        if frame.boot != self._boot or frame.header.version != self.version:
            return
        self._effects.append(Count(f"refused: {frame.reason.name.lower().replace('_', ' ')}"))
        if frame.reason is Reason.RESYNCHRONISE and not self._busy:
            self._resynchronise("the server refused this node's digest")

    # --- following the ledger ---

    def _follow(self, entries: tuple[Entry, ...], term: int) -> None:
        """Apply those entries that extend the head; refuse those that contradict it."""
        news = tuple(entry for entry in entries if entry.version >= self.version)
        if not news or news[0].version != self.version:
            return
        head = self._head
        for number, entry in enumerate(news):
            if entry.version != self.version + number or entry.previous != head:
                self._contradicted(term)
                return
            head = entry.hash(self._run_id)
        self._trusted_term = term
        self._busy = True
        self._effects.append(ApplyEntries(news))

    def _contradicted(self, term: int) -> None:
        if term > self._trusted_term:
            self._trusted_term = term
            self._resynchronise(f"the ledger of term {term} has another past")
        else:
            self._effects.append(Count("entry refused"))

    def _resynchronise(self, why: str) -> None:
        self._resynchronisations += 1
        if self._resynchronisations > RESYNCHRONISATIONS:
            error = RunMismatch(
                f"version {self.version}",
                f"this node does not arrive at the server's theta ({why})",
                "check NumPy (≥ 2.0) and memory on both machines",
            )
            self._effects.append(End(error))
            return
        self._effects += [Count("resynchronised"), ResetTheta()]
        self._done = None
        self._ask_at = float("-inf")
        self._stand_at_theta_0()

    @_on.register
    def _(self, event: EntriesApplied) -> None:
        self._busy = False
        for entry, digest in zip(event.entries, event.digests, strict=True):
            if entry.digest != digest:
                self._effects.append(Count("digest differs"))
                self._resynchronise(f"the digest after entry {entry.version} differs")
                return
        last = event.entries[-1]
        self.version, self._head = last.version + 1, last.hash(self._run_id)
        self._ask_at = float("-inf")
        due = [digest for digest in event.digests if digest != NO_DIGEST]
        self._base = due[-1] if due else self._base

    @_on.register
    def _(self, event: StepsDone) -> None:
        self._busy = False
        self._done = _Done(event.version, event.scalars, event.loss)
        if event.version != self.version:
            self._effects.append(Count("late step"))
        elif self._wanted():
            self._send()

    # --- what next ---

    def _advance(self, now: float) -> None:
        """Catch up, ask for what lacks, or step."""
        self._lacking = self.slot is None
        frame = self._frame
        if self._busy or frame is None:
            return
        behind = frame.header.version - self.version
        if behind > 0:
            self._follow(frame.entries, frame.header.term)
        elif self._contradicts(frame):
            self._contradicted(frame.header.term)
            behind = frame.header.version - self.version
        if self._busy:
            return
        self._lacking = self.slot is None or behind > 0
        if self._lacking and now >= self._ask_at:
            self._ask_at = now + RETRY_S
            entries_from = self.version if behind > 0 else None
            self._effects.append(
                Send(Want(self._header(), self._boot, welcome=self.slot is None, entries_from=entries_from))
            )
        elif not self._lacking:
            self._step()

    def _contradicts(self, frame: Round) -> bool:
        if frame.header.version < self.version:
            return True
        newest = frame.entries[-1] if frame.entries else None
        return newest is not None and newest.version + 1 == self.version and newest.hash(self._run_id) != self._head

    def _wanted(self) -> bool:
        frame = self._frame
        return (
            frame is not None
            and frame.is_open
            and frame.header.version == self.version
            and self.slot in frame.asked
            and self.slot not in frame.heard
        )

    def _step(self) -> None:
        if not self._wanted() or (self._done is not None and self._done.version == self.version):
            return
        assert self._frame is not None
        assert self.slot is not None
        steps = dict(self._frame.short).get(self.slot, self._frame.steps)
        self._busy = True
        lane = lane_of(self.slot, self._frame.lanes)
        self._effects.append(StartSteps(self.version, lane, steps, self._frame.eps))

    def _send(self) -> None:
        assert self._done is not None
        self._effects.append(
            Send(Update(self._header(), self._boot, self._base[:8], self._done.loss, self._done.scalars))
        )

    def _header(self) -> Header:
        return Header.of(self._run_id, self._rank[0], self.version, self._mask_hash)
