"""Virtual time: what is to be done, by when; and processes that live in it, crash, freeze and start again."""

import heapq
import itertools
from collections.abc import Callable
from functools import partial

from meerkat_mq.errors import MeerkatError

STORM = 200_000  # things that happen, many times what the longest run takes

Action = Callable[[], None]


class Crashed(BaseException):
    """The process is gone at this very point: nothing that it would still have done happens."""


class VirtualTimer:
    """Something on the agenda."""

    __slots__ = ("action",)

    def __init__(self, action: Action) -> None:
        self.action: Action | None = action

    def cancel(self) -> None:
        """Do not do it."""
        self.action = None


class VirtualClock:
    """Virtual seconds, from 0."""

    def __init__(self) -> None:
        self._now = 0.0
        self._agenda: list[tuple[float, int, VirtualTimer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """The present time."""
        return self._now

    def at(self, time: float, action: Action) -> VirtualTimer:
        """Do something at a time, or next where that is past; what is due at the same time, in the order of asking."""
        timer = VirtualTimer(action)
        heapq.heappush(self._agenda, (max(time, self._now), next(self._order), timer))
        return timer

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Let time pass until it is `until`, or `done`.

        Raises:
            RuntimeError: processes keep each other busy without end.
        """
        agenda = self._agenda
        for _ in range(STORM):
            if done():
                return
            if not agenda or agenda[0][0] > until:
                self._now = max(self._now, until)
                return
            self._now, _, timer = heapq.heappop(agenda)
            if timer.action is not None:
                timer.action()
        raise RuntimeError(f"a storm: more than {STORM} things happened until {self._now:.3f} s")


class VirtualProcess:
    """What can be killed, frozen and started again. What happens to it goes through `call`. It is its own Clock port.

    Args:
        name: for people.
        clock: of the world.
        failed: is told of an error that ended it.

    Attributes:
        alive: whether it runs or is frozen.
        crash_in: it crashes after so many more steps; None: it does not.
    """

    def __init__(self, name: str, clock: VirtualClock, failed: Callable[[str, MeerkatError], None]) -> None:
        self.name = name
        self.clock = clock
        self.now = clock.now
        self.alive = False
        self.crash_in: int | None = None
        self._failed = failed
        self._held: list[Action] | None = None
        self._life = 0

    def at(self, time: float, action: Action) -> VirtualTimer:
        """Let this life of the process do something at a time."""
        return self.clock.at(time, partial(self.call, action, self._life))

    def call(self, action: Action, life: int | None = None) -> None:
        """Let the process do something, in this life of it: now, when it thaws, or never."""
        if not self.alive or life not in (None, self._life):
            return
        if self._held is not None:
            self._held.append(action)
            return
        try:
            action()
        except Crashed:
            self.kill()
        except MeerkatError as error:
            self.kill()
            self._failed(self.name, error)

    def step(self) -> None:
        """A point between two effects: the process may crash here."""
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                raise Crashed

    def start(self) -> None:
        """Begin a new life, with nothing but what is durable."""
        self.alive, self.crash_in, self._held = True, None, None
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
        for action in held:
            self.call(action)
