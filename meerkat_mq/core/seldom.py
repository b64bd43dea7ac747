"""Lines that would repeat for ever: the first is said, then one whenever twice as long has passed."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from meerkat_mq.core.used import Used

FIRST_S = 1.0
LONGEST_S = 3600.0
QUIET_S = 60.0
MOST_KEYS = 256
MOST_LINES = 2 * MOST_KEYS  # at once, of all keys
LINES_A_S = 1.0  # then: at 300 bytes a line, 26 MB a day, whoever makes up keys and however many


@dataclass
class _Line:
    """What is known of one key; `wait_s` is from the last line that was said to the next."""

    said_at: float
    seen_at: float
    wait_s: float
    left_out: int = 0

    def is_over(self, now: float) -> bool:
        """Whether it has been silent for so long that it starts afresh."""
        return now - self.seen_at >= max(self.wait_s, QUIET_S)


class Seldom:
    """Says what happens again and again less and less often, and how often it was left out.

    Of each key the first occurrence is said; the next one a second later at the earliest, then two, four, … seconds
    after that, at last once an hour. A key that was silent for a minute, and for as long as its present interval,
    starts afresh. All keys together have a budget of lines too: keys may come from whoever sends messages.

    Args:
        clock: seconds, from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines = dict[Hashable, _Line]()
        self._tidied_at = -QUIET_S
        self._said = Used(LINES_A_S)

    def say(self, say: Callable[..., object], event: str, *key: Hashable, **fields: object) -> bool:
        """Say an event through a logger's method, unless it is too soon; returns whether it was said.

        Args:
            say: as `log.warning`; takes `left_out` too, where some were.
            event: the first part of the key.
            key: the rest: what makes one line another one's repetition, such as topic and reason. Of an event that
                has very many keys, all others count as one.
        """
        left_out = self._due((event, *key))
        if left_out is None:
            return False
        say(event, **fields, **({"left_out": left_out} if left_out else {}))
        return True

    def forget(self) -> None:
        """All is well again: whatever happens next is said."""
        self._lines.clear()

    def _due(self, key: tuple[Hashable, ...]) -> int | None:
        """How many were left out before this one; None where it is left out itself."""
        now = self._clock()
        if len(self._lines) >= MOST_KEYS and now - self._tidied_at >= QUIET_S:
            self._tidied_at = now
            self._lines = {known: line for known, line in self._lines.items() if not line.is_over(now)}
        if key not in self._lines and len(self._lines) >= MOST_KEYS:
            key = key[:1]
        line = self._lines.get(key)
        afresh = line is None or line.is_over(now)
        if line is None or afresh:
            left_out = line.left_out if line is not None else 0
            line = self._lines[key] = _Line(now, now, FIRST_S, left_out)
        line.seen_at = now
        over = self._said.now(now) + 1 > MOST_LINES
        if over or (not afresh and now - line.said_at < line.wait_s):
            line.left_out += 1
            return None
        self._said.add(now, 1)
        left_out, line.left_out, line.said_at = line.left_out, 0, now
        line.wait_s = line.wait_s if afresh else min(2 * line.wait_s, LONGEST_S)
        return left_out
