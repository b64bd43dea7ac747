"""Workers in virtual time: a job is done at the end of the time that it takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import TypeVar

from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import Model, StepsEnd
from meerkat_mq.runtime.ports import Failed
from meerkat_mq.worlds.clock import VirtualProcess, VirtualTimer

Result = TypeVar("Result")


class VirtualCompute:
    """Jobs of one process, in order. It may crash before each job, and between the job and the word that it is done.

    Args:
        process: whose.
        seconds: that a job takes.
        at_once: whether no job waits for those before it.
    """

    def __init__(self, process: VirtualProcess, seconds: float = 0.0, *, at_once: bool = False) -> None:
        self._process = process
        self._seconds = seconds
        self._at_once = at_once
        self._free_at = 0.0

    def run(self, job: Callable[[], Result], done: Callable[[Result], None], failed: Failed) -> None:
        """Do a job; then tell."""
        free_at = 0.0 if self._at_once else self._free_at
        self._free_at = max(free_at, self._process.now()) + self._seconds
        self._process.at(self._free_at, partial(self._do, job, done, failed))

    def _do(self, job: Callable[[], Result], done: Callable[[Result], None], failed: Failed) -> None:
        self._process.step()
        try:
            result = job()
        except Exception as error:
            failed(error)
            return
        self._process.step()
        done(result)


@dataclass
class _Walk:
    """Local steps that are being made."""

    model: Model
    order: StartSteps
    done: StepsEnd
    failed: Failed
    began: float
    timer: VirtualTimer = field(init=False)


class VirtualStepCompute(VirtualCompute):
    """A node's worker. Local steps are stopped by the time that has passed.

    Args:
        process: whose.
        steps_s: seconds that a round's local steps take.
        may_begin: whether local steps may begin now; asked of each round's.
        not_now_s: seconds until a node is told that they may not.
    """

    def __init__(
        self,
        process: VirtualProcess,
        steps_s: float,
        *,
        may_begin: Callable[[], bool] = lambda: True,
        not_now_s: float = 0.5,
    ) -> None:
        super().__init__(process)
        self._steps_s = steps_s
        self._may_begin = may_begin
        self._not_now_s = not_now_s
        self._walk: _Walk | None = None

    def steps(self, model: Model, order: StartSteps, done: StepsEnd, failed: Failed) -> None:
        """Do local steps; `done` takes None where they may not begin."""
        now = self._process.now()
        if not self._may_begin():
            self._process.at(now + self._not_now_s, partial(done, None))
            return
        self._walk = _Walk(model, order, done, failed, now)
        self._end_at(self._walk, now + self._steps_s, order.steps)

    def stop_steps(self) -> None:
        """The local step that is being made is the last one."""
        walk = self._walk
        if walk is None:
            return
        now, each = self._process.now(), self._steps_s / walk.order.steps
        made = min(1 + int((now - walk.began) / each), walk.order.steps) if each else walk.order.steps
        walk.timer.cancel()
        self._end_at(walk, max(walk.began + made * each, now), made)

    def move_on(self) -> None:
        """Nothing waits here."""

    def _end_at(self, walk: _Walk, time: float, made: int) -> None:
        walk.timer = self._process.at(time, partial(self._ended, walk, made))

    def _ended(self, walk: _Walk, made: int) -> None:
        self._walk = None
        nobody_stops = Event()  # time has decided already how many steps are made
        self._do(partial(walk.model.step, walk.order, nobody_stops, made), walk.done, walk.failed)
