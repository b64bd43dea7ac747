"""The processes of a drill: started, signalled, and started again when they die, as by a service manager."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from meerkat_mq.broker import EmbeddedBroker, embedded_broker
from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BrokerError, DrillFailed, RunError

RESTART_S = 1.0
STOP_S = 15.0
_WORDS = "meerkat: "
_TRACEBACK = "Traceback (most recent call last)"


class Process(Protocol):
    """What faults may do to every process, attached ones too."""

    name: str

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""

    async def kill(self) -> None:
        """SIGKILL."""

    async def start(self) -> None:
        """Start it again, or leave that to whoever watches over it."""


@dataclass(frozen=True)
class End:
    """How a process ended by itself.

    Attributes:
        words: what it said last, "" where that was no words of ours.
    """

    name: str
    code: int
    words: str


class Service:
    """A server or node, which writes its log as JSON lines.

    Attributes:
        deaths: ends that nobody asked for; each was followed by another start.
        forgiven: ends in words are not counted as deaths for now.
    """

    def __init__(self, name: str, role: str, config: Path, log: Path, *flags: str) -> None:
        self.name = name
        self.deaths: list[End] = []
        self.forgiven = False
        self._command = [sys.executable, "-m", f"meerkat_mq.{role}", "--config", str(config), "--json-logs", *flags]
        self._log = log
        self._begins = 0
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._wanted = False

    @property
    def alive(self) -> bool:
        """Whether it runs, or stands still."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Of the present process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it, and keep it going."""
        self._wanted = True
        if self._keeper is not None and not self._keeper.done():
            return  # it died meanwhile, and is started again already
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has just ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)  # asyncio's own way may take the exit code away from itself

    def expect_end(self) -> None:
        """From now on its end is as it should be, until it is started again."""
        self._wanted = False

    async def kill(self) -> None:
        """SIGKILL."""
        self._wanted = False
        self.signal(signal.SIGKILL)
        await self._over()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that takes too long.

        Raises:
            DrillFailed: it took too long.
        """
        self._wanted = False
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._over(), STOP_S)
        except TimeoutError:
            await self.kill()
            raise DrillFailed(self.name, f"did not end within {STOP_S:g} s of SIGTERM", f"see {self._log}") from None

    async def ends_in_words(self, code: int, *, within_s: float) -> None:
        """Wait until it ends by itself as a service should that finds it must not go on.

        Raises:
            DrillFailed: it goes on, or ends otherwise.
        """
        try:
            await asyncio.wait_for(self._over(), within_s)
        except TimeoutError:
            raise DrillFailed(self.name, f"did not end within {within_s:g} s", f"see {self._log}") from None
        end = self._end()
        if end.code != code or not end.words:
            said = end.words or "no words"
            raise DrillFailed(self.name, f"ended with code {end.code} and {said}, not with {code} and words")

    def tracebacks(self) -> int:
        """How many its log holds."""
        return self._log.read_text(encoding="utf-8", errors="replace").count(_TRACEBACK) if self._log.exists() else 0

    async def _over(self) -> None:
        if self._process is not None:
            await self._process.wait()
        if self._keeper is not None and not self._wanted:
            await asyncio.wait({self._keeper})

    async def _spawn(self) -> None:
        with self._appending() as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @contextlib.contextmanager
    def _appending(self) -> Iterator[int]:
        with self._log.open("ab") as file:
            self._begins = file.tell()
            yield file.fileno()

    async def _keep(self) -> None:
        while True:
            assert self._process is not None
            await self._process.wait()
            if not self._wanted:
                return
            end = self._end()
            if not (self.forgiven and end.words and end.code == RunError.exit_code):
                self.deaths.append(end)
            await asyncio.sleep(RESTART_S)
            if not self._wanted:
                return
            await self._spawn()

    def _end(self) -> End:
        assert self._process is not None
        with self._log.open("rb") as file:
            file.seek(self._begins)
            lines = file.read().decode(errors="replace").splitlines()
        last = lines[-1] if lines else ""
        words = last.removeprefix(_WORDS) if last.startswith(_WORDS) else ""
        return End(self.name, self._process.returncode or 0, words)


class Attached:
    """A process that somebody else started and watches over: it gets signals."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self._pid = pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal.

        Raises:
            DrillFailed: there is no such process, or it is not ours to signal.
        """
        try:
            os.kill(self._pid, number)
        except OSError as error:
            raise DrillFailed(self.name, f"process {self._pid} cannot be signalled ({error.strerror})") from error

    async def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    async def start(self) -> None:
        """Left to its service manager."""


class Broker:
    """A Mosquitto of the drill's own: loopback, without persistence, on a port that stays the same.

    Attributes:
        config: the way to it.
    """

    def __init__(self) -> None:
        self.config = BrokerConfig()
        self._port = 0
        self._embedded: EmbeddedBroker | None = None
        self._running = AsyncExitStack()

    async def start(self) -> None:
        """Start it.

        Raises:
            BrokerError: Mosquitto is not installed, or does not start.
        """
        broker = await self._running.enter_async_context(embedded_broker(port=self._port, program="mosquitto"))
        self.config, self._port, self._embedded = broker.config, broker.config.port, broker

    async def stop(self) -> None:
        """SIGTERM."""
        await self._running.aclose()

    async def kill(self) -> None:
        """SIGKILL: nothing is said to anybody, nothing is kept."""
        assert self._embedded is not None
        with contextlib.suppress(ProcessLookupError, BrokerError):
            os.kill(self._embedded.pid, signal.SIGKILL)
            await self._embedded.watch()
        await self._running.aclose()
