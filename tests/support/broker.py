"""A real broker's process: started, killed, frozen."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from meerkat_mq.config import BrokerConfig

HOST = "127.0.0.1"
STOP_S = 3.0
PLACES = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin"


_given: set[int] = set()


def free_port() -> int:
    """A port that nobody uses, and no other than those given before: they may not be in use yet."""
    port = 0
    while not port or port in _given:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
    _given.add(port)
    return port


def program(name: str, *, makes_sure: str) -> str:
    """The path of an installed program; `makes_sure` is the make target that installs it."""
    path = shutil.which(name, path=PLACES)
    if path is None:
        pytest.fail(f"these tests need {name}: install your system's package {name} (`{makes_sure}` does)")
    return path


def _state(thread: Path) -> str:
    """The letter of a thread's state (proc_pid_stat(5)), "T" also where it has ended."""
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return "T"


class Broker:
    """A broker process on a loopback port that stays the same over restarts.

    Ready means: it logged `SIGN` and accepts.

    Attributes:
        wills_at_takeover: whether a client that is closed for another with its id fires its will.
    """

    SIGN = ""
    wills_at_takeover = True
    START_S = 10.0

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"mqtt://{HOST}:{self.port}"
        self.folder = folder
        self._log = folder / f"broker-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> BrokerConfig:
        return BrokerConfig(url=self.url)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def prepare(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        """Write what it reads; the command, and its environment where that is not ours."""
        raise NotImplementedError

    def start(self) -> "Broker":
        command, environment = self.prepare()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + self.START_S
        while not (self.SIGN in self.log and self._accepts()):
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)
        return self

    def kill(self) -> None:
        """SIGKILL: nothing is said to anybody, nothing is kept."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_S)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def freeze(self) -> None:
        """SIGSTOP, and wait until all threads have stopped: one may still have an acknowledgement to write."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_S
        while any(_state(thread) != "T" for thread in Path(f"/proc/{self.pid}/task").iterdir()):
            assert time.monotonic() < deadline, "does not freeze"
            time.sleep(0.001)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _accepts(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            return True
        return False
