"""The node's worker, and what it leaves to others on its machine: a share of the time, and when steps may begin."""

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial

import structlog

from meerkat_mq.config import LimitsConfig
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import ConfigError
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.loop import Ports, ThreadCompute
from meerkat_mq.runtime.model import Model, StepResult, StepsEnd, Stop
from meerkat_mq.runtime.ports import Failed

ANSWER_S = 10.0  # of the user's command


class Allowance:
    """Asks the user's command whether local steps may begin now; ConfigError where there is no such command."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._seldom = Seldom()
        self._command = limits.allow
        self._check_s = limits.check_s
        self._ask_at = float("-inf")
        self._given: bool | None = None
        if self._command is not None and shutil.which(self._command[0]) is None:
            problem = f"there is no command {self._command[0]!r}"
            raise ConfigError("limits.allow", problem, "give a command on the PATH, or its whole path")

    async def given(self, moved_on: asyncio.Event, over: asyncio.Event) -> bool:
        """Whether the command says yes.

        Args:
            moved_on: until it is set, the command is not asked sooner than `check_s` after it said no; then it is no.
            over: once it is set, nobody waits for the command any more.
        """
        if self._command is None:
            return not over.is_set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._ask_at):
                await moved_on.wait()
            return False
        answer = await self._succeeds(self._command, over)
        if over.is_set():
            return False
        before, self._given = self._given, answer
        if not self._given:
            self._ask_at = asyncio.get_running_loop().time() + self._check_s
        if self._given is not before and not (self._given and before is None):
            structlog.get_logger().info("local steps allowed" if self._given else "local steps not allowed")
        return self._given

    async def _succeeds(self, command: tuple[str, ...], over: asyncio.Event) -> bool:
        """Whether a command exits with 0 in time; it and its children are killed otherwise."""
        quiet, warn = asyncio.subprocess.DEVNULL, structlog.get_logger().warning
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
            )
        except OSError as error:
            self._seldom.say(warn, "limits.allow cannot be run", problem=error.strerror)
            return False
        ends = [asyncio.create_task(process.wait()), asyncio.create_task(over.wait())]
        try:
            done, _ = await asyncio.wait(ends, timeout=ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                self._seldom.say(warn, "limits.allow gave no answer", within_s=ANSWER_S)
            return process.returncode == 0
        finally:
            for end in ends:
                end.cancel()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


class Pace:
    """Rests between local steps, also those of different rounds, so that they take their share of the time only."""

    def __init__(self, cpu_share: float) -> None:
        self._rest_a_second = 1 / cpu_share - 1
        self._rested_at = 0.0
        self._began = 0.0
        self._left = 0

    def begin(self, steps: int, stop: Stop) -> bool:
        """Before the first of so many steps: rest for what is left to rest; whether that step is to be made."""
        self._left = steps
        self._rest(stop)
        return not stop.is_set()

    def ends(self, stop: Stop) -> bool:
        """After each step: rest, unless it was the last one; whether no other is to be made."""
        self._left -= 1
        now = time.monotonic()
        self._rested_at = now + (now - self._began) * self._rest_a_second
        if self._left > 0:
            self._rest(stop)
        return stop.is_set()

    def _rest(self, stop: Stop) -> None:
        stop.wait(max(0.0, self._rested_at - time.monotonic()))
        self._began = time.monotonic()


class NodeCompute(ThreadCompute):
    """Jobs of the model's one thread, in order; local steps once the user's command says that they may begin."""

    def __init__(self, ports: Ports, executor: Executor, allowance: Allowance) -> None:
        super().__init__(ports, executor)
        self._allowance = allowance
        self._orders: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._stop, self._moved_on, self._over = threading.Event(), asyncio.Event(), asyncio.Event()  # of the newest

    async def run_steps(self) -> None:
        """Work until cancelled. Nothing here holds a model: where the run changes, there is no room for two."""
        while True:
            await (await self._orders.get())()

    def steps(self, model: Model, order: StartSteps, done: StepsEnd, failed: Failed) -> None:
        """Do local steps, once they may begin; `done` takes None where that is not now."""
        self._stop, self._moved_on, self._over = threading.Event(), asyncio.Event(), asyncio.Event()
        job, given = partial(model.step, order, self._stop, order.steps), partial(self._allowance.given, self._moved_on)
        self._orders.put_nowait(partial(self._begin, partial(given, self._over), job, done, failed))

    async def _begin(
        self, given: Callable[[], Awaitable[bool]], job: Callable[[], StepResult | None], done: StepsEnd, failed: Failed
    ) -> None:
        if await given():
            self.run(job, done, failed)
        else:
            self._ports.call(done, None)

    def stop_steps(self) -> None:
        """End the local steps after the one that is being made."""
        self._stop.set()
        self._over.set()
        self.move_on()

    def move_on(self) -> None:
        """The run is ahead of this node: local steps that wait until they may begin wait no longer."""
        self._moved_on.set()
