"""The server's machine: opens rounds, hears updates, closes rounds; commits before it publishes."""

from dataclasses import dataclass, field
from functools import singledispatchmethod

from meerkat_mq.core.path import NO_DIGEST, Entry, seed_for
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
    ANNOUNCE_AT,
    RoundSettings,
    deadline_length,
    lane_of,
    needed,
    newest_that_fit,
    sample,
    terms_of,
)
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import Header, Reason, Refusal, Round, Update, Welcome


@dataclass(slots=True)
class _Node:
    slot: int
    welcomed: bool = False
    boot: int = 0
    link: int = 0
    weight: int = 1
    online: bool = False
    died_at: float = float("-inf")


@dataclass(slots=True)
class _Open:
    """The open round; `asked` maps node to slot, `taken` holds nodes whose update is accepted, committed or not."""

    asked: dict[str, int]
    needed: int
    opened_at: float
    deadline_s: float
    attempt: int = 0
    taken: set[str] = field(default_factory=set)
    heard: dict[str, UpdateRecord] = field(default_factory=dict)
    announce_at: list[float] = field(default_factory=list)
    closing: bool = False

    @property
    def deadline_at(self) -> float:
        return self.opened_at + self.deadline_s


class ServerMachine:
    """One server in one term of one run.

    Attributes:
        version: theta's committed version, the head of the ledger.
        finished: whether all rounds are closed.
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
        slots: dict[str, int] | None = None,
        entries: tuple[Entry, ...] = (),
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
        """
        self._settings = settings
        self._rank = (term, server_id)
        self._base = base
        self._head = head or settings.mask_hash
        self._entries = list(entries)
        self._nodes = {node: _Node(slot, welcomed=True) for node, slot in (slots or {}).items()}
        self._open: _Open | None = None
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
        if self._open is None or self._open.closing:
            return None
        graces = [
            node.died_at + self._settings.grace_s
            for name, node in self._nodes.items()
            if name in self._open.asked and name not in self._open.heard and not node.online
        ]
        future = [at for at in graces if at > self._last_tick]
        return min([self._open.deadline_at, *self._open.announce_at[:1], *future])

    def start(self, now: float) -> list[ServerEffect]:
        """A connection stands: publish where the run stands, and open a round if none is open."""
        if self._open is None:
            self._proceed(now)
        if self._open is None or not self._open.closing:
            self._effects = [effect for effect in self._effects if not isinstance(effect, PublishRound)]
            self._publish()
        return self._flush()

    def handle(self, event: ServerEvent) -> list[ServerEffect]:
        """Take one event; returns the effects to carry out, in order."""
        self._on(event)
        return self._flush()

    def _flush(self) -> list[ServerEffect]:
        effects, self._effects = self._effects, []
        return effects

    @singledispatchmethod
    def _on(self, event: ServerEvent) -> None:
        raise TypeError(f"unknown event {event!r}")

    # --- nodes come and go ---

    @_on.register
    def _(self, event: StatusCame) -> None:
        status, node = event.status, self._nodes.get(event.node)
        if status.status == "online":
            if node is None or not node.online or (status.boot, status.link) != (node.boot, node.link):
                self._born(event.now, event.node, status)
        elif node is not None and node.online and (status.link == node.link or status.status == "starting"):
            node.online = False
            left = status.status == "stopped"
            node.died_at = event.now - (self._settings.grace_s if left else 0.0)
            self._effects.append(Count("left" if left else "died", event.node))
            self._close_if_due(event.now)
        elif node is not None and node.online:
            self._effects.append(Count("late death", event.node))

    def _born(self, now: float, name: str, status: NodeStatus) -> None:
        node = self._nodes.get(name)
        if node is None:
            node = _Node(slot=1 + max((other.slot for other in self._nodes.values()), default=-1))
            self._nodes[name] = node
            self._effects.append(CommitSlot(name, node.slot))
        node.boot, node.link, node.online = status.boot, status.link, True
        node.weight = min(max(status.rows, 1), 2**24) if self._settings.weigh_by_rows else 1
        if node.welcomed:
            self._welcome(now, name, node)

    def _welcome(self, now: float, name: str, node: _Node) -> None:
        self._effects.append(Reply(name, Welcome(self._header(), node.boot, node.slot)))
        if self._open is None:
            self._proceed(now)
        elif not self._open.closing:
            self._publish()

    @_on.register
    def _(self, event: SlotCommitted) -> None:
        node = self._nodes[event.node]
        node.welcomed = True
        self._welcome(event.now, event.node, node)

    @_on.register
    def _(self, event: WantCame) -> None:
        node = self._nodes.get(event.node)
        if event.want.welcome and node is not None and node.welcomed:
            self._effects.append(Reply(event.node, Welcome(self._header(), event.want.boot, node.slot)))
        if event.want.entries_from is not None:
            self._effects.append(SendEntries(event.node, event.want.entries_from))
        if event.want.blob is not None:
            self._effects.append(SendChunks(event.node, event.want))

    @_on.register
    def _(self, event: ServerSeen) -> None:
        if event.state.rank > self._rank:
            error = AnotherServer(
                f"term {self._rank[0]}",
                f"a server of term {event.state.term} on host {event.state.host} has taken over",
                "leave it in charge, or stop it and start this one again",
            )
            self._effects.append(End(error))
        else:
            self._effects.append(PublishState(self.finished))

    # --- updates ---

    @_on.register
    def _(self, event: UpdateCame) -> None:
        reason = self._why_dropped(event.node, event.update)
        if reason is not None:
            self._effects.append(Count(reason, event.node))
            return
        refused = self._why_refused(event.node, event.update)
        if refused is not None:
            self._effects.append(Count(f"refused: {refused.name.lower().replace('_', ' ')}", event.node))
            self._effects.append(Reply(event.node, Refusal(self._header(), event.update.boot, refused)))
            return
        self._take(event.node, event.update)

    def _take(self, name: str, update: Update) -> None:
        assert self._open is not None
        self._open.taken.add(name)
        node = self._nodes[name]
        record = UpdateRecord(self.version, name, node.slot, update.boot, node.weight, update.scalars, update.loss)
        self._effects.append(CommitUpdate(record))

    def _why_dropped(self, name: str, update: Update) -> str | None:
        mine, header = self._header(), update.header
        if (header.run, header.mask) != (mine.run, mine.mask):
            return "of another run"
        if header.term != mine.term:
            return "of another term"
        if header.version != self.version or self._open is None or self._open.closing:
            return "early" if header.version > self.version else "late"
        if name not in self._open.asked:
            return "not asked"
        return "duplicate" if name in self._open.taken else None

    def _why_refused(self, name: str, update: Update) -> Reason | None:
        if update.base != self._base[:8]:
            return Reason.RESYNCHRONISE
        if len(update.scalars) != self._settings.steps:
            return Reason.WRONG_STEPS
        lane = lane_of(self._nodes[name].slot, self._settings.lanes)
        seeds = tuple(seed_for(self._settings.run_id, self.version, lane, t) for t in range(self._settings.steps))
        return Reason.WRONG_SEEDS if update.seeds not in (None, seeds) else None

    @_on.register
    def _(self, event: UpdatesCommitted) -> None:
        if self._open is not None and not self._open.closing:
            for record in event.records:
                if record.version == self.version:
                    self._open.heard[record.node] = record
            self._close_if_due(event.now)

    # --- rounds open and close ---

    @_on.register
    def _(self, event: Tick) -> None:
        self._last_tick = event.now
        self._close_if_due(event.now)
        if self._open is not None and not self._open.closing:
            passed = [at for at in self._open.announce_at if at <= event.now]
            if passed:
                del self._open.announce_at[: len(passed)]
                self._publish()

    def _eligible(self) -> dict[str, int]:
        return {name: node.slot for name, node in self._nodes.items() if node.online and node.welcomed}

    def _proceed(self, now: float) -> None:
        eligible = self._eligible()
        if self.finished or len(eligible) < self._settings.min_nodes:
            return
        settings = self._settings
        chosen = sample(settings.run_id, self.version, eligible.values(), settings.fraction)
        asked = {name: slot for name, slot in eligible.items() if slot in chosen}
        self._open = _Open(asked, needed(len(asked), settings.quorum), now, settings.deadline_s)
        self._plan_announcements()
        self._publish()

    def _plan_announcements(self) -> None:
        assert self._open is not None
        self._open.announce_at = [self._open.opened_at + share * self._open.deadline_s for share in ANNOUNCE_AT]

    def _close_if_due(self, now: float) -> None:
        current = self._open
        if current is None or current.closing:
            return
        overdue = now >= current.deadline_at
        waiting = [name for name in current.asked if name not in current.heard and not self._dead(name, now)]
        if len(current.heard) >= current.needed and (overdue or not waiting):
            self._close()
        elif overdue:
            self._extend(now)

    def _dead(self, name: str, now: float) -> bool:
        node = self._nodes[name]
        return not node.online and now - node.died_at >= self._settings.grace_s

    def _extend(self, now: float) -> None:
        """Below quorum: nothing is written; ask everybody at hand, and wait longer."""
        assert self._open is not None
        self._open.attempt += 1
        self._open.asked |= self._eligible()
        self._open.opened_at = now
        self._open.deadline_s = deadline_length(self._settings.deadline_s, self._open.attempt)
        self._plan_announcements()
        self._effects.append(Count("round extended"))
        self._publish()

    def _close(self) -> None:
        assert self._open is not None
        self._open.closing = True
        records = sorted(self._open.heard.values(), key=lambda record: record.slot)
        self._effects.append(ApplyTerms(self.version, terms_of(records, self._settings)))

    @_on.register
    def _(self, event: TermsApplied) -> None:
        assert self._open is not None
        assert event.version == self.version
        records = tuple(sorted(self._open.heard.values(), key=lambda record: record.slot))
        entry = Entry(self.version, terms_of(records, self._settings), self._head, event.digest)
        self._effects.append(CommitEntry(entry, records))
        self._entries = list(newest_that_fit([*self._entries, entry]))
        self._head = entry.hash(self._settings.run_id)
        if event.digest != NO_DIGEST:
            self._base = event.digest

    @_on.register
    def _(self, event: EntryCommitted) -> None:
        self.version = event.version + 1
        self._open = None
        self._proceed(event.now)
        if self._open is None:
            self._publish()
        if self.finished:
            self._effects.append(PublishState(finished=True))

    # --- frames ---

    def _header(self) -> Header:
        return Header.of(self._settings.run_id, self._rank[0], self.version, self._settings.mask_hash)

    def _publish(self) -> None:
        current, settings = self._open, self._settings
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
            entries=tuple(self._entries),
        )
        self._effects.append(PublishRound(frame))
