"""What one node may cost the server: messages, bytes of answers, terms. Nobody's messages hold up the rounds.

A message costs its sender a part of a budget, which time and rounds fill up again; a message that brings what the
server asked for costs nothing, unless it comes again and again, or turns out to be something else. So a node that takes
part, however fast the rounds are, never comes near its budget. Who is over it is flagged. Its messages then wait, the
newest of each kind, and are answered last: as its budget fills up again (runtime/server.py). Budgets are constants, not
configuration: they are far above what any node of ours needs, and far below what would slow the rounds down.

A node that has never answered a round is also counted with all others of its kind, since ids that nobody checks cost
their inventor nothing.

Terms. A node that has seen a higher term makes the server take one above it: that is how a ledger from a backup gets
past the terms that it lacks. Each time costs the rounds a new connection. So after it, that node, and all together,
have to pause, twice as long as the time before; a pause is forgotten after a long rest. A step is small, and grows with
the pauses: at 64 terms a second, the range lasts for two years of an attack by nodes without end, for a hundred by one.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import structlog

from meerkat_mq.core import metrics as m
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.core.used import Used
from meerkat_mq.runtime.ports import Clock, ServerMonitor

MESSAGES = 200  # of one kind at once: after an outage, a node repeats a few tens
MESSAGES_A_S = 10.0  # a node that asks in vain does so every few seconds
MESSAGES_A_ROUND = 1.0  # one that is late sends an update, or asks for an entry, once a round
PART_BYTES = 4096  # a longer message counts as so many more
STRANGERS = 4096  # messages of all nodes that never answered a round: a fleet that is switched on
STRANGERS_A_S = 500.0
ANSWER_BYTES = 2**23  # two wants of the longest, and twice what a node that joins may need
ANSWER_BYTES_A_S = 2**18
MOST_SENDERS = 2**16  # as many as slots
FLAGGED_S = 600.0

TERM_STEP = 64  # in the first pause; a ledger from a backup lacks as many terms as there were starts since
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S, LONGEST_PAUSE_OF_NODE_S = 64.0, 3600.0
REST = 32  # after so many times as long, a pause is forgotten
FLAGGED_AT_S = 4.0  # a pause that a node of ours never gets to

MESSAGES_OVER, TERMS_OVER, SILENT = "over budget", "raises terms", "silent"


class Budgets:
    """The budgets of all nodes.

    Args:
        joins_bytes: what a node that joins may have to be sent.
    """

    def __init__(self, clock: Clock, joins_bytes: int, monitor: ServerMonitor) -> None:
        self._clock = clock
        self._answer_bytes = ANSWER_BYTES + 2 * joins_bytes
        self._monitor = monitor
        self._seldom = Seldom()
        self._rounds = 0
        self._messages: dict[Hashable, Used] = {}
        self._answers: dict[Hashable, Used] = {}
        self._strangers = Used(STRANGERS_A_S)
        self._flagged: dict[str, tuple[str, float]] = {}
        self._newest: tuple[Used, float] | None = None  # the message that is being looked at, and what it cost

    def round_closed(self) -> None:
        """Everybody may have something to say of it."""
        self._rounds += 1

    def takes(self, node: str, kind: str, size: int, *, stranger: bool) -> bool:
        """Whether a message of so many bytes is within its sender's budget, which it then lessens.

        Args:
            kind: of its topic: each has a budget of its own.
            stranger: whether the node has never answered a round.
        """
        now, income, cost = self._clock.now(), self._income(), _cost(size)
        used = _of(self._messages, (node, kind), 1.0, income)
        if used.now(income) + cost > MESSAGES:
            self.flag(node, MESSAGES_OVER)
            return False
        if stranger:
            if self._strangers.now(now) + cost > STRANGERS:
                return False
            self._strangers.add(now, cost)
        used.add(income, cost)
        self._newest = used, cost
        return True

    def charge(self, node: str, size: int) -> None:
        """An update and so many bytes after it, which had cost nothing, were of no use after all."""
        income = self._income()
        _of(self._messages, (node, "update"), 1.0, income).add(income, _cost(size))

    def _income(self) -> float:
        """The messages that time and rounds have granted every node so far."""
        return MESSAGES_A_S * self._clock.now() + MESSAGES_A_ROUND * self._rounds

    def was_useful(self) -> None:
        """What is being looked at brought what the server asked for: it costs nothing."""
        if self._newest is not None:
            used, cost = self._newest
            used.add(self._income(), -cost)
        self.looked()

    def looked(self) -> None:
        """The message has been looked at."""
        self._newest = None

    def answers(self, node: str, size: int) -> bool:
        """Whether an answer of so many bytes is within a node's budget, which it then lessens."""
        now = self._clock.now()
        used = _of(self._answers, node, ANSWER_BYTES_A_S, now)
        if used.now(now) + size > self._answer_bytes:
            self.flag(node, MESSAGES_OVER)
            return False
        used.add(now, size)
        return True

    def flag(self, node: str, why: str) -> None:
        """Flag a node for a while."""
        now = self._clock.now()
        if self.flagged(node) != why:
            self._monitor.counted(m.FLAGGED.of(why))
            self._seldom.say(structlog.get_logger().warning, m.FLAGGED.of(why), node, node=node)
        self._flagged = {known: found for known, found in self._flagged.items() if now < found[1]}
        self._flagged[node] = why, now + FLAGGED_S

    def flagged(self, node: str) -> str:
        """Why a node is flagged; "" where it is not."""
        why, until = self._flagged.get(node, ("", 0.0))
        return why if self._clock.now() < until else ""


def _cost(size: int) -> float:
    return 1.0 + size // PART_BYTES


def _of(budgets: dict[Hashable, Used], key: Hashable, rate: float, now: float) -> Used:
    """The budget of a key, one of a bounded number: those that are whole again need not be remembered."""
    if (found := budgets.get(key)) is None:
        if len(budgets) >= MOST_SENDERS:
            for known in [known for known, used in budgets.items() if not used.now(now)]:
                del budgets[known]
        found = Used(rate)
        if len(budgets) < MOST_SENDERS:
            budgets[key] = found
    return found


@dataclass(slots=True)
class _Pause:
    """Of somebody who raised the term; each is twice as long as the one before."""

    longest_s: float
    length_s: float = 0.0
    until: float = float("-inf")

    def begin(self, now: float) -> None:
        """The term was raised again."""
        rested = now - self.until >= REST * self.length_s
        self.length_s = FIRST_PAUSE_S if rested else min(2 * self.length_s, self.longest_s)
        self.until = now + self.length_s


class Raises:
    """When nodes may make the server take a higher term, and how much higher."""

    def __init__(self, clock: Clock, budgets: Budgets) -> None:
        self._clock = clock
        self._budgets = budgets
        self._all = _Pause(LONGEST_PAUSE_S)
        self._nodes: dict[str, _Pause] = {}

    def step(self, node: str) -> int:
        """How far above its own the server may go, now, because this node has seen a higher term; 0: not yet."""
        now, pause = self._clock.now(), self._nodes.get(node) or _Pause(LONGEST_PAUSE_OF_NODE_S)
        if now < max(self._all.until, pause.until):
            return 0
        self._all.begin(now)
        pause.begin(now)
        known = {name: other for name, other in self._nodes.items() if now - other.until < REST * other.length_s}
        self._nodes = known | {node: pause}
        if pause.length_s >= FLAGGED_AT_S:
            self._budgets.flag(node, TERMS_OVER)
        return int(TERM_STEP * self._all.length_s / FIRST_PAUSE_S)
