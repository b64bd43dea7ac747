"""A real Mosquitto for one test."""

import contextlib
import getpass
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from meerkat_mq.config import BrokerConfig

HOST = "127.0.0.1"
START_S = 10.0
STOP_S = 3.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """A broker process on a loopback port that stays the same over restarts.

    `lines` are added to its configuration. Ready means: it logged "running" and accepts.
    """

    def __init__(self, folder: Path, *lines: str, anonymous: bool = True) -> None:
        self.port = free_port()
        self.url = f"mqtt://{HOST}:{self.port}"
        self._log = folder / f"mosquitto-{self.port}.log"
        self._conf = folder / f"mosquitto-{self.port}.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self._lines = [
            f"allow_anonymous {str(anonymous).lower()}",
            f"user {getpass.getuser()}",
            "set_tcp_nodelay true",
            "max_queued_messages 0",
            "log_dest stderr",
            "log_type all",
            *lines,
        ]

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

    def start(self) -> "Mosquitto":
        program = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
        if program is None:
            pytest.fail("these tests need Mosquitto: install your system's package mosquitto (`make test` does)")
        self._conf.write_text("\n".join([f"listener {self.port} {HOST}", *self._lines, ""]))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([program, "-c", str(self._conf)], stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not (" running" in self.log and self._accepts()):
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
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _accepts(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            return True
        return False
