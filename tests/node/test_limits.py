"""What a node leaves to others."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import LimitsConfig
from meerkat_mq.errors import ConfigError
from meerkat_mq.node import limits
from meerkat_mq.node.limits import Allowance, Pace
from tests.node.mini_server import MiniServer, node
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until


class Clock:
    """Time that passes where somebody works or rests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.rests: list[float] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.stop = threading.Event()
        monkeypatch.setattr(self.stop, "wait", self._rest)

    def _rest(self, seconds: float) -> None:
        self.now += seconds
        self.rests.append(seconds)


def test_a_node_rests_after_each_step_as_its_share_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(0.25)
    for idle, rested in ((0.0, [0, 6, 6]), (1.0, [5, 6, 6]), (100.0, [0, 6, 6])):
        clock.now += idle
        clock.rests.clear()
        pace.begin(3, clock.stop)
        for _ in range(3):
            clock.now += 2.0
            assert not pace.ends(clock.stop)
        assert clock.rests == pytest.approx(rested)
    clock.stop.set()
    pace.begin(3, clock.stop)
    assert pace.ends(clock.stop)


def test_a_whole_share_knows_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(1.0)
    pace.begin(2, clock.stop)
    clock.now += 5.0
    assert not pace.ends(clock.stop)
    assert sum(clock.rests) == 0


def test_the_end_of_a_run_ends_a_rest() -> None:
    pace, stop = Pace(1e-9), threading.Event()
    pace.begin(2, stop)
    threading.Timer(0.05, stop.set).start()
    assert pace.ends(stop)


async def test_the_command_says_when(tmp_path: Path) -> None:
    file = tmp_path / "charging"
    allowance = Allowance(LimitsConfig(allow=("test", "-e", str(file)), check_s=0.01))
    assert [await allowance.given(), await allowance.given()] == [False, False]
    file.touch()
    assert await allowance.given()
    assert await Allowance(LimitsConfig()).given()


async def test_a_command_without_an_answer_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ANSWER_S", 0.3)
    file = tmp_path / "pid"
    allowance = Allowance(LimitsConfig(allow=("sh", "-c", f"sleep 100 & echo $! > {file}; wait")))
    assert not await allowance.given()
    child = int(file.read_text())

    def gone() -> bool:
        try:
            return "(sleep) Z" in Path(f"/proc/{child}/stat").read_text()
        except OSError:
            return True

    await until(gone)


async def test_a_command_that_went_away_says_no(tmp_path: Path) -> None:
    script = tmp_path / "allow"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    allowance = Allowance(LimitsConfig(allow=(str(script),), check_s=0.01))
    assert await allowance.given()
    script.unlink()
    assert not await allowance.given()


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"limits\.allow: there is no command 'on-mains'; give a command on the PATH"):
        Allowance(LimitsConfig(allow=("on-mains",)))


async def test_a_node_that_may_not_step_follows_the_run_and_steps_once_it_may(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    file = tmp_path / "charging"
    allow: dict[str, Any] = {"allow": ["test", "-e", str(file)], "check_s": 0.05}
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config, limits=allow):
        for version in (1, 2, 3):
            server.announce()
            server.close()
            server.announce()
            await server.stands_at(version)
        assert server.updates == []
        file.touch()
        assert (await server.update()).header.version == 3
