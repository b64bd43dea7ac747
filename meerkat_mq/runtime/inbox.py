"""What nodes send, on its way to the server's driver: at once within a node's budget, beyond it last."""

from collections import deque
from collections.abc import Callable

from meerkat_mq.core import metrics as m
from meerkat_mq.runtime.budgets import Budgets
from meerkat_mq.runtime.ports import Clock, ServerMonitor
from meerkat_mq.runtime.steps import Alarm

LATE_S = 0.25  # between two looks at what waits
MOST_LATE = 4096  # kinds and nodes of which messages wait
NEWEST = 2  # messages that wait of each: a death counts where its birth is known

Take = Callable[[str, str, bytes], None]


class Inbox:
    """Hands messages on to `take`, with the node's id and the kind of topic.

    Of what a node sends over its budget, the newest messages of each kind wait until the budget has filled up: its
    status is known in the end, and its questions are answered last. All others are dropped and counted: an update or a
    question comes again.

    Args:
        has_answered: whether a node has answered a round.
    """

    def __init__(
        self, budgets: Budgets, clock: Clock, monitor: ServerMonitor, *, has_answered: Callable[[str], bool], take: Take
    ) -> None:
        self._budgets = budgets
        self._clock = clock
        self._monitor = monitor
        self._has_answered = has_answered
        self._take = take
        self._late: dict[tuple[str, str], deque[bytes]] = {}
        self._alarm = Alarm(clock, self._look)

    def put(self, node: str, kind: str, payload: bytes) -> None:
        """A message came."""
        waiting = self._late.get((node, kind))
        if waiting is None and self._hand_on(node, kind, payload):
            return
        if waiting is None and len(self._late) < MOST_LATE:
            if not self._late:
                self._alarm.set(self._clock.now() + LATE_S)
            waiting = self._late[node, kind] = deque(maxlen=NEWEST)
        if waiting is None or len(waiting) == NEWEST:
            self._monitor.counted(m.OVER_BUDGET)
        if waiting is not None:
            waiting.append(payload)

    def _look(self) -> None:
        late, self._late = self._late, {}
        for (node, kind), waiting in late.items():
            for payload in waiting:
                self.put(node, kind, payload)

    def _hand_on(self, node: str, kind: str, payload: bytes) -> bool:
        """Hand a message on, where its sender's budget allows it."""
        if not self._budgets.takes(node, kind, len(payload), stranger=not self._has_answered(node)):
            return False
        try:
            self._take(node, kind, payload)
        finally:
            self._budgets.looked()
        return True
