"""Whether a node takes no part in its run for now, and what may end a node at all.

Theory. The description of a run, its frames and its blobs come from the network; model, rows and disk may be bad for a
while. So whatever a run's work raises on a node makes the node leave that run, say so in its log and on its status
topic, and join it anew after a pause, which doubles from 2 s to ten minutes. Another run is looked at as soon as it is
described. What the node's own policy refuses is no failure: nothing is tried again until the server asks for something
else, but for what is spent for a day.

Two errors end a node. NodeReplaced: a newer process has its id. And whatever keeps it from joining, as long as it has
never taken part in any run: then its files are probably wrong, and who sets it up has to see that at once.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from meerkat_mq.core import metrics as m
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import MeerkatError, PolicyRefused, SpentToday, cut, reason
from meerkat_mq.runtime.model import NodeStore
from meerkat_mq.runtime.ports import Clock, Compute
from meerkat_mq.runtime.steps import Alarm, Sequence, Steps, until, work
from meerkat_mq.wire.descriptor import MAX_REFUSES

AGAIN_S: Final = 60.0
FIRST_PAUSE_S: Final = 2.0
LONGEST_PAUSE_S: Final = 600.0


class Abstention:
    """Why a node takes no part in its run, and until when.

    Args:
        counts: of the node.
        tell: publishes the node's status.
        leave: does nothing more for the present run.
        rejoin: joins it anew.

    Attributes:
        words: why, for its status; None while it takes part.
    """

    def __init__(
        self,
        clock: Clock,
        counts: Counter[str],
        store: NodeStore,
        compute: Compute,
        *,
        tell: Callable[[], None],
        leave: Callable[[], None],
        rejoin: Callable[[], None],
    ) -> None:
        self.words: str | None = None
        self._counts = counts
        self._clock = clock
        self._store = store
        self._compute = compute
        self._tell = tell
        self._leave = leave
        self._rejoin = rejoin
        self._has_joined = False
        self._pause_s = FIRST_PAUSE_S
        self._alarm = Alarm(clock, self._end)
        self._anew = False  # whether the run has to be joined at the end
        self._seldom = Seldom()

    def attempt(self, joining: Steps[None]) -> Sequence[Exception | None]:
        """Join a run; where that fails, take no part in it, or end a node that has never taken part in any."""
        return Sequence(self._attempt(joining), self._attempted)

    def _attempt(self, joining: Steps[None]) -> Steps[Exception | None]:
        yield from until(self._clock, self._clock.now())  # what is raised ends the node, not its session: it says so
        try:
            yield from joining
        except PolicyRefused as error:
            return error
        except Exception as error:  # a model raises what its library does
            if not (self._has_joined or (yield from work(self._compute, self._store.has_taken_part))):
                raise
            return error
        self._has_joined = True
        return None

    def _attempted(self, error: Exception | None) -> None:
        if isinstance(error, PolicyRefused) and not isinstance(error, SpentToday):
            self.refuse(error, for_good=True)
        elif error is not None:
            self.leave(error)

    def refuse(self, error: PolicyRefused, *, for_good: bool = False) -> None:
        """Take no part in this run; or, where that is not `for_good`, for a minute: another round may ask for less."""
        self._begin(m.REFUSES, error.where, error, None if for_good else AGAIN_S)

    def leave(self, error: Exception) -> None:
        """Leave the present run, and join it anew after a pause."""
        self._leave()
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._anew = True
        if isinstance(error, SpentToday):
            self._begin(m.REFUSES, error.where, error, max(pause_s, AGAIN_S))
        else:
            self._begin(m.CANNOT_TAKE_PART, type(error).__name__, error, pause_s)

    def _begin(self, metric: m.Metric, key: str, error: Exception, pause_s: float | None) -> None:
        words = f"{error.where}: {error.problem}" if isinstance(error, MeerkatError) else reason(error)
        self.words = cut(words, MAX_REFUSES - 1)
        self._counts[metric] += 1
        again = {} if pause_s is None else {"again_in_s": pause_s}
        said = str(error) if isinstance(error, MeerkatError) else self.words
        self._seldom.say(structlog.get_logger().warning, EVENTS[metric], key, problem=said, **again)
        self._alarm.set(None if pause_s is None else self._clock.now() + pause_s)
        self._tell()

    def worked(self) -> None:
        """An update was acknowledged: the next failure is a first one."""
        self._pause_s = FIRST_PAUSE_S

    def forget(self) -> None:
        """The server describes something else."""
        self.words = None
        self._anew = False
        self._alarm.set(None)

    def _end(self) -> None:
        anew = self._anew
        self.forget()
        self._tell()
        if anew:
            self._rejoin()


EVENTS: Final = {m.REFUSES: "the run is refused", m.CANNOT_TAKE_PART: "cannot take part, trying again later"}
