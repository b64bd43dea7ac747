"""The clock, and processes that crash, freeze and start again."""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from meerkat_mq.errors import MeerkatError

STORM = 200_000  # agenda items, many times what the longest schedule takes


class Crashed(Exception):
    """The process is gone at this very point."""


class Clock:
    """Virtual time.

    Attributes:
        now: virtual seconds.
        random: all chance in a world comes from here.
        counts: (who, reason) of what machines count.
        errors: (who, error) of what ended a process.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)  # noqa: S311 - chance to be repeated, not to be secret
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[tuple[str, MeerkatError]] = []
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        """Do something at a virtual time."""
        heapq.heappush(self._agenda, (time, next(self._order), action, args))

    def run(self, until: float, done: Callable[[], bool]) -> None:
        """Let time pass until it is `until`, or `done`.

        Raises:
            RuntimeError: machines and broker keep each other busy without end.
        """
        agenda = self._agenda
        for _ in range(STORM):
            if not agenda or agenda[0][0] > until or done():
                return
            time, _, action, args = heapq.heappop(agenda)
            self.now = max(self.now, time)
            action(*args)
        raise RuntimeError(f"a storm: more than {STORM} things happened until {self.now:.3f} s")


class Process:
    """What can be killed, stopped and started. Everything that happens to it goes through `call`.

    Attributes:
        alive: whether it runs or is frozen.
        crash_in: it crashes after so many more effects; None: it does not.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock
        self.alive = False
        self.crash_in: int | None = None
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
        self._wake: float | None = None
        self._life = 0

    def call(self, action: Callable[..., None], *args: Any) -> None:
        """Let the process do something: now, when it thaws, or never."""
        if not self.alive:
            return
        if self._held is not None:
            self._held.append((action, args))
            return
        try:
            action(*args)
        except Crashed:
            self.kill()
        except MeerkatError as error:
            self.clock.errors.append((self.name, error))
            self.kill()

    def later(self, delay: float, action: Callable[..., None], *args: Any) -> None:
        """Let this life of the process do something after a delay."""
        self.clock.at(self.clock.now + delay, self._if_living, self._life, action, args)

    def _if_living(self, life: int, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if life == self._life:
            self.call(action, *args)

    def step(self) -> None:
        """A point between two effects: the process may crash here."""
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                raise Crashed

    def start(self) -> None:
        """Begin a new life, with nothing but what is durable."""
        self.alive, self.crash_in, self._held, self._wake = True, None, None, None
        self._life += 1

    def kill(self) -> None:
        """End this life."""
        self.alive, self._held = False, None
        self._life += 1

    def freeze(self) -> None:
        """Stop as SIGSTOP does."""
        if self.alive and self._held is None:
            self._held = []

    @property
    def frozen(self) -> bool:
        """Whether it is stopped."""
        return self._held is not None

    def thaw(self) -> None:
        """Go on: what came meanwhile is still there."""
        held, self._held = self._held or [], None
        for action, args in held:
            self.call(action, *args)

    def ring_at(self, wake_at: float | None, ring: Callable[[], None]) -> None:
        """Ring at `wake_at`, or at once where that is past."""
        if wake_at is not None and wake_at != self._wake:
            self._wake = wake_at
            self.later(max(wake_at - self.clock.now, 0.0), self._ring, wake_at, ring)

    def _ring(self, wake_at: float, ring: Callable[[], None]) -> None:
        if self._wake == wake_at:
            self._wake = None
            ring()
