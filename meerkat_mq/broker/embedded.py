"""`broker.url = "embedded"`: a broker on a loopback port for as long as we live."""

import asyncio
import contextlib
import os
import shutil
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, Self

import structlog

from meerkat_mq.config import BrokerConfig
from meerkat_mq.core.files import write_atomically
from meerkat_mq.errors import BrokerError, MissingExtra
from meerkat_mq.extras import missing

Program = Literal["mosquitto", "amqtt"]

_HOST = "127.0.0.1"
_ATTEMPTS = 5
_START_S: dict[Program, float] = {"mosquitto": 5.0, "amqtt": 30.0}
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # Debian's place for it, not on everybody's PATH
_CONFIG = BrokerConfig(url="embedded")
_REMEDY = "stop what uses the port, or choose another"
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


@dataclass(frozen=True)
class EmbeddedBroker:
    """A running broker: the way to it, its program and its process.

    amqtt is pure Python: no keep-alive enforcement, no redelivery, retained messages also to those who did not ask.
    """

    config: BrokerConfig
    program: Program
    pid: int
    _child: Child = field(repr=False)

    async def watch(self) -> NoReturn:
        """Wait for its end, which is a BrokerError: a task for the owner's task group."""
        await self._child.watch()


@asynccontextmanager
async def embedded_broker(
    config: BrokerConfig = _CONFIG, *, port: int = 0, program: Program | None = None, passwords: Path | None = None
) -> AsyncIterator[EmbeddedBroker]:
    """Run a broker as a child process; it dies with us, also when we are killed (Linux).

    Args:
        config: its `url` is replaced.
        port: on 127.0.0.1; 0 chooses a free one.
        program: default: Mosquitto where installed, else amqtt.
        passwords: Mosquitto's password store; it reads that again at SIGHUP, and its configuration, which is written
            beside it. Without one, everybody on this machine may connect.

    Raises:
        MissingExtra: neither program is installed.
        BrokerError: it did not start.
    """
    log = structlog.get_logger()
    chosen = program or installed_program()
    child, port = await _start(chosen, port, passwords)
    log.info("broker started", program=chosen, port=port, pid=child.pid)
    if chosen == "amqtt":
        log.warning("amqtt is for trying things out: no keep-alive enforcement, no redelivery; install mosquitto")
    try:
        yield EmbeddedBroker(config.model_copy(update={"url": f"mqtt://{_HOST}:{port}"}), chosen, child.pid, child)
    finally:
        await child.stop()
        log.info("broker stopped", program=chosen, port=port)


async def _start(program: Program, port: int, passwords: Path | None) -> tuple[Child, int]:
    """Start it; where we chose the port and somebody else took it meanwhile, choose again."""
    for attempt in range(1, _ATTEMPTS + 1):
        chosen = port or _free_port()
        command, stdin = _command(program, chosen, passwords)
        child = await Child.start(program, f"{_HOST}:{chosen}", command, stdin)
        try:
            await child.ready(_START_S[program])
        except BrokerError as error:
            await child.stop()
            if port or attempt == _ATTEMPTS:
                raise BrokerError(error.where, error.problem, _REMEDY) from None
        except BaseException:
            await child.stop()
            raise
        else:
            return child, chosen
    raise AssertionError("the last attempt returns or raises")


def _command(program: Program, port: int, passwords: Path | None) -> tuple[list[str], bytes]:
    if program == "amqtt":
        return [sys.executable, "-m", "meerkat_mq.broker.fallback", str(port)], b""
    path = _mosquitto()
    if path is None:
        raise BrokerError("embedded broker", "mosquitto is not installed", "install your system's package mosquitto")
    config = _mosquitto_config(port, passwords)
    if passwords is None:
        return [path, "-c", "/dev/stdin"], config.encode()
    file = passwords.with_name("mosquitto.conf")
    write_atomically(file, config.encode(), durable=False)
    return [path, "-c", str(file)], b""


def _mosquitto_config(port: int, passwords: Path | None) -> str:
    lines = [
        f"listener {port} {_HOST}",
        *(["allow_anonymous true"] if passwords is None else ["allow_anonymous false", f"password_file {passwords}"]),
        "set_tcp_nodelay true",
        "max_queued_messages 0",
        "persistence false",
        "log_dest stderr",
        "connection_messages false",
    ]
    if os.geteuid() == 0:
        lines.append("user root")  # else it becomes another user, and the kernel forgets that it shall die with us
    return "\n".join(lines) + "\n"


def installed_program() -> Program:
    """Mosquitto where it is installed, else amqtt; MissingExtra where neither is."""
    if _mosquitto() is not None:
        return "mosquitto"
    if missing("embedded") is None:
        return "amqtt"
    remedy = "install your system's package mosquitto, or pip install 'meerkat-mq[embedded]'"
    raise MissingExtra("embedded broker", "neither mosquitto nor amqtt is installed", remedy)


def _mosquitto() -> str | None:
    return shutil.which("mosquitto", path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
