"""A child process that serves a port and never outlives us."""

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Sequence
from typing import NoReturn, Self

import structlog

from meerkat_mq.errors import BrokerError

_PATIENCE = 10
_PATIENCE_S = 0.2

# PR_SET_PDEATHSIG must be set between fork and exec; a hook of ours there is not safe in a process with threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """A running child process; its lines go to the log at level debug."""

    def __init__(self, name: str, where: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.pid = process.pid
        self._where = where
        self._process = process
        self._lines: deque[str] = deque(maxlen=3)
        self._settled = asyncio.Event()
        self._ended = False
        self._serving = False
        self._log = structlog.get_logger().bind(program=name, pid=process.pid, broker=where)
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, name: str, where: str, command: Sequence[str], stdin: bytes = b"") -> Self:
        """Start a command (absolute path first) that prints "running" when it serves.

        It gets a session of its own, so that Ctrl-C in a terminal ends us first and it last.
        """
        shim = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
        process = await asyncio.create_subprocess_exec(
            *shim,
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
        return cls(name, where, process)

    async def ready(self, deadline_s: float) -> None:
        """Wait until it says that it runs; one that says nothing by then may still serve. BrokerError: it ended."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), deadline_s)
        if self._ended:
            await self.watch()
        self._serving = True

    async def watch(self) -> NoReturn:
        """Wait for its end: BrokerError, with its last words."""
        code = await self._process.wait()
        await asyncio.wait({self._reader})
        raise BrokerError(self._where, f"{self.name} ended with code {code}: {' | '.join(self._lines) or 'no output'}")

    async def stop(self) -> None:
        """Terminate it, or kill it where that takes too long.

        It is told more than once: Mosquitto forgets a SIGTERM that comes just before its main loop.
        """
        self._serving = False
        for end in (*[self._process.terminate] * _PATIENCE, self._process.kill):
            with contextlib.suppress(ProcessLookupError):
                end()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _PATIENCE_S)
                break
        await asyncio.wait({self._reader})

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            line = raw.decode(errors="replace").strip()
            self._lines.append(line)
            self._log.debug("broker says", line=line)
            if "running" in line:
                self._settled.set()
        self._ended = True
        self._settled.set()
        code = await self._process.wait()
        if self._serving:
            self._log.error("broker ended", code=code, last_words=list(self._lines))
