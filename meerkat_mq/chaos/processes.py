"""The processes of a drill: started, signalled, and started again when they die, as by a service manager."""

import asyncio
import contextlib
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from meerkat_mq.broker.embedded import EmbeddedBroker, embedded_broker
from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BrokerError, DrillFailed

RESTART_S = 1.0
STOP_S = 15.0
_WORDS = "meerkat: "
_TRACEBACK = "Traceback (most recent call last)"
_READ_BYTES = 65_536
_SMALL_BYTES = 4096  # of a pipe whose reader stands still: the kernel's least, so that it is full within seconds
_SOURCE = resources.files("meerkat_mq.chaos") / "wall_clock.c"
_COMPILE_S = 60.0


class LogPipe:
    """Standard error of a service: a pipe whose reader, on this event loop, writes the log file.

    A service that writes its log into a file never meets what a log collector does to it: the reader ends (each write
    then fails with EPIPE), or it stands still (the pipe fills up, and a write that waits stops its process). The drill
    keeps the pipe's writing end, by which Linux lets it open a reading end again: so both heal.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._reader: int | None = None
        reader, self.writer = os.pipe()
        os.close(reader)

    def read(self) -> None:
        """Read, at first and after `leave` and `stand_still`."""
        if self._reader is None:
            self._reader = os.open(f"/proc/self/fd/{self.writer}", os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _READ_BYTES)
        asyncio.get_running_loop().add_reader(self._reader, self.drain)

    def stand_still(self) -> None:
        """Read no more; a small pipe fills up."""
        if self._reader is not None:
            asyncio.get_running_loop().remove_reader(self._reader)
            with contextlib.suppress(OSError):  # it holds more than that already
                fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _SMALL_BYTES)

    def leave(self) -> None:
        """End the reader: writes fail with EPIPE."""
        if self._reader is not None:
            self.drain()
            self.stand_still()
            os.close(self._reader)
            self._reader = None

    def close(self) -> None:
        """Give both ends back."""
        self.leave()
        os.close(self.writer)

    def drain(self) -> None:
        """Write down all that has come."""
        if self._reader is None:
            return
        with contextlib.suppress(BlockingIOError), self._log.open("ab") as file:
            while data := os.read(self._reader, _READ_BYTES):
                file.write(data)


def build_library(folder: Path) -> Path:
    """Compile the library into a folder; DrillFailed where there is no C compiler, or it fails. Blocks."""
    compiler, library = shutil.which("cc") or shutil.which("gcc"), folder / "wall_clock.so"
    if compiler is None:
        raise DrillFailed("clock-step", "needs a C compiler, and none is installed", "install your system's gcc")
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DrillFailed("clock-step", f"{compiler} does not run ({error})", "install your system's gcc") from error
    if done.returncode:
        problem = f"{compiler} fails ({done.stderr.strip().partition(chr(10))[0]})"
        raise DrillFailed("clock-step", problem, "install your system's gcc and its C library's headers")
    return library


class WallClock:
    """The wall clock of one service, also of the processes that are started in its place; wall_clock.c says how."""

    def __init__(self, library: Path, file: Path) -> None:
        self._library = library
        self._file = file
        self._file.write_bytes(bytes(8))

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process whose clock this is."""
        return {"LD_PRELOAD": str(self._library), "MEERKAT_WALL_CLOCK": str(self._file)}

    def shift(self, by_s: float) -> None:
        """From now on it is so many seconds fast, or slow where that is negative."""
        with self._file.open("r+b") as file:  # in place: processes have it mapped
            file.write(round(by_s).to_bytes(8, "little", signed=True))


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended by itself, and what it said last: "" where that was no words of ours."""

    name: str
    code: int
    words: str


class Service:
    """A server or node, which writes its log as JSON lines.

    Attributes:
        deaths: ends that nobody asked for; each was followed by another start.
        forgiven: ends in words with these exit codes are not counted as deaths for now.
        log_pipe: its standard error.
        clock: its wall clock, where that can be stepped.
    """

    def __init__(
        self, name: str, role: str, config: Path, log: Path, *flags: str, clock: WallClock | None = None
    ) -> None:
        self.name = name
        self.clock = clock
        self.log_pipe = LogPipe(log)
        self.deaths: list[ProcessEnd] = []
        self.forgiven: tuple[int, ...] = ()
        self._command = [sys.executable, "-m", f"meerkat_mq.{role}", "--config", str(config), "--json-logs", *flags]
        self._log = log
        self._begins = 0
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._wanted = False

    async def start(self) -> None:
        """Start it, and keep it going."""
        self._wanted = True
        if self._keeper is not None and not self._keeper.done():
            return  # it died meanwhile, and is started again already
        self.log_pipe.read()
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has just ended."""
        self._affect(os.kill, number)  # asyncio's own way may take the exit code away from itself

    def limit_files(self, size: int | None) -> None:
        """Let no file of it grow beyond so many bytes, unless it has just ended; None: as before."""
        self._affect(_limit_files, size)

    def _affect(self, change: Callable[[int, Any], None], to: object) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                change(self._process.pid, to)

    def expect_end(self) -> None:
        """From now on its end is as it should be, until it is started again."""
        self._wanted = False

    async def kill(self) -> None:
        """SIGKILL."""
        self._wanted = False
        self.signal(signal.SIGKILL)
        await self._over()

    async def stop(self) -> None:
        """SIGTERM, and where that takes too long SIGKILL and DrillFailed."""
        self._wanted = False
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._over(), STOP_S)
        except TimeoutError:
            await self.kill()
            raise DrillFailed(self.name, f"did not end within {STOP_S:g} s of SIGTERM", f"see {self._log}") from None

    async def close(self) -> None:
        """End it for good: SIGKILL, and its log is whole."""
        await self.kill()
        self.log_pipe.close()

    async def ends_in_words(self, code: int, *, within_s: float) -> None:
        """Wait until it ends by itself as a service should that must not go on; DrillFailed where it does not."""
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
        self.log_pipe.drain()
        self._begins = self._log.stat().st_size if self._log.exists() else 0
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self.log_pipe.writer,
            stderr=self.log_pipe.writer,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(self.clock.environment if self.clock else {})},
            start_new_session=True,
        )

    async def _keep(self) -> None:
        while True:
            assert self._process is not None
            await self._process.wait()
            if not self._wanted:
                return
            end = self._end()
            if not (end.words and end.code in self.forgiven):
                self.deaths.append(end)
            await asyncio.sleep(RESTART_S)
            if not self._wanted:
                return
            await self._spawn()

    def _end(self) -> ProcessEnd:
        assert self._process is not None
        self.log_pipe.drain()
        with self._log.open("rb") as file:
            file.seek(self._begins)
            lines = file.read().decode(errors="replace").splitlines()
        last = lines[-1] if lines else ""
        words = last.removeprefix(_WORDS) if last.startswith(_WORDS) else ""
        return ProcessEnd(self.name, self._process.returncode or 0, words)


class Attached:
    """A process that somebody else started and watches over: it gets signals."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self._pid = pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._affect(os.kill, number, "signalled")

    def limit_files(self, size: int | None) -> None:
        """Let no file of it grow beyond so many bytes; None: as before."""
        self._affect(_limit_files, size, "limited")

    async def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    async def start(self) -> None:
        """Left to its service manager."""

    def _affect(self, change: Callable[[int, Any], None], to: object, done: str) -> None:
        """DrillFailed where there is no such process, or it is not ours."""
        try:
            change(self._pid, to)
        except OSError as error:
            raise DrillFailed(self.name, f"process {self._pid} cannot be {done} ({error.strerror})") from error


class BrokerProcess:
    """A Mosquitto of the drill's own: loopback, without persistence, on a port that stays the same."""

    def __init__(self, passwords: Path | None = None) -> None:
        self.config = BrokerConfig()
        self._passwords = passwords
        self._port = 0
        self._embedded: EmbeddedBroker | None = None
        self._running = AsyncExitStack()

    async def start(self) -> None:
        """Start it.

        Raises:
            BrokerError: Mosquitto is not installed, or does not start.
        """
        broker = await self._running.enter_async_context(
            embedded_broker(port=self._port, program="mosquitto", passwords=self._passwords)
        )
        self.config, self._port, self._embedded = broker.config, broker.config.port, broker

    async def stop(self) -> None:
        """SIGTERM."""
        await self._running.aclose()

    def reload(self) -> None:
        """SIGHUP: it reads its password store anew, and ends the connections of those that it knows no more."""
        assert self._embedded is not None
        os.kill(self._embedded.pid, signal.SIGHUP)

    async def kill(self) -> None:
        """SIGKILL: nothing is said to anybody, nothing is kept."""
        assert self._embedded is not None
        with contextlib.suppress(ProcessLookupError, BrokerError):
            os.kill(self._embedded.pid, signal.SIGKILL)
            await self._embedded.watch()
        await self._running.aclose()


def _limit_files(pid: int, size: int | None) -> None:
    """Set RLIMIT_FSIZE of a process; its hard limit stays, so that the soft one can be lifted again."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
