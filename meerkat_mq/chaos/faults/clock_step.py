"""A wall clock that steps."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Annotated, ClassVar

from pydantic import Field

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class ClockStep(Fault):
    """The wall clock of a process steps, and steps back when it heals.

    Attributes:
        by_s: so many seconds ahead, or back where that is negative; without it the clock goes back to 1970, where a
            host without a battery starts.
    """

    name: ClassVar[str] = "clock-step"
    on: ClassVar[Place] = "process"
    attachable: ClassVar[bool] = False
    clocked: ClassVar[bool] = True

    by_s: Annotated[float, Field(ge=-1e10, le=1e10)] | None = None

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Step it, step it back."""
        clock = stage.services[target].clock
        assert clock is not None
        clock.shift(-time.time() if self.by_s is None else self.by_s)
        try:
            yield
        finally:
            clock.shift(0.0)
