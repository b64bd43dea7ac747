"""The node's worker: one thread for the model, and the user's say in when local steps may begin."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from meerkat_mq.node.limits import Allowance
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.loop import Ports, ThreadCompute
from meerkat_mq.runtime.model import Model, StepResult


@dataclass(frozen=True)
class _Steps:
    model: Model
    order: StartSteps
    done: Callable[[StepResult | None], None]
    failed: Callable[[Exception], None]
    stop: threading.Event
    moved_on: asyncio.Event


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
        self._orders: asyncio.Queue[_Steps] = asyncio.Queue()
        self._newest: _Steps | None = None

    async def run_steps(self) -> None:
        """Work until cancelled."""
        while True:
            steps = await self._orders.get()
            if await self._allowance.given(steps.moved_on) and not steps.stop.is_set():
                job = partial(steps.model.step, steps.order, steps.stop, steps.order.steps)
                self.run(job, steps.done, steps.failed)
            else:
                self._ports.call(steps.done, None)

    def steps(
        self,
        model: Model,
        order: StartSteps,
        done: Callable[[StepResult | None], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Do local steps, once they may begin; `done` takes None where that is not now."""
        self._newest = _Steps(model, order, done, failed, threading.Event(), asyncio.Event())
        self._orders.put_nowait(self._newest)

    def stop_steps(self) -> None:
        """End the local steps after the one that is being made."""
        if self._newest is not None:
            self._newest.stop.set()
            self._newest.moved_on.set()

    def move_on(self) -> None:
        """The run is ahead of this node: local steps that wait until they may begin wait no longer."""
        if self._newest is not None:
            self._newest.moved_on.set()
