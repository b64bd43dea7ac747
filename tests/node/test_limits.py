"""What a node leaves to others."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import LimitsConfig
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import ConfigError
from meerkat_mq.node import limits
from meerkat_mq.node.limits import Allowance, NodeCompute, Pace
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.loop import Ports
from tests.node.mini_server import Gate, MiniServer, node
from tests.runtime.one_node import PaperModel, descriptor
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

ORDER = StartSteps(version=0, steps=1, lane=0, eps=0.1)


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
        assert pace.begin(3, clock.stop)
        for _ in range(3):
            clock.now += 2.0
            assert not pace.ends(clock.stop)
        assert clock.rests == pytest.approx(rested)
    clock.stop.set()
    assert not pace.begin(3, clock.stop)
    assert pace.ends(clock.stop)


def test_a_rest_that_was_cut_short_does_not_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace(0.25)
    pace.begin(1, clock.stop)
    clock.now += 2.0
    pace.ends(clock.stop)

    def stopped_after_3_s(seconds: float) -> None:
        clock.now += 3.0
        clock.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(clock.stop, "wait", stopped_after_3_s)
        assert not pace.begin(1, clock.stop)
    clock.stop.clear()
    clock.rests.clear()
    assert pace.begin(1, clock.stop)
    assert clock.rests == pytest.approx([3])


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


async def test_a_node_whose_rest_is_cut_short_makes_no_step(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begin, orders = Gate(monkeypatch), Pace.begin, list[int]()

    def counted(pace: Pace, steps: int, stop: threading.Event) -> bool:
        orders.append(steps)
        return begin(pace, steps, stop)

    monkeypatch.setattr(Pace, "begin", counted)
    gate.open(pause_s=0.1)
    async with MiniServer(mosquitto.config) as server:
        async with node(tmp_path, mosquitto.config, limits={"cpu_share": 1e-6}):
            server.announce()
            await server.update()
            for version in (1, 2):
                server.close()
                server.announce()
                await server.stands_at(version)
                await until(lambda: len(orders) == server.header.version + 1, within_s=30)
        assert gate.begun == len(server.updates) == 1
    assert json.loads((tmp_path / "state/steps.json").read_text())["steps"] == 1


async def given(allowance: Allowance, *, moved_on: bool = False) -> bool:
    event = asyncio.Event()
    if moved_on:
        event.set()
    return await allowance.given(event, asyncio.Event())


async def test_the_command_says_when(tmp_path: Path) -> None:
    file = tmp_path / "charging"
    allowance = Allowance(LimitsConfig(allow=("test", "-e", str(file)), check_s=0.01))
    assert [await given(allowance), await given(allowance)] == [False, False]
    file.touch()
    assert await given(allowance)
    assert await given(Allowance(LimitsConfig()), moved_on=True)


async def test_who_moves_on_does_not_wait_for_the_next_asking(tmp_path: Path) -> None:
    file = tmp_path / "asked"
    allowance = Allowance(LimitsConfig(allow=("sh", "-c", f"echo >> {file}; exit 1"), check_s=3600.0))
    assert not await given(allowance)
    assert not await given(allowance, moved_on=True)
    assert file.read_text() == "\n"


async def test_a_command_without_an_answer_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ANSWER_S", 0.3)
    file = tmp_path / "pid"
    allowance = Allowance(LimitsConfig(allow=("sh", "-c", f"sleep 100 & echo $! > {file}; wait")))
    assert not await given(allowance)
    child = int(file.read_text())

    def gone() -> bool:
        try:
            return "(sleep) Z" in Path(f"/proc/{child}/stat").read_text()
        except OSError:
            return True

    await until(gone)


async def test_a_run_that_is_over_does_not_hold_up_the_next_one_by_its_question(tmp_path: Path) -> None:
    file, told = tmp_path / "asked", asyncio.Queue[str]()
    once = f"test -e {file} && exit 0; echo $$ > {file}; sleep 100"
    model = PaperModel(descriptor(toy_mask(10)), toy_mask(10))
    with ThreadPoolExecutor(1) as worker:
        compute = NodeCompute(Ports(), worker, Allowance(LimitsConfig(allow=("sh", "-c", once), check_s=3600.0)))
        running = asyncio.create_task(compute.run_steps())
        for run in ("first", "second"):
            compute.steps(model, ORDER, lambda made, run=run: told.put_nowait(f"{run} {made is None}"), print)  # type: ignore[misc]
            if run == "first":
                await until(file.exists)
                compute.stop_steps()
        async with asyncio.timeout(5):
            assert [await told.get(), await told.get()] == ["first True", "second False"]
        running.cancel()


async def test_a_command_that_went_away_says_no(tmp_path: Path) -> None:
    script = tmp_path / "allow"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    allowance = Allowance(LimitsConfig(allow=(str(script),), check_s=0.01))
    assert await given(allowance)
    script.unlink()
    assert not await given(allowance)


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


@pytest.mark.parametrize("run", [{}, {"mode": "buffered", "max_staleness": 5}])
async def test_a_node_follows_the_run_while_it_waits_to_ask_again(
    tmp_path: Path, mosquitto: Mosquitto, run: dict[str, Any]
) -> None:
    file = tmp_path / "asked"
    allow: dict[str, Any] = {"allow": ["sh", "-c", f"echo >> {file}; exit 1"], "check_s": 3600.0}
    with capture_logs() as said:
        async with MiniServer(mosquitto.config, **run) as server, node(tmp_path, mosquitto.config, limits=allow):
            server.announce()
            await until(lambda: "local steps not allowed" in [line["event"] for line in said], within_s=30)
            for version in (1, 2, 3):
                server.close()
                server.announce()
                await server.stands_at(version)
            assert server.updates == []
            assert file.read_text() == "\n"
