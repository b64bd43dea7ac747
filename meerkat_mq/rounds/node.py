"""A node's machine: follows the head of the ledger, and makes local steps when it is asked to.

Theory of operation. The machine is one node process in one run. `handle` takes what happened and returns effects; a
driver carries them out in order and hands each answer back as an event. With every event the machine also does what is
next, in this order: greet a server that may not know it, catch up, send what is done, step, ask for what it lacks.

One thing is done at a time: entries are applied (APPLYING), a snapshot is loaded (LOADING), or local steps are made
(STEPPING). Else the node lacks entries and asks for them (BEHIND), sends a finished update (SENDING), or has nothing to
do (IDLE). `transitions.py` says what leads from where to where.

What it knows. theta is that of `version`, to which the entry of hash `head` led. The newest round frame says what the
server asks; the welcome gives the slot, and with it the lane. A new term forgets frame and slot: they were another
server's. Nothing of this need be durable: a node that restarts begins at theta_0, and is at the head again by entries
or a snapshot. A finished update is kept by the driver, so that a process that restarts sends the same one.

What it trusts. An entry must name the hash of the one before it; theta after it must have the entry's digest. An entry
that contradicts the head is refused under the term that the head came with, and under a higher one makes the node begin
anew from theta_0: a ledger restored from a backup. A digest that differs makes it begin anew too, three times. The
fourth time it puts forth `End`: its driver leaves the run, and joins it anew after a pause (runtime/abstention.py).

Whom it follows. The server of the highest term, unless nothing has come of that one for ten minutes and something does
of another: a forged term, so high that no server can take one above it, would else keep a node away for good.

Exactly once. Steps of a version are made once and sent at each announcement until the server acknowledges them, or no
entry can take them any more. The server keeps the first update of a node from each version: repetition is harmless.
"""

from dataclasses import replace

from meerkat_mq.core import metrics as m
from meerkat_mq.core.path import NO_DIGEST, Entry
from meerkat_mq.errors import RunMismatch
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node_state import RETRY_S, Done, NodeMachineState
from meerkat_mq.wire.frames import Entries, Offer, Reason, Refusal, Round, Update, Want, Welcome
from meerkat_mq.wire.messages import in_words

LONGEST_PAUSE_S = 60.0  # between local steps that fail
RESYNCHRONISATIONS = 3
SILENT_S = 600.0  # of the newest server; it says its state at least every 300 s
IN_VAIN = 5  # wants without an answer, after which nobody stands where the newest round says


class NodeMachine(NodeMachineState):
    """One node process in one run: `handle` for each event."""

    def handle(self, event: e.NodeEvent) -> list[e.NodeEffect]:
        """Take one event; returns the effects to carry out, in order."""
        match event:
            case e.FrameCame():
                self._on_frame_came(event)
            case e.EntriesApplied():
                self._on_entries_applied(event)
            case e.StepsDone():
                self._on_steps_done(event)
            case e.JobFailed():
                self._on_job_failed(event)
            case e.Tick():
                pass
            case e.ServerCame():
                self._on_server_came(event)
            case e.Connected():
                self._on_connected(event)
            case e.SnapshotLoaded():
                self._on_snapshot_loaded(event)
        self._advance(event.now)
        effects, self._effects = self._effects, []
        return effects

    # --- servers and connections ---

    def _on_connected(self, event: e.Connected) -> None:
        self._uninformed = True
        self._ask_at = float("-inf")  # nobody may have heard what was asked before
        self._heard_at = event.now
        self._introduce(event.now)

    def _introduce(self, now: float) -> None:
        self._greet_at = now + RETRY_S
        self._effects.append(e.PublishStatus())

    def _on_server_came(self, event: e.ServerCame) -> None:
        state = event.state
        if state.run != self._run_id.hex():
            self._count(m.ANOTHER_RUN)
        elif state.term == self._rank[0] and self._rank[1] not in ("", state.server_id):
            self._see_two_servers(event.now)
        elif state.rank < self._rank and self._is_replaced(m.STALE_SERVER, event.now, lives=state.connected):
            self._uninformed |= state.connected  # of a restored ledger, perhaps: by a want it learns of this term
        else:
            self._heard_at = event.now
            if state.term > self._rank[0]:
                self._follow_server(event.now)
            elif state.connected and self._link not in (None, state.link):
                self._introduce(event.now)  # the server connected anew: it may have missed this node's birth
            self._rank = state.rank
            self._link = state.link if state.connected else self._link

    def _is_replaced(self, reason: m.Metric, now: float, *, lives: bool = True) -> bool:
        """Count what came of a server that another one replaced; False where that one is silent, and forgotten now."""
        self._count(reason)
        if not lives or now - self._heard_at < SILENT_S:
            return True
        self._count(m.OUTLIVED)
        self._rank, self._trusted_term = (0, ""), 0
        return False

    def _see_two_servers(self, now: float) -> None:
        """A ledger from a backup lacks its newest terms, and so may the broker: ask until the term is above them.

        Under one term, this node could not tell that server's past from the one that it knows, nor its slots.
        """
        self._count(m.TWO_SERVERS)
        if not self._two_servers:
            self._follow_server(now)
            self._two_servers, self._ask_at = True, float("-inf")

    def _follow_server(self, now: float) -> None:
        """Forget what another server said: its slots and its round."""
        self._frame = self.slot = self._link = self._acknowledged_version = None
        self._uninformed = True
        self._two_servers = False
        self._introduce(now)

    # --- frames ---

    def _on_frame_came(self, event: e.FrameCame) -> None:
        frame = event.frame
        if (frame.header.run, frame.header.mask) != (self._header().run, self._header().mask):
            self._count(m.ANOTHER_RUN)
        elif _leads_to(frame) > self._last_version:
            self._count(m.BEYOND_THE_END)
        elif frame.header.term < self._rank[0] and self._is_replaced(m.STALE_TERM, event.now):
            pass
        else:
            self._heard_at = event.now
            if frame.header.term > self._rank[0]:
                self._follow_server(event.now)
                self._rank = (frame.header.term, "")
            self._take(frame)

    def _take(self, frame: Round | Welcome | Entries | Offer | Refusal) -> None:
        match frame:
            case Round():
                self._take_round(frame)
            case Entries() if self._busy is None:
                self._follow(frame.entries, frame.header.term)
            case Welcome() if frame.boot == self._boot:
                self.slot = frame.slot
            case Offer() if self._busy is None and frame.version > self.version:
                self._busy = e.FetchSnapshot(frame)
                self._effects.append(self._busy)
            case Refusal():
                self._take_refusal(frame)

    def _take_round(self, frame: Round) -> None:
        known = self._frame.header.version if self._frame is not None else -1
        if frame.header.version < known and self._in_vain < IN_VAIN:
            self._count(m.OLD_ROUND)
            return
        if frame.header.version != known:
            self._in_vain = 0
            self._ask_at = float("-inf")
        self._frame, self._uninformed, self._answered = frame, False, False
        if self.slot in frame.heard and frame.header.version == self.version:
            self._digests_refused = 0

    def _take_refusal(self, frame: Refusal) -> None:
        done = self._done
        if done is None or (frame.boot, frame.header.version) != (done.update.boot, done.version):
            return
        self._count(m.REFUSED.of(in_words(frame.reason)), done.version)
        if done.version < self.version or done.task is None:
            self._forget()
        elif frame.reason is Reason.RESYNCHRONISE and self._busy is None:
            self._digest_refused("the server refused this node's digest")

    # --- following the ledger ---

    def _follow(self, entries: tuple[Entry, ...], term: int) -> None:
        """Apply those entries that extend the head; refuse those that contradict it."""
        news = tuple(entry for entry in entries if entry.version >= self.version)
        if not news or news[0].version != self.version:
            return
        head = self._head
        for number, entry in enumerate(news, self.version):
            if entry.version != number or entry.previous != head:
                self._contradicted(term)
                return
            head = entry.hash(self._run_id)
        self._trusted_term = term
        self._busy = e.ApplyEntries(news)
        self._effects.append(self._busy)

    def _contradicted(self, term: int) -> None:
        if term > self._trusted_term:
            self._trusted_term = term
            self._start_over()
            return
        self._count(m.ENTRY_REFUSED)
        if self._frame is not None:
            self._frame = replace(self._frame, entries=())  # refused once, not at every event

    def _start_over(self) -> None:
        self._count(m.RESYNCHRONISED)
        self._effects.append(e.ResetTheta())
        self._forget()
        self._ask_at = float("-inf")
        self._stand_at_theta_0()

    def _digest_refused(self, why: str) -> None:
        self._digests_refused += 1
        if self._digests_refused > RESYNCHRONISATIONS:
            error = RunMismatch(
                f"version {self.version}",
                f"this node does not arrive at the server's theta ({why})",
                "check NumPy (≥ 2.0) and memory on both machines",
            )
            self._effects.append(e.End(error))
        self._start_over()

    def _on_entries_applied(self, event: e.EntriesApplied) -> None:
        if self._busy != e.ApplyEntries(event.entries) or len(event.digests) != len(event.entries):
            self._count(m.UNEXPECTED)
            return
        self._busy = None
        for entry, digest in zip(event.entries, event.digests, strict=True):
            if entry.digest != digest:
                self._count(m.DIGEST_DIFFERS)
                self._digest_refused(f"the digest after entry {entry.version} differs")
                return
        self._in_vain, last = 0, event.entries[-1]
        self.version, self._head = last.version + 1, last.hash(self._run_id)
        self._ask_at = float("-inf")
        self._base = next((digest for digest in reversed(event.digests) if digest != NO_DIGEST), self._base)

    def _on_snapshot_loaded(self, event: e.SnapshotLoaded) -> None:
        task = self._busy
        if not isinstance(task, e.FetchSnapshot) or task.offer.version != event.version:
            self._count(m.UNEXPECTED)
            return
        self._busy, self._in_vain = None, 0
        self._trusted_term = task.offer.header.term
        self.version, self._head, self._base = event.version, event.head, event.digest
        self._ask_at = float("-inf")

    def _on_steps_done(self, event: e.StepsDone) -> None:
        task = self._busy
        if not isinstance(task, e.StartSteps) or task.version != event.version:
            self._count(m.UNEXPECTED)
            return
        self._busy, self._stopping = None, False
        if not event.scalars and event.values is None:
            return  # none was made: the present round is asked about again
        self._forget()
        self._pause_s = RETRY_S
        self._answered = self._sent = False
        header, base = replace(self._header(), version=task.version), self._base[:8]
        self._done = Done(task, Update(header, self._boot, base, event.loss, event.scalars, values=event.values))
        self._drop_if_late()

    def _on_job_failed(self, event: e.JobFailed) -> None:
        """Try again in a while, steps after each failure in a longer one: what the round asks for then."""
        if self._busy != event.job:
            self._count(m.UNEXPECTED)
            return
        self._busy, self._stopping = None, False
        match event.job:
            case e.StartSteps(version):
                self._count(m.STEPS_FAILED, version)
                self._step_at, self._pause_s = event.now + self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
                return
            case e.FetchSnapshot():
                self._count(m.SNAPSHOT_MISSED)
            case e.ApplyEntries():
                self._count(m.ENTRIES_MISSED)
                if self._frame is not None:
                    self._frame = replace(self._frame, entries=())  # the server is asked, not this frame again
        self._ask_at = event.now + RETRY_S

    # --- what next ---

    def _advance(self, now: float) -> None:
        """Greet, send what is done, catch up, ask for what lacks, or step."""
        if self._unknown and now >= self._greet_at:
            self._introduce(now)
            self._effects.append(e.Send(Want(self._header(), self._boot, welcome=True)))
        self._drop_if_late()
        if self._busy is None and self._frame is not None:
            self._catch_up(self._frame)
        self._send_done()
        if self._busy is not None:
            self._stop_if_late(self._busy)
        elif self._due is not None and now >= self._step_at:
            self._busy = self._due
            self._effects.append(self._busy)
        if now >= self._ask_at and (self._two_servers or self._lacks_entries):
            self._ask(now)

    def _ask(self, now: float) -> None:
        """Ask for the entries that lack, and for a term above that of two servers."""
        if self._lacks_entries and self._ask_at != float("-inf"):
            self._in_vain += 1
        self._ask_at = now + RETRY_S
        term = min(self.term + self._two_servers, 2**32 - 1)
        entries_from = self.version if self._lacks_entries else None
        want = Want(replace(self._header(), term=term), self._boot, self._two_servers, entries_from)
        self._effects.append(e.Send(want))

    def _catch_up(self, frame: Round) -> None:
        """Follow what the round says of the ledger; see whether a server of another term tells another past."""
        version, term = frame.header.version, frame.header.term
        if version > self.version:
            self._follow(frame.entries, term)
        elif version < self.version:
            if term > self._trusted_term:
                self._contradicted(term)
        elif frame.entries and frame.entries[-1].version + 1 == version:
            if frame.entries[-1].hash(self._run_id) != self._head:
                self._contradicted(term)
            else:
                self._trusted_term = term

    def _stop_if_late(self, busy: e.ApplyEntries | e.FetchSnapshot | e.StartSteps) -> None:
        """The next version would be too far from the one that the steps began from: send what there is."""
        if isinstance(busy, e.StartSteps) and not self._stopping and self._age(busy.version) >= self._oldest:
            self._stopping = True
            self._effects.append(e.StopSteps())

    def _send_done(self) -> None:
        """Send finished steps at each announcement until they are acknowledged."""
        done, frame = self._done, self._frame
        if done is None or frame is None or self.slot is None:
            return
        if self._acknowledged(done.version, frame):
            self._forget(heard=True)
        elif self._answered or not frame.is_open:
            return
        elif self.slot in frame.asked and self._still_asked(done, frame, self.slot):
            self._answered = self._sent = True
            header = replace(self._header(), version=done.version)
            self._effects.append(e.Send(replace(done.update, header=header)))

    def _drop_if_late(self) -> None:
        """No entry will take finished steps any more."""
        done, frame = self._done, self._frame
        if done is not None and frame is not None and self._age(done.version) > self._max_staleness:
            heard = self._acknowledged(done.version, frame)
            if not heard and not self._sent:
                self._count(m.LATE_STEP, done.version)
            self._forget(heard=heard)

    def _forget(self, *, heard: bool = False) -> None:
        if self._done is not None:
            self._effects.append(e.Forget(self._done.version, heard))
            self._acknowledged_version = self._done.version if heard else None
            self._done = None


def _leads_to(frame: Round | Welcome | Entries | Offer | Refusal) -> int:
    """The newest version that a frame speaks of."""
    entries = frame.entries if isinstance(frame, Round | Entries) else ()
    offered = frame.version if isinstance(frame, Offer) else 0
    return max(frame.header.version, offered, *(entry.version + 1 for entry in entries))
