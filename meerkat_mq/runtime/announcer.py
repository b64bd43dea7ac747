"""When the server says again what nodes know already: news at once, the rest at most every 100 ms, whoever asks."""

from collections.abc import Callable

from meerkat_mq.runtime.ports import Clock
from meerkat_mq.runtime.steps import Spaced
from meerkat_mq.wire.messages import Round

ANNOUNCE_S = 0.1


class Announcer:
    """Says what round it is, and of which run.

    Attributes:
        describe: asks for the run's description.
        is_open: whether the newest round is open.
    """

    def __init__(self, clock: Clock, publish: Callable[[Round], None], describe: Callable[[], None]) -> None:
        self.describe = Spaced(clock, ANNOUNCE_S, describe).soon
        self._publish = publish
        self._round: Round | None = None
        self._again = Spaced(clock, ANNOUNCE_S, self._say)

    @property
    def is_open(self) -> bool:
        """Whether the newest round is open."""
        return self._round is not None and self._round.is_open

    def forget(self) -> None:
        """Nobody has been told anything on this connection, or another term begins."""
        self._round = None

    def say(self, frame: Round) -> None:
        """Publish a round at once; the same one again, with more nodes asked or acknowledged, soon."""
        before, self._round = self._round, frame
        if before is not None and _place(before) == _place(frame):
            self._again.soon()
        else:
            self._again.at_once()

    def _say(self) -> None:
        if self._round is not None:
            self._publish(self._round)


def _place(frame: Round) -> tuple[int, int, bool, int]:
    """What tells a round that is news from one that is said again."""
    return frame.header.term, frame.header.version, frame.is_open, frame.attempt
