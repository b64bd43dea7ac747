"""The server's machine: opens rounds, hears updates, closes rounds; commits before it publishes."""

from collections.abc import Mapping, Sequence
from functools import singledispatchmethod

from meerkat_mq.core.path import MAX_WEIGHT, NO_DIGEST, Entry, seed_for
from meerkat_mq.errors import AnotherServer
from meerkat_mq.rounds.events import (
    ApplyTerms,
    CommitEntry,
    CommitSlot,
    CommitUpdate,
    Count,
    End,
    EntryCommitted,
    PublishRound,
    PublishState,
    Reply,
    SendChunks,
    SendEntries,
    ServerEffect,
    ServerEvent,
    ServerSeen,
    SlotCommitted,
    StatusCame,
    TermsApplied,
    Tick,
    UpdateCame,
    UpdateRecord,
    UpdatesCommitted,
    WantCame,
)
from meerkat_mq.rounds.policy import (
    RoundSettings,
    applicable,
    deadline_length,
    fewest_needed,
    lane_of,
    needed,
    newest_that_fit,
    sample,
    terms_of,
)
from meerkat_mq.rounds.record import KnownNode, OpenRound
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import MAX_SLOTS, Header, Reason, Refusal, Round, Update, Welcome

LAST_ATTEMPT = 2**16 - 1


class ServerMachine:
    """One server in one term of one run.

    Attributes:
        version: theta's committed version, the head of the ledger.
    """

    def __init__(
        self,
        settings: RoundSettings,
        *,
        term: int,
        server_id: str,
        base: bytes,
        version: int = 0,
        head: bytes | None = None,
        slots: Mapping[str, int] | None = None,
        entries: Sequence[Entry] = (),
        updates: Sequence[UpdateRecord] = (),
    ) -> None:
        """Resume from what the ledger holds.

        Args:
            settings: the run's rules.
            term: this server's term.
            server_id: 16 hex digits.
            base: 16 bytes, the newest due digest of theta.
            version: number of ledger entries.
            head: hash of the newest entry; None before the first.
            slots: node to slot.
            entries: the newest entries.
            updates: the committed updates of round `version`: they stay heard.
        """
        self._settings = settings
        self._rank = (term, server_id)
        self._base = base
        self._head = head or settings.mask_hash
        self._entries = newest_that_fit(entries)
        self._nodes = {node: KnownNode(slot, welcomed=True) for node, slot in (slots or {}).items()}
        self._resumed = {record.node: record for record in updates if record.version == version}
        self._open: OpenRound | None = None
        self._effects: list[ServerEffect] = []
        self._last_tick = float("-inf")
        self.version = version

    @property
    def finished(self) -> bool:
        """Whether all rounds are closed."""
        return self.version >= self._settings.count

    @property
    def online(self) -> int:
        """How many nodes are at hand."""
        return sum(node.online for node in self._nodes.values())

    @property
    def wake_at(self) -> float | None:
        """When the machine wants its next Tick; None: not before another event."""
        current = self._open
        if current is None or current.closing:
            return None
        dying = [
            node.dead_at
            for name in current.asked.keys() - current.heard.keys()
            if not (node := self._nodes[name]).online and node.dead_at > self._last_tick
        ]
        return min([current.deadline_at, *current.announce_at[:1], *dying])

    def start(self, now: float) -> list[ServerEffect]:
        """A connection stands: publish where the run stands, and open a round if none is open."""
        if self._open is None:
            self._proceed(now)
        self._announce()
        if self.finished:
            self._effects.append(PublishState(finished=True))
        return self._flush()

    def handle(self, event: ServerEvent) -> list[ServerEffect]:
        """Take one event; returns the effects to carry out, in order."""
        self._on(event)
        return self._flush()

    def _flush(self) -> list[ServerEffect]:
        effects, self._effects = self._effects, []
        return effects

    def _count(self, reason: str, node: str = "") -> None:
        self._effects.append(Count(reason, node))

    @singledispatchmethod
    def _on(self, event: ServerEvent) -> None:
        raise TypeError(f"unknown event {event!r}")

    # --- nodes come and go ---

    @_on.register
    def _(self, event: StatusCame) -> None:
        status, node = event.status, self._nodes.get(event.node)
        if status.status == "online" and status.run in (None, self._settings.run_id.hex()):
            if node is None or not node.online or (status.boot, status.link) != (node.boot, node.link):
                self._born(event.now, event.node, status)
        elif node is None or not node.online:
            return
        elif status.status in ("stopped", "lost") and status.link != node.link:
            self._count("late death", event.node)
        else:
            self._gone(event.now, event.node, left=status.status == "stopped")

    def _born(self, now: float, name: str, status: NodeStatus) -> None:
        node = self._nodes.get(name)
        if node is None:
            slot = 1 + max((other.slot for other in self._nodes.values()), default=-1)
            if slot >= MAX_SLOTS:
                self._count("no slot left", name)
                return
            node = self._nodes[name] = KnownNode(slot)
            self._effects.append(CommitSlot(name, slot))
        node.boot, node.link, node.online = status.boot, status.link, True
        node.weight = min(max(status.rows, 1), MAX_WEIGHT) if self._settings.weigh_by_rows else 1
        if node.welcomed:
            self._welcome(now, name, node)

    @_on.register
    def _(self, event: SlotCommitted) -> None:
        node = self._nodes.get(event.node)
        if node is None or node.welcomed:
            self._count("unexpected answer", event.node)
            return
        node.welcomed = True
        self._welcome(event.now, event.node, node)

    def _welcome(self, now: float, name: str, node: KnownNode) -> None:
        self._effects.append(Reply(name, Welcome(self._header(), node.boot, node.slot)))
        current = self._open
        if current is None:
            self._proceed(now)
        elif current.attempt > 0 and node.online and not current.closing:
            current.asked[name] = node.slot
        self._announce()

    def _gone(self, now: float, name: str, *, left: bool) -> None:
        node, current = self._nodes[name], self._open
        node.online = False
        node.dead_at = now + self._settings.grace_s
        self._count("left" if left else "died", name)
        if left and current is not None and name in current.asked.keys() - current.taken:
            del current.asked[name]
            fewer = max(needed(len(current.asked), self._settings.quorum), fewest_needed(self._settings))
            current.needed = min(current.needed, fewer)
        self._close_if_due(now)

    @_on.register
    def _(self, event: WantCame) -> None:
        node = self._nodes.get(event.node)
        if event.want.welcome and node is not None and node.welcomed:
            self._effects.append(Reply(event.node, Welcome(self._header(), event.want.boot, node.slot)))
            self._announce()
        if event.want.entries_from is not None:
            self._effects.append(SendEntries(event.node, event.want.entries_from))
        if event.want.blob is not None:
            self._effects.append(SendChunks(event.node, event.want))

    @_on.register
    def _(self, event: ServerSeen) -> None:
        state = event.state
        if state.rank > self._rank:
            error = AnotherServer(
                f"term {self._rank[0]}",
                f"a server of term {state.term} on host {state.host} has taken over",
                "leave it in charge, or stop it and start this one again",
            )
            self._effects.append(End(error))
        elif state.rank < self._rank or state.status != ("finished" if self.finished else "online"):
            self._effects.append(PublishState(self.finished))

    # --- updates ---

    @_on.register
    def _(self, event: UpdateCame) -> None:
        name, update = event.node, event.update
        reason = self._why_dropped(name, update)
        if reason is not None:
            self._count(reason, name)
            return
        refused = self._why_refused(name, update)
        if refused is not None:
            self._count(f"refused: {refused.name.lower().replace('_', ' ')}", name)
            self._effects.append(Reply(name, Refusal(self._header(), update.boot, refused)))
            return
        self._take(name, update)

    def _take(self, name: str, update: Update) -> None:
        assert self._open is not None
        self._open.taken.add(name)
        node = self._nodes[name]
        record = UpdateRecord(self.version, name, node.slot, update.boot, node.weight, update.scalars, update.loss)
        self._effects.append(CommitUpdate(record))

    def _why_dropped(self, name: str, update: Update) -> str | None:
        mine, header, current = self._header(), update.header, self._open
        if (header.run, header.mask) != (mine.run, mine.mask):
            return "of another run"
        if header.term != mine.term:
            return "of another term"
        if header.version != self.version or current is None or current.closing:
            return "early" if header.version > self.version else "late"
        if name not in current.asked:
            return "not asked"
        if name in current.taken:
            return "duplicate"
        return None if applicable(update.scalars, self._settings.lr) else "too large to apply"

    def _why_refused(self, name: str, update: Update) -> Reason | None:
        if update.base != self._base[:8]:
            return Reason.RESYNCHRONISE
        if len(update.scalars) != self._settings.steps:
            return Reason.WRONG_STEPS
        return Reason.WRONG_SEEDS if update.seeds not in (None, self._seeds(name)) else None

    def _seeds(self, name: str) -> tuple[int, ...]:
        lane = lane_of(self._nodes[name].slot, self._settings.lanes)
        return tuple(seed_for(self._settings.run_id, self.version, lane, step) for step in range(self._settings.steps))

    @_on.register
    def _(self, event: UpdatesCommitted) -> None:
        current = self._open
        if current is None or current.closing:
            return
        for record in event.records:
            if record.version == self.version and record.node in current.taken:
                current.heard.setdefault(record.node, record)
        self._close_if_due(event.now)

    # --- rounds open and close ---

    @_on.register
    def _(self, event: Tick) -> None:
        self._last_tick = event.now
        self._close_if_due(event.now)
        if self._open is not None and self._open.announcement_due(event.now):
            self._announce()

    def _eligible(self) -> dict[str, int]:
        return {name: node.slot for name, node in self._nodes.items() if node.online and node.welcomed}

    def _proceed(self, now: float) -> None:
        """Open the next round if there is one, and nodes for it."""
        settings, eligible = self._settings, self._eligible()
        if self.finished or len(eligible) < settings.min_nodes:
            return
        chosen = sample(settings.run_id, self.version, eligible.values(), settings.fraction)
        asked = {name: slot for name, slot in eligible.items() if slot in chosen}
        heard, self._resumed = self._resumed, {}
        asked |= {name: record.slot for name, record in heard.items()}
        self._open = OpenRound(asked, needed(len(asked), settings.quorum), heard, set(heard))
        self._open.wait(now, settings.deadline_s)
        self._close_if_due(now)

    def _close_if_due(self, now: float) -> None:
        current = self._open
        if current is None or current.closing:
            return
        overdue = now >= current.deadline_at
        waiting = any(not self._nodes[name].dead(now) for name in current.asked.keys() - current.heard.keys())
        if len(current.heard) >= current.needed and (overdue or not waiting):
            current.terms = terms_of(current.records, self._settings)
            self._effects.append(ApplyTerms(self.version, current.terms))
        elif overdue:
            self._extend(current, now)

    def _extend(self, current: OpenRound, now: float) -> None:
        """Below quorum: nothing is written; ask everybody at hand, and wait longer."""
        current.attempt = min(current.attempt + 1, LAST_ATTEMPT)
        current.asked |= self._eligible()
        current.wait(now, deadline_length(self._settings.deadline_s, current.attempt))
        self._count("round extended")
        self._announce()

    @_on.register
    def _(self, event: TermsApplied) -> None:
        current = self._open
        if current is None or current.terms is None or current.entry is not None or event.version != self.version:
            self._count("unexpected answer")
            return
        current.entry = Entry(self.version, current.terms, self._head, event.digest)
        self._effects.append(CommitEntry(current.entry, current.records))

    @_on.register
    def _(self, event: EntryCommitted) -> None:
        entry = self._open.entry if self._open is not None else None
        if entry is None or event.version != entry.version:
            self._count("unexpected answer")
            return
        self._entries = newest_that_fit([*self._entries, entry])
        self._head = entry.hash(self._settings.run_id)
        self._base = self._base if entry.digest == NO_DIGEST else entry.digest
        self.version += 1
        self._open = None
        self._proceed(event.now)
        self._announce()
        if self.finished:
            self._effects.append(PublishState(finished=True))

    # --- frames ---

    def _header(self) -> Header:
        return Header.of(self._settings.run_id, self._rank[0], self.version, self._settings.mask_hash)

    def _announce(self) -> None:
        """Publish the round, unless it is closing: the next one is soon there."""
        current, settings = self._open, self._settings
        if current is not None and current.closing:
            return
        frame = Round(
            self._header(),
            is_open=current is not None,
            steps=settings.steps,
            lanes=settings.lanes,
            eps=settings.eps,
            deadline_ms=min(round(1000 * (current.deadline_s if current else settings.deadline_s)), 2**32 - 1),
            attempt=current.attempt if current else 0,
            asked=frozenset(current.asked.values()) if current else frozenset(),
            heard=frozenset(record.slot for record in current.heard.values()) if current else frozenset(),
            entries=self._entries,
        )
        self._effects.append(PublishRound(frame))
