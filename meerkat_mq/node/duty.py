"""The duty cycle of a node: awake and connected for a while, then asleep, again and again (docs/duty-cycle.md)."""

import asyncio
import contextlib
import math
import random

import structlog

from meerkat_mq.config import ScheduleConfig
from meerkat_mq.mqtt import Session
from meerkat_mq.runtime.node import NodeDriver

JITTER = 0.1  # of a period: a fleet that was switched on at once does not come at once for ever
LOOK_S = 1.0  # between two looks at whether the node may sleep
PARTING_S = 5.0  # to connect once more, only to say that the node stops

_RANDOM = random.SystemRandom()  # a fleet that boots from one image must not share a seed


class DutyCycle:
    """Connects a session for a while, again and again; its farewell says "asleep" while `wakes_in_s` is a number."""

    def __init__(self, schedule: ScheduleConfig, session: Session, driver: NodeDriver) -> None:
        self._schedule = schedule
        self._session = session
        self._driver = driver
        self._wakes_at: float | None = None
        self._changed = asyncio.Event()

    @property
    def wakes_in_s(self) -> int | None:
        """Seconds until the next waking at the latest; None while awake, and at the end."""
        return None if self._wakes_at is None else max(1, math.ceil(self._wakes_at - _now()))

    def changed(self) -> None:
        """Whether the driver may sleep may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Wake and sleep until cancelled; then the session says its farewell. Raises as `Session.run`, in a group."""
        try:
            while True:
                wakes_at = _now() + self._schedule.every_s * (1 - JITTER * _RANDOM.random())
                await self._be_awake(wakes_at)
                structlog.get_logger().info("asleep", wakes_in_s=self.wakes_in_s)
                await asyncio.sleep(wakes_at - _now())
                self._wakes_at = None
        except asyncio.CancelledError:
            if self._wakes_at is not None:
                self._wakes_at = None  # "stopped" takes the place of "asleep", which would expire
                await self._session.part(PARTING_S)
            raise

    async def _be_awake(self, wakes_at: float) -> None:
        self._driver.wake()
        async with asyncio.TaskGroup() as tasks:
            connection = tasks.create_task(self._session.run())
            await self._stay_awake(_now() + self._schedule.awake_s)
            self._wakes_at = wakes_at
            self._driver.sleep()
            connection.cancel()

    async def _stay_awake(self, until: float) -> None:
        while not self._driver.may_sleep(_now() >= until):
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(until if _now() < until else math.inf, _now() + LOOK_S)):
                    await self._changed.wait()


def _now() -> float:
    return asyncio.get_running_loop().time()
