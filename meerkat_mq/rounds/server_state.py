"""What the server's machine knows, its phases, and what it says of both; `server.py` says what changes them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from meerkat_mq.core import metrics as m
from meerkat_mq.core.path import Entry
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.early_stopping import EarlyStopping
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.open_round import OpenRound, round_frame
from meerkat_mq.rounds.policy import (
    RoundSettings,
    newest_that_fit,
    why_refused,
)
from meerkat_mq.rounds.records import Judgement, UpdateRecord, Verdict
from meerkat_mq.rounds.roster import KnownNode, Roster
from meerkat_mq.rounds.transitions import ServerPhase
from meerkat_mq.rounds.window import Window
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import Header, Reason, Refusal, Update
from meerkat_mq.wire.messages import in_words

HIGHEST_TERM = 2**32 - 2**16
LARGEST_STEP = 2**16  # between two terms: one forged want must not use them all up


class ServerMachineState:
    """One server in one term of one run; `version` is theta's committed one, the head of the ledger."""

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
        past: Iterable[Sequence[UpdateRecord]] = (),
        judgements: Iterable[Judgement] = (),
        bases: Mapping[int, bytes] | None = None,
        heard: Mapping[str, int] | None = None,
    ) -> None:
        """Resume from what the ledger holds.

        Args:
            base: 16 bytes, the newest due digest of theta.
            head: hash of the newest entry; None before the first.
            slots: node to slot.
            updates: the committed updates that no entry holds yet, from theta of `version` or up to `max_staleness`
                versions older: they stay acknowledged.
            past: the updates of the newest `guards.window` closed rounds, oldest first.
            judgements: the newest of each node.
            bases: of a buffered run, by version up to `max_staleness` older, the newest due digest at or before it.
            heard: node to the newest base version of its committed updates, `updates` included.
        """
        self._settings = settings
        self._rank = (term, server_id)
        self._window = Window(version, settings.max_staleness, {**(bases or {}), version: base}, updates)
        self._head = head or settings.mask_hash
        self._entries = newest_that_fit(entries)
        self._nodes = Roster(slots or {}, deadline_s=settings.deadline_s, fewest=settings.fewest_nodes)
        for node, newest in (heard or {}).items():
            self._window.resume(node, self._nodes[node].slot, newest)
        self._guard = Guard(settings.guards, settings.directions, past, cumulative=settings.clips)
        self._flagged: Mapping[str, Verdict] = dict(self._guard.flagged)
        self._early = EarlyStopping(settings, judgements)
        self._outranked = False
        self._open: OpenRound | None = None
        self._effects: list[e.ServerEffect] = []
        self._last_tick = float("-inf")
        self.version = version

    @property
    def phase(self) -> ServerPhase:
        """Where the machine stands; `TRANSITIONS` says what leads where."""
        current = self._open
        if current is None:
            return ServerPhase.FINISHED if self.finished else ServerPhase.WAITING
        if not current.closing:
            return ServerPhase.OPEN
        if current.outcome is None:
            return ServerPhase.JUDGING
        return ServerPhase.APPLYING if current.entry is None else ServerPhase.COMMITTING

    @property
    def finished(self) -> bool:
        """Whether all rounds are closed."""
        return self.version >= self._settings.count

    @property
    def online(self) -> int:
        """How many nodes are at hand."""
        return self._nodes.online

    @property
    def answered(self) -> int:
        """How many nodes have answered a round of this run."""
        return self._nodes.answered

    def has_answered(self, node: str) -> bool:
        """Whether a node has answered a round of this run."""
        known = self._nodes.get(node)
        return known is not None and known.answered

    def is_silent(self, node: str) -> bool:
        """Whether rounds do not wait for a node, because they did so in vain."""
        known = self._nodes.get(node)
        return known is not None and known.silent

    @property
    def wake_at(self) -> float | None:
        """When the machine wants its next Tick; None: not before another event."""
        current = self._open
        if current is None or current.closing:
            return None
        times = [current.deadline_at, *current.announce_at[:1], current.awaited.next_death]
        return min([at for at in times if self._last_tick < at < math.inf], default=None)

    def _count(self, reason: m.Metric, node: str = "", about: int | None = None) -> None:
        """Count, of the round `about`; by default the open one, or the one that closes just now."""
        self._effects.append(e.Count(reason, node, self.version if about is None else about))

    def _header(self) -> Header:
        return Header.of(self._settings.run_id, self._rank[0], self.version, self._settings.mask_hash)

    def _announce(self) -> None:
        """Publish the round, unless it is closing: the next one is soon there."""
        if self._open is None or not self._open.closing:
            frame = round_frame(
                self._header(),
                self._settings,
                self._early,
                self._open,
                acknowledged=self._window.acknowledged,
                entries=self._entries,
            )
            self._effects.append(e.PublishRound(frame))

    def _reply_refusal(self, name: str, update: Update, reason: Reason) -> None:
        header = replace(self._header(), version=update.header.version)
        self._effects.append(e.Reply(name, Refusal(header, update.boot, reason)))

    def _is_late(self, node: KnownNode | None, status: NodeStatus) -> bool:
        """Whether a node said this before it was online: at the end of an earlier connection, or as it joined."""
        if node is None or not node.online:
            return False
        if status.status == "starting":
            return (status.boot, status.link) == (node.boot, node.link)
        return status.status in ("asleep", "stopped", "lost") and status.link != node.link

    def _why_refused(self, name: str, update: Update) -> Reason | None:
        slot, base = self._nodes[name].slot, update.header.version
        # who was asked when an older version was open may have been early-stopped since
        steps = self._early.steps_of(base, name) if base == self.version else self._settings.steps_of(base)
        digest = self._window.base(base)
        assert digest is not None
        return why_refused(update, self._settings, base=digest[:8], slot=slot, steps=steps)

    def stay(self) -> None:
        """No higher term is taken now: go on in this one."""
        self._outranked = False

    def _compare(self, node: str, header: Header) -> None:
        """A node has seen a higher term: a past that neither ledger nor broker tells of any more."""
        if header.term >= min(HIGHEST_TERM, self._rank[0] + LARGEST_STEP):
            self._count(m.IMPOSSIBLE_TERM)
        elif header.term > self._rank[0] and not self._outranked:
            self._outranked = True
            self._effects.append(e.TakeTerm(header.term, node))

    def _flag(self, flagged: Mapping[str, Verdict]) -> None:
        before, self._flagged = self._flagged, flagged
        for node, verdict in self._flagged.items():
            if before.get(node) is not verdict:
                self._count(m.FLAGGED.of(in_words(verdict)), node, self.version - 1)  # by the round that closed
