"""The node's worker: one thread for the model, and the user's say in when local steps may begin."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial

from meerkat_mq.node.limits import Allowance
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.loop import Ports, ThreadCompute
from meerkat_mq.runtime.model import Model, StepResult


class NodeCompute(ThreadCompute):
    """Jobs of the model's thread, in order.

    Args:
        ports: of the service.
        executor: has one thread.
        allowance: whether local steps may begin.
    """

    def __init__(self, ports: Ports, executor: Executor, allowance: Allowance) -> None:
        super().__init__(ports, executor)
        self._allowance = allowance
        self._orders: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._stop, self._moved_on = threading.Event(), asyncio.Event()  # of the newest order

    async def run_steps(self) -> None:
        """Work until cancelled. Nothing here holds a model: where the run changes, there is no room for two."""
        while True:
            await (await self._orders.get())()

    async def _begin(
        self,
        job: Callable[[], StepResult | None],
        done: Callable[[StepResult | None], None],
        failed: Callable[[Exception], None],
        stop: threading.Event,
        moved_on: asyncio.Event,
    ) -> None:
        if await self._allowance.given(moved_on) and not stop.is_set():
            self.run(job, done, failed)
        else:
            self._ports.call(done, None)

    def steps(
        self,
        model: Model,
        order: StartSteps,
        done: Callable[[StepResult | None], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Do local steps, once they may begin; `done` takes None where that is not now."""
        stop, moved_on = self._stop, self._moved_on = threading.Event(), asyncio.Event()
        job = partial(model.step, order, stop, order.steps)
        self._orders.put_nowait(partial(self._begin, job, done, failed, stop, moved_on))

    def stop_steps(self) -> None:
        """End the local steps after the one that is being made."""
        self._stop.set()
        self.move_on()

    def move_on(self) -> None:
        """The run is ahead of this node: local steps that wait until they may begin wait no longer."""
        self._moved_on.set()
