"""The server's machine: opens rounds, takes updates, closes rounds; commits before it publishes.

Theory of operation. The machine is one server in one term of one run. `start` and `handle` take what happened and
return effects; a driver carries them out in order and hands each answer back as an event. Nothing here waits or fails.

A version of theta goes through the phases of `transitions.py`:

    WAITING  too few nodes → OPEN  updates come → JUDGING  guards, coefficients → APPLYING  theta's digest
        → COMMITTING  the entry → OPEN, or WAITING, or FINISHED

What is durable, and when. An update counts from UpdatesCommitted on: only then does a round frame acknowledge it. A
node's slot is committed with its first update; until then it is this machine's word, and the next term gives the node
another one. The head moves at EntryCommitted, and only then is the next round
published. So a crash between an effect and its answer loses nothing that anybody was told: the next machine is made
from the ledger (entries, updates in no entry yet, slots, judgements), and nodes send again what is not acknowledged.

What decides the entry. With JUDGING the set of updates is fixed; what is committed later waits for the next entry, or
is too late. All that follows is a function of that set and of the ledger before it, so another server that closes with
the same set writes the same entry.

Fences. A frame of a lower term is dropped and counted. The ledger refuses a commit under any term but its newest, so of
two servers one ends. A node that has seen a higher term makes this server take one above it (TakeTerm): its driver then
makes a new machine, or lets this one `stay`, since nodes may not raise terms without end (runtime/budgets.py). Answers
that nobody waits for (of the machine before, or twice) are dropped and counted.

Time. Deadlines, graces and announcements are due by `now` of an event; `wake_at` asks for a Tick when the next is due.
"""

import math
from collections.abc import Sequence
from functools import partial

from meerkat_mq.core import metrics as m
from meerkat_mq.core.path import MAX_WEIGHT, Entry
from meerkat_mq.errors import AnotherServer
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.guards import on_arrival
from meerkat_mq.rounds.open_round import OpenRound, opened, outcome_of, quorum_of
from meerkat_mq.rounds.policy import (
    deadline_length,
    fewest_needed,
    needed,
    newest_that_fit,
    shortened,
    snapshot_due,
)
from meerkat_mq.rounds.records import NOT_REFUSED, UpdateRecord, Verdict
from meerkat_mq.rounds.roster import KnownNode
from meerkat_mq.rounds.server_state import ServerMachineState
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import Reason, Update, Welcome
from meerkat_mq.wire.messages import in_words

LAST_ATTEMPT = 2**16 - 1
LONGEST_AT = 4  # attempts: the deadline has its longest length; who can answer in time, has answered before the next
SLOWLY = 0.2  # in a buffered run, a node that makes several versions' steps may be silent for several deadlines


class ServerMachine(ServerMachineState):
    """One server in one term of one run: `start`, then `handle` for each event."""

    def start(self, now: float) -> list[e.ServerEffect]:
        """A connection stands: publish where the run stands, and open a round if none is open."""
        if self._open is None:
            self._proceed(now)
        self._announce()
        if self.finished:
            self._effects.append(e.PublishState())
        return self._flush()

    def handle(self, event: e.ServerEvent) -> list[e.ServerEffect]:
        """Take one event; returns the effects to carry out, in order."""
        match event:
            case e.UpdateCame():
                self._on_update_came(event)
            case e.StatusCame():
                self._on_status_came(event)
            case e.WantCame():
                self._on_want_came(event)
            case e.ServerSeen():
                self._on_server_seen(event)
            case e.Tick():
                self._on_tick(event)
            case e.UpdatesCommitted():
                self._on_updates_committed(event)
            case e.ValuesFetched():
                self._on_values_fetched(event)
            case e.DirectionsMeasured():
                self._on_directions_measured(event)
            case e.RoundJudged():
                self._on_round_judged(event)
            case e.TermsApplied():
                self._on_terms_applied(event)
            case e.EntryCommitted():
                self._on_entry_committed(event)
            case e.SlotCommitted():
                self._on_slot_committed(event)
        return self._flush()

    def _flush(self) -> list[e.ServerEffect]:
        effects, self._effects = self._effects, []
        return effects

    # --- nodes come and go ---

    def _on_status_came(self, event: e.StatusCame) -> None:
        status, node = event.status, self._nodes.get(event.node)
        if status.status == "online" and status.run in (None, self._settings.run_id.hex()):
            if node is None or not node.online or (status.boot, status.link) != (node.boot, node.link):
                self._born(event.now, event.node, status)
        elif status.refuses is not None:
            if node is not None and node.online:
                self._gone(event.now, event.node, left=True)
        elif self._is_late(node, status):
            self._count(m.LATE_DEATH, event.node)
        elif status.status == "asleep" and node is not None and status.wakes_in_s is not None:
            node.boot, node.link = status.boot, status.link
            dead_at = event.now + status.wakes_in_s + self._settings.grace_s
            self._vanished(event.now, event.node, dead_at, asleep=True)
            self._close_if_due(event.now)
        elif node is None or not node.online:
            return
        else:
            self._gone(event.now, event.node, left=status.status == "stopped")

    def _born(self, now: float, name: str, status: NodeStatus) -> None:
        node = self._nodes.appeared(name)
        if node is None:
            self._count(m.NO_SLOT, name)
            return
        if self._open is not None:
            self._open.awaited.until(name, self._nodes.awaited_until(name, now))
        node.boot, node.link = status.boot, status.link
        node.weight = min(max(status.rows, 1), MAX_WEIGHT) if self._settings.weigh_by_rows else 1
        self._welcome(now, name, node)

    def _on_slot_committed(self, event: e.SlotCommitted) -> None:
        if not self.has_answered(event.node):
            self._count(m.UNEXPECTED, event.node)

    def _welcome(self, now: float, name: str, node: KnownNode) -> None:
        self._effects.append(e.Reply(name, Welcome(self._header(), node.boot, node.slot)))
        current = self._open
        if current is None:
            self._proceed(now)
            opened = self._open is not None
        else:
            joins = current.attempt > 0 or self._settings.takes_what_comes(self.version)
            until = self._nodes.awaited_until(name, now)
            opened = joins and node.online and not current.closing and current.ask(name, node.slot, until)
        if opened:  # a frame that says nothing new, for each of a thousand births, would go a million times
            self._announce()

    def _vanished(self, now: float, name: str, dead_at: float, *, asleep: bool = False) -> None:
        self._nodes.vanished(name, dead_at, asleep=asleep)
        if self._open is not None:
            self._open.awaited.until(name, self._nodes.awaited_until(name, now))

    def _gone(self, now: float, name: str, *, left: bool) -> None:
        current = self._open
        self._vanished(now, name, now + self._settings.grace_s)
        self._count(m.LEFT if left else m.DIED, name)
        if left and current is not None and name in current.asked and not self._window.took(name, self.version):
            current.forget(name)
            fewer = max(needed(len(current.asked), self._settings.quorum), fewest_needed(self._settings, self.version))
            if not self._settings.takes_what_comes(self.version):
                current.needed = min(current.needed, fewer)
        self._close_if_due(now)

    def _on_want_came(self, event: e.WantCame) -> None:
        node = self._nodes.get(event.node)
        self._compare(event.node, event.want.header)
        if event.want.welcome and node is not None:
            self._effects.append(e.Reply(event.node, Welcome(self._header(), event.want.boot, node.slot)))
            self._announce()
        if event.want.entries_from is not None:
            self._effects.append(e.SendEntries(event.node, event.want.entries_from))
        if event.want.blob is not None:
            self._effects.append(e.SendChunks(event.node, event.want))

    def _on_server_seen(self, event: e.ServerSeen) -> None:
        state = event.state
        if state.rank > self._rank:
            problem = f"a server of term {state.term} on host {state.host} has taken over"
            remedy = "leave it in charge, or stop it and start this one again"
            self._effects.append(e.End(AnotherServer(f"term {self._rank[0]}", problem, remedy)))
        elif state.rank < self._rank or state.status != ("finished" if self.finished else "online"):
            self._effects.append(e.PublishState())

    # --- updates ---

    def _on_update_came(self, event: e.UpdateCame) -> None:
        name, update = event.node, event.update
        reason = self._why_dropped(name, update)
        if reason is not None:
            self._count(reason, name, update.header.version)
            return
        refused = self._why_refused(name, update)
        if refused is not None:
            self._refuse(name, update, refused)
        elif update.values is not None:
            self._window.fetch(name, update.header.version)
            self._effects.append(e.FetchValues(name, update))
        else:
            self._take(
                name, update, on_arrival(update.scalars, update.loss, self._settings.lr, self._settings.max_step)
            )

    def _on_values_fetched(self, event: e.ValuesFetched) -> None:
        name, update, verdict = event.node, event.update, event.verdict
        if not self._window.fetched(name, update.header.version):
            self._count(m.UNEXPECTED, name, update.header.version)
        elif verdict is None:
            self._count(m.VALUES_MISSED, name, update.header.version)
        elif (reason := self._why_dropped(name, update)) is not None:
            self._count(reason, name, update.header.version)
        else:
            not_finite = verdict is Verdict.ACCEPTED and not math.isfinite(update.loss)
            self._take(name, update, Verdict.NOT_FINITE if not_finite else verdict)

    def _refuse(self, name: str, update: Update, reason: Reason) -> None:
        self._count(m.REFUSED.of(in_words(reason)), name, update.header.version)
        self._reply_refusal(name, update, reason)

    def _take(self, name: str, update: Update, verdict: Verdict) -> None:
        """Keep the update, also one that the guards refuse: it is this node's only one from this version's theta."""
        current, base = self._open, update.header.version
        assert current is not None
        self._window.take(name, base)
        node = self._nodes[name]
        weight = current.weight(node.weight, lambda other: self._nodes[other].weight) if node.weight > 1 else 1
        if weight < node.weight:
            self._count(m.WEIGHS_LESS, name)
        record = UpdateRecord(
            base, name, node.slot, update.boot, weight, update.scalars, update.loss, verdict, update.values
        )  # fmt: skip
        if verdict is not Verdict.ACCEPTED:
            self._count(m.REFUSED.of(in_words(verdict)), name)
        by_buffer = self._settings.takes_what_comes(self.version)
        if self._nodes.answers(name, forgiven=by_buffer):
            self._effects.append(e.CommitSlot(name, node.slot))
        current.taken += not current.closing
        enough = current.needed if by_buffer else len(current.asked)
        self._effects.append(e.CommitUpdate(record, last=current.taken >= enough))
        if verdict is not Verdict.ACCEPTED:
            self._reply_refusal(name, update, Reason.OUT_OF_RANGE)

    def _why_dropped(self, name: str, update: Update) -> m.Metric | None:
        mine, header, current = self._header(), update.header, self._open
        if (header.run, header.mask) != (mine.run, mine.mask):
            return m.ANOTHER_RUN
        self._compare(name, header)
        if header.term != mine.term:
            return m.ANOTHER_TERM
        if current is None:
            return m.LATE
        late = self._window.why_late(name, header.version, self.version + current.closing)
        return late or (None if name in current.asked and self._nodes.get(name) is not None else m.NOT_ASKED)

    def _on_updates_committed(self, event: e.UpdatesCommitted) -> None:
        current = self._open
        closing = current is not None and current.closing
        for record in event.records:
            if not self._window.spans(record.version, self.version + closing):
                # no entry takes it, so nobody may be told that it was acknowledged
                self._count(m.LATE, record.node, record.version)
                continue
            self._window.committed(record)
            if current is None or closing:
                self._window.wait(record)
            else:
                current.acknowledge(record)
                current.heard_at = event.now
        self._close_if_due(event.now)

    # --- rounds open and close ---

    def _on_tick(self, event: e.Tick) -> None:
        self._last_tick = event.now
        self._close_if_due(event.now)
        if self._open is not None and self._open.announcement_due(event.now):
            self._announce()

    def _proceed(self, now: float) -> None:
        """Open the next round if there is one, and nodes for it."""
        version, settings = self.version, self._settings
        eligible = {} if self.finished else self._nodes.eligible(now, settings.fewest_nodes)
        if not eligible:
            return
        self._open = opened(version, settings, eligible, self._window.open(), self.has_answered)
        self._open.heard_at = now
        for name in self._open.asked:
            self._open.awaited.until(name, self._nodes.awaited_until(name, now))
        self._open.wait(now, deadline_length(settings, version, 0))
        if settings.measured:
            self._effects.append(e.MeasureDirections(version, settings.directions, settings.scalars_of(version)))
        self._close_if_due(now)

    def _on_directions_measured(self, event: e.DirectionsMeasured) -> None:
        current = self._open
        if current is None or event.version != self.version or current.products is not None:
            self._count(m.UNEXPECTED)
            return
        current.products = event.products
        self._close_if_due(event.now)

    def _close_if_due(self, now: float) -> None:
        current = self._open
        if current is None or current.closing:
            return
        overdue = now >= current.deadline_at
        nobody_to_wait_for = current.awaited.all_dead(now)
        if self._settings.takes_what_comes(self.version):
            due = len(current.acknowledged) >= (1 if overdue or nobody_to_wait_for else current.needed)
        else:
            due = current.answers >= current.needed and (overdue or nobody_to_wait_for)
        comparable = current.comparable(self._settings.min_updates)
        if due and comparable:
            if current.products is not None:  # else it closes as soon as they are measured
                self._close(current, current.products, now, overdue=overdue)
        elif overdue:
            if due:
                self._count(m.TOO_FEW_USABLE)
                for name in current.useless:
                    self._count(m.UNUSABLE, name)
            self._extend(current, now)

    def _close(self, current: OpenRound, products: Sequence[Sequence[float]], now: float, *, overdue: bool) -> None:
        current.closing, current.overdue = True, overdue
        self._note_silence(current, now)
        judge = partial(outcome_of, self._guard, self._settings, self.version, products)
        self._effects.append(e.JudgeRound(self._rank[0], self.version, current.records, judge))

    def _note_silence(self, current: OpenRound, now: float) -> None:
        """Nodes that the round waited for in vain lose credit; where a buffer closes it, more slowly."""
        in_vain_s = (now - current.heard_at) * (SLOWLY if self._settings.takes_what_comes(self.version) else 1.0)
        late = [name for name in current.awaited.waited_for if name not in current.answered]
        if late and in_vain_s > 0:
            for name in self._nodes.waited(late, now, in_vain_s):
                self._count(m.FLAGGED.of("silent"), name)

    def _on_round_judged(self, event: e.RoundJudged) -> None:
        current, mine = self._open, (self._rank[0], self.version)
        if current is None or not current.closing or current.outcome or (event.term, event.version) != mine:
            self._count(m.UNEXPECTED)
            return
        current.outcome = outcome = event.outcome
        for was, record in zip(current.records, outcome.records, strict=True):
            if record.verdict is not was.verdict and record.verdict not in NOT_REFUSED:
                self._count(m.REFUSED.of(in_words(record.verdict)), record.node)
        for name in shortened(outcome.records, self._settings):
            self._count(m.SHORTENED, name)
        self._effects.append(e.ApplyTerms(self.version, outcome.terms, outcome.shares))

    def _extend(self, current: OpenRound, now: float) -> None:
        """Below quorum: nothing is written; ask everybody at hand, and wait longer."""
        current.attempt = min(current.attempt + 1, LAST_ATTEMPT)
        for name, slot in self._nodes.eligible(now).items():
            current.ask(name, slot, self._nodes.awaited_until(name, now))
        if not self._settings.takes_what_comes(self.version):
            fewer = quorum_of(current.asked, self._settings, self.version, self.has_answered)
            if current.attempt > LONGEST_AT:
                answered = needed(sum(map(self.has_answered, current.asked)), self._settings.quorum)
                fewer = min(fewer, max(answered, fewest_needed(self._settings, self.version)))
            current.needed = min(current.needed, fewer)
        current.wait(now, deadline_length(self._settings, self.version, current.attempt))
        self._count(m.EXTENDED)
        self._announce()

    def _on_terms_applied(self, event: e.TermsApplied) -> None:
        current = self._open
        outcome = current.outcome if current is not None else None
        if current is None or outcome is None or current.entry is not None or event.version != self.version:
            self._count(m.UNEXPECTED)
            return
        current.entry = Entry(self.version, outcome.terms, self._head, event.digest, event.displacement)
        self._effects.append(current.commit(current.entry))

    def _on_entry_committed(self, event: e.EntryCommitted) -> None:
        current = self._open
        entry, outcome = (current.entry, current.outcome) if current is not None else (None, None)
        if entry is None or outcome is None or event.commit.entry != entry:
            self._count(m.UNEXPECTED)
            return
        self._entries = newest_that_fit([*self._entries, entry])
        self._head = entry.hash(self._settings.run_id)
        self.version += 1
        self._window.advance(entry)
        self._early.remember(outcome.judgements)
        self._open = None
        self._flag(outcome.flagged)
        if snapshot_due(self.version, self._settings):
            self._effects.append(e.KeepSnapshot(self.version, self._head))
        self._proceed(event.now)
        self._announce()
        if self.finished:
            self._effects.append(e.PublishState())
