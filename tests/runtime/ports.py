"""The ports of a driver in a test: a clock that a test moves, workers that work on it, a transport that records.

Everything happens on the clock, so a test waits for nothing. An exception that leaves a callback leaves the call that
moved the clock.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Event
from typing import Any, TypeVar

from meerkat_mq.errors import NotConnected
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import Model, StepResult

Result = TypeVar("Result")


class Timer:
    """Something that will be done at a time."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class VirtualClock:
    """Begins at 0; stands still unless a test moves it."""

    def __init__(self) -> None:
        self._now = 0.0
        self._numbers = count()  # what is due at one time is done in the order in which it was asked for
        self._timers: list[tuple[float, int, Timer]] = []

    def now(self) -> float:
        return self._now

    def at(self, time: float, action: Callable[[], None]) -> Timer:
        timer = Timer(action)
        heapq.heappush(self._timers, (max(time, self._now), next(self._numbers), timer))
        return timer

    def settle(self) -> None:
        """Do all that is due now, and what comes of it."""
        self.go(0.0)

    def go(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            self._step()
        self._now = end

    def until(self, condition: Callable[[], object], within_s: float = 1e6) -> None:
        """Let time pass until something is true; fails where it does not become true."""
        end = self._now + within_s
        while not condition():
            assert self._timers, "nothing is left that could happen"
            assert self._timers[0][0] <= end, f"it did not happen within {within_s:g} s"
            self._step()

    def _step(self) -> None:
        self._now, _, timer = heapq.heappop(self._timers)
        action, timer.action = timer.action, None
        if action is not None:
            action()


class Worker:
    """Does jobs one after another, each at once; or, while it is held, as many as a test lets it.

    Attributes:
        held: whether jobs wait.
        waiting: how many jobs are not done.
        fails: raised by the next jobs, in their place; None: that job is done.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self.held = False
        self.fails: deque[Exception | None] = deque()
        self._clock = clock
        self._jobs: deque[tuple[Callable[[], Any], Callable[[Any], None], Callable[[Exception], None]]] = deque()
        self._busy = False

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def run(
        self, job: Callable[[], Result], done: Callable[[Result], None], failed: Callable[[Exception], None]
    ) -> None:
        self._jobs.append((job, done, failed))
        self._begin()

    def free(self) -> None:
        """Do what waits, and what comes."""
        self.held = False
        self._begin()
        self._clock.settle()

    def do(self, jobs: int = 1) -> None:
        """Do so many of the jobs that wait."""
        for _ in range(jobs):
            assert self._jobs, "no job waits"
            self._do_next()
            self._clock.settle()

    def _begin(self) -> None:
        if self._jobs and not self.held and not self._busy:
            self._busy = True
            self._clock.at(self._clock.now(), self._end)

    def _end(self) -> None:
        self._busy = False
        if self._jobs and not self.held:
            self._do_next()
        self._begin()

    def _do_next(self) -> None:
        job, done, failed = self._jobs.popleft()
        try:
            if self.fails and (error := self.fails.popleft()) is not None:
                raise error
            result = job()
        except Exception as error:
            failed(error)
        else:
            done(result)


class StepWorker(Worker):
    """A node's worker; its steps stop as soon as they are told to.

    Attributes:
        stopped: how often steps were told to end.
        moved_on: how often they were told not to wait.
    """

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self.stopped = self.moved_on = 0
        self._stop = Event()

    def steps(
        self,
        model: Model,
        order: StartSteps,
        done: Callable[[StepResult | None], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._stop = Event()
        self.run(partial(model.step, order, self._stop, order.steps), done, failed)

    def stop_steps(self) -> None:
        self.stopped += 1
        self._stop.set()

    def move_on(self) -> None:
        self.moved_on += 1


@dataclass(frozen=True)
class Sent:
    """What was published."""

    topic: str
    payload: bytes = field(repr=False)
    retain: bool


class Recorder:
    """A transport that keeps what is published.

    Attributes:
        room: how many messages it takes; None: any number.
        reaches: takes each message as well.
    """

    def __init__(self, link: int | None = 1) -> None:
        self.reaches: Callable[[Sent], object] = lambda sent: None
        self.link = link
        self.sent: list[Sent] = []
        self.filters: set[str] = set()
        self.renewed = 0
        self.disowned = False
        self.room: int | None = None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self.room is not None and len(self.sent) >= self.room:
            raise NotConnected(topic, "is full")
        if not self.disowned:
            self.sent.append(Sent(topic, payload, retain))
            self.reaches(self.sent[-1])

    def subscribe(self, topic: str) -> None:
        self.filters.add(topic)

    def unsubscribe(self, topic: str) -> None:
        self.filters.discard(topic)

    def renew(self) -> None:
        self.renewed += 1

    def disown(self) -> None:
        self.disowned = True

    def on(self, topic: str) -> list[bytes]:
        """What was published on a topic."""
        return [sent.payload for sent in self.sent if sent.topic == topic]
