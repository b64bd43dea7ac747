"""The ports on an asyncio event loop: its clock, and worker threads.

An exception in a callback has nobody to go to on an event loop. Here it ends `Ports.run`, which a service waits for.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import ParamSpec, TypeVar

from meerkat_mq.runtime.ports import Failed, Timer

Result = TypeVar("Result")
P = ParamSpec("P")


class Ports:
    """Callbacks of one service on the running event loop, and what they raise."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Wait until cancelled; raises whatever a callback raised first."""
        await self._failed

    def call(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Do something whose exception ends the service; nothing, once one has."""
        if self._failed.done():
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the service."""
        if not self._failed.done():
            self._failed.set_exception(error)


class LoopClock:
    """The event loop's clock."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        """Seconds, as the loop counts them."""
        return self._loop.time()

    def at(self, time: float, action: Callable[[], None]) -> Timer:
        """Do something at a time."""
        return self._loop.call_at(time, self._ports.call, action)


class ThreadCompute:
    """Jobs in threads; in order, where the executor has one."""

    def __init__(self, ports: Ports, executor: Executor) -> None:
        self._ports = ports
        self._loop = asyncio.get_running_loop()
        self._executor = executor

    def run(self, job: Callable[[], Result], done: Callable[[Result], None], failed: Failed) -> None:
        """Do a job in a thread, and tell on the loop."""

        def attempt() -> Callable[[], None]:
            """A future takes no StopIteration, and a callback that raises a panic of Rust's ends nothing."""
            try:
                return partial(self._ports.call, done, job())
            except Exception as error:
                return partial(self._ports.call, failed, error)
            except BaseException as error:
                return partial(self._ports.fail, error)

        self._loop.run_in_executor(self._executor, attempt).add_done_callback(_tell)


def _tell(answer: "asyncio.Future[Callable[[], None]]") -> None:
    if not answer.cancelled():
        answer.result()()
