"""Faults of the processes: the server and the nodes."""

import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from meerkat_mq.chaos.faults.fault import PATIENCE_S, Fault
from meerkat_mq.chaos.stage import SERVER, Stage
from meerkat_mq.errors import BrokerError, RunError


class Sigkill(Fault):
    """SIGKILL; started again when it heals, as a service manager would."""

    name = "sigkill"
    on = "process"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        await stage.processes[target].kill()
        yield
        await stage.processes[target].start()


class HostPowerCut(Sigkill):
    """SIGKILL, and the broker does not notice: no FIN, no reset, no last will until the keep-alive runs out.

    Started again when it heals, the process finds its own retained "online" of before.
    """

    name = "host-power-cut"
    attachable = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        stage.links[target].abandon()
        async with super().strike(stage, target, random):
            yield


class Sigstop(Fault):
    """SIGSTOP, then SIGCONT."""

    name = "sigstop"
    on = "process"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        process = stage.processes[target]
        process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.signal(signal.SIGCONT)


class DiskFull(Fault):
    """Every write to a file fails: the kernel's limit on the size of the process's files is 0 (EFBIG)."""

    name = "disk-full"
    on = "process"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        process = stage.processes[target]
        process.limit_files(0)
        try:
            yield
        finally:
            process.limit_files(None)


class LogFull(Fault):
    """Standard error of a process is a pipe that nobody empties.

    Attributes:
        how: "left": its reader ended, and writes fail; "stalled": its reader stands still, and writes wait once the
            pipe is full.
    """

    name = "log-full"
    on = "process"
    attachable = False

    how: Literal["left", "stalled"] = "left"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        log = stage.services[target].log_pipe
        (log.leave if self.how == "left" else log.stand_still)()
        try:
            yield
        finally:
            log.read()


class ClockStep(Fault):
    """The wall clock of a process steps, and steps back when it heals.

    Attributes:
        by_s: so many seconds ahead, or back where that is negative; without it the clock goes back to 1970, where a
            host without a battery starts.
    """

    name = "clock-step"
    on = "process"
    attachable = False
    clocked = True

    by_s: Annotated[float, Field(ge=-1e10, le=1e10)] | None = None

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        clock = stage.services[target].clock
        assert clock is not None
        clock.shift(-time.time() if self.by_s is None else self.by_s)
        try:
            yield
        finally:
            clock.shift(0.0)


class Clone(Fault):
    """A second process with the same id, as from a copied card: the first ends in words, the second works on.

    When it heals, the second is stopped, and the first is started again.
    """

    name = "clone"
    on = "node"
    attachable = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        first = stage.services[target]
        second = stage.clone_of(target)
        first.expect_end()
        # A first one that was just starting is the newer one; started again, the second wins. And who was never
        # connected before ends where the broker knows nobody just then.
        second.forgiven = RunError.exit_code, BrokerError.exit_code
        await second.start()
        try:
            await first.ends_in_words(RunError.exit_code, within_s=PATIENCE_S)
            yield
        finally:
            await second.stop()
        await first.start()


class SecondServer(Fault):
    """The server stands still, another takes over with --replace on the same ledger, the first one wakes up.

    The first then ends in words.
    """

    name = "second-server"
    on = "server"
    attachable = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        first, second = stage.services[SERVER], stage.next_server()
        first.expect_end()
        second.forgiven = (RunError.exit_code,)  # a first one that was just starting takes over; started again, it wins
        first.signal(signal.SIGSTOP)
        try:
            await second.start()
            yield
        finally:
            first.signal(signal.SIGCONT)
        await first.ends_in_words(RunError.exit_code, within_s=PATIENCE_S)
        second.forgiven = ()
