"""What takes several steps with waiting in between, written as one function.

`Steps` is a generator. It yields a `Begin` for each thing that it waits for: work of a `Compute` port, a pause on the
`Clock`, a blob that comes by the transport. It is sent the result, or has the failure thrown into it. `Sequence` drives
it. This is what `async def` would be on an event loop; here there is none.
"""

from collections.abc import Callable, Generator
from functools import partial
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Any, Generic, TypeVar, TypeVarTuple

from meerkat_mq.runtime.ports import Clock, Compute, Failed, Timer

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

Done = Callable[[Any], None]
Begin = Callable[[Done, Failed], None]  # of both, one is called once it has ended; none if it is given up
Steps = Generator[Begin, Any, Result]


def work(compute: Compute, job: Callable[[*Args], Result], *args: *Args) -> Steps[Result]:
    """Have a worker do a job, unless it is given up before it begins; returns and raises what the job does."""
    wanted = True

    def attempt() -> Result | None:
        return job(*args) if wanted else None

    try:
        result: Result = yield partial(compute.run, attempt)
    finally:
        wanted = False
    return result


def until(clock: Clock, time: float) -> Steps[None]:
    """Wait for a time; where the wait is given up, the timer rings for nobody."""

    def begin(done: Done, failed: Failed) -> None:
        clock.at(time, partial(done, None))

    yield begin


class Sequence(Generic[Result]):
    """Steps that are being done.

    An exception that the steps raise leaves through whatever port called back.

    Args:
        steps: what is to be done; begun at once.
        done: takes the result.
    """

    def __init__(self, steps: Steps[Result], done: Callable[[Result], None] = lambda result: None) -> None:
        self._steps = steps
        self._done = done
        self._number = 0  # of the present wait: what an earlier one still brings is ignored
        self._go(0, steps.send, None)

    def cancel(self) -> None:
        """Do nothing more than what a `finally` asks for; steps that are running now end where they would wait next."""
        self._number += 1
        if getgeneratorstate(self._steps) != GEN_RUNNING:
            self._steps.close()

    def _go(self, number: int, resume: Callable[[Any], Begin], came: Any) -> None:
        if number != self._number:
            return
        self._number = number = number + 1
        try:
            begin = resume(came)
        except StopIteration as end:
            if number == self._number:
                self._done(end.value)
            return
        if number != self._number:
            self._steps.close()
            return
        begin(partial(self._go, number, self._steps.send), partial(self._go, number, self._steps.throw))


class Alarm:
    """The clock of a machine: calls `ring` at the time that was set last, whatever else happens."""

    def __init__(self, clock: Clock, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._at: float | None = None
        self._timer: Timer | None = None

    def set(self, at: float | None) -> None:
        """Ring then, once; None: do not."""
        if at == self._at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._at = at
        self._timer = None if at is None else self._clock.at(at, self._rings)

    def _rings(self) -> None:
        self._at = self._timer = None
        self._ring()


class Spaced:
    """Something that is done at most once in `every_s` seconds, however often it is asked for.

    Args:
        action: what is done.
    """

    def __init__(self, clock: Clock, every_s: float, action: Callable[[], None]) -> None:
        self._every_s = every_s
        self._clock = clock
        self._action = action
        self._next_at = float("-inf")
        self._alarm = Alarm(clock, self.at_once)

    def at_once(self) -> None:
        """Do it now, whenever it was done last; what was asked for before is done with it."""
        self._alarm.set(None)
        self._next_at = self._clock.now() + self._every_s
        self._action()

    def soon(self) -> None:
        """Do it now, or as soon as it is time."""
        if self._clock.now() >= self._next_at:
            self.at_once()
        else:
            self._alarm.set(self._next_at)
