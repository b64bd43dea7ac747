"""Services of a federation as processes, of this code or of an older one, and all that their broker carries."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.mosquitto import HOST

PATIENCE_S = 60.0
PORT = "1883"  # in a fixture's TOML files, for that of the broker


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition holds.

    Raises:
        AssertionError: it does not in time.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.005)


class Service:
    """A server or a node, as a process: `config` is its TOML file, `tree` the working tree whose code it runs."""

    def __init__(self, kind: str, config: Path, *flags: str, tree: Path | None = None) -> None:
        self._log = config.with_suffix(".log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(tree)} if tree else {})
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"meerkat_mq.{kind}", "--config", config, "--json-logs", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    @property
    def said(self) -> str:
        """All that it logged."""
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ended(self) -> int:
        """Wait for the end; the exit code."""
        until(lambda: self._process.poll() is not None, f"{self._log.stem} ends")
        return int(self._process.returncode)


def start_again(folder: Path, name: str, port: int, *, tree: Path | None = None) -> Service:
    """Start a fixture's server or node on its files, to the end of the run."""
    config = folder / f"{name}-again.toml"
    config.write_text((folder / f"{name}.toml").read_text().replace(PORT, str(port)))
    return Service(*(("server", config, "--once") if name == "server" else ("node", config)), tree=tree)


@dataclass(frozen=True)
class Carried:
    """A message as a subscriber got it."""

    topic: str
    payload: bytes


def save_carried(file: Path, messages: Iterable[Carried]) -> None:
    """Write messages as JSON lines."""
    lines = (json.dumps([sent.topic, base64.b64encode(sent.payload).decode()]) for sent in messages)
    file.write_text("".join(f"{line}\n" for line in lines))


def load_carried(file: Path) -> list[Carried]:
    """Read what `save_carried` wrote."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Carried(topic, base64.b64decode(payload)) for topic, payload in rows]


class Tap:
    """Sees every message of a broker, in order; empty ones, which only clear what is retained, are left out."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.carried: list[Carried] = []
        self._subscribed = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, "tap")
        self._client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._see
        self._client.connect(HOST, port)

    def __enter__(self) -> Self:
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _see(self, _client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        if message.payload:
            self.carried.append(Carried(message.topic, bytes(message.payload)))

    def publish(self, topic: str, payload: bytes) -> None:
        self._client.publish(topic, payload, 1).wait_for_publish(PATIENCE_S)

    def payloads(self, topic: str) -> list[bytes]:
        """Payloads on topics that end so, oldest first."""
        return [sent.payload for sent in list(self.carried) if sent.topic.endswith(f"/{topic}")]

    @property
    def version(self) -> int:
        """theta's, as the newest round frame's header says."""
        return max((int.from_bytes(frame[12:16], "little") for frame in self.payloads("round")), default=0)

    def reaches(self, version: int) -> None:
        """Wait for a round frame of this version."""
        until(lambda: self.version >= version, f"version {version}, not {self.version}")
