"""What a node leaves to others on its machine: a share of the time, and when local steps may begin."""

import asyncio
import contextlib
import os
import shutil
import signal
import time

import structlog

from meerkat_mq.config import LimitsConfig
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import ConfigError
from meerkat_mq.runtime.model import Stop

ANSWER_S = 10.0  # of the user's command


class Allowance:
    """Asks the user's command whether local steps may begin now.

    Raises:
        ConfigError: there is no such command.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._seldom = Seldom()
        self._command = limits.allow
        self._check_s = limits.check_s
        self._ask_at = float("-inf")
        self._given: bool | None = None
        if self._command is not None and shutil.which(self._command[0]) is None:
            problem = f"there is no command {self._command[0]!r}"
            raise ConfigError("limits.allow", problem, "give a command on the PATH, or its whole path")

    async def given(self, moved_on: asyncio.Event) -> bool:
        """Whether the command says yes; not sooner than `check_s` after it said no, unless the run moves on: no."""
        if self._command is None:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._ask_at):
                await moved_on.wait()
            return False
        before, self._given = self._given, await _succeeds(self._command, self._seldom)
        if not self._given:
            self._ask_at = asyncio.get_running_loop().time() + self._check_s
        if self._given is not before and not (self._given and before is None):
            structlog.get_logger().info("local steps allowed" if self._given else "local steps not allowed")
        return self._given


async def _succeeds(command: tuple[str, ...], seldom: Seldom) -> bool:
    """Whether a command exits with 0 in time; it and its children are killed otherwise."""
    quiet = asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
        )
    except OSError as error:
        seldom.say(structlog.get_logger().warning, "limits.allow cannot be run", problem=error.strerror)
        return False
    try:
        async with asyncio.timeout(ANSWER_S):
            return await process.wait() == 0
    except TimeoutError:
        seldom.say(structlog.get_logger().warning, "limits.allow gave no answer", within_s=ANSWER_S)
        return False
    finally:
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
