"""A duty-cycled node: it wakes, steps, sends, sleeps, and nobody takes it for dead."""

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest

from meerkat_mq.config import ScheduleConfig
from meerkat_mq.core.path import Entry
from meerkat_mq.mqtt import Session
from meerkat_mq.node import duty
from meerkat_mq.node.work import Work
from meerkat_mq.rounds import node as rounds_node
from meerkat_mq.runtime import blobs, jobs
from meerkat_mq.runtime.node import NodeDriver
from tests.node.mini_server import NODE, SLOT, Gate, MiniServer, node
from tests.server.federation import Federation
from tests.support import waiting
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

BRIEFLY: dict[str, Any] = {"schedule": {"every_s": 1.0, "awake_s": 1.0}}
LONG: dict[str, Any] = {"schedule": {"every_s": 3600.0, "awake_s": 3600.0}}
KEPT = Path("state/update")


def words(server: MiniServer) -> list[str]:
    """The states that the node said, each once in a row."""
    said = [status.status for status in server.statuses]
    return [word for number, word in enumerate(said) if said[number - 1 : number] != [word]]


async def test_a_node_sleeps_as_soon_as_it_is_heard(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config, **LONG):
        server.announce()
        await server.update()
        assert words(server)[-1] == "online"
        server.announce(heard=frozenset({SLOT}))
        asleep = await server.status("asleep")
        assert asleep.wakes_in_s is not None
        assert 3200 < asleep.wakes_in_s <= 3600


class Connections:
    """In the place of a driver, and of a session, which sends what waits, and its farewell, once it is cancelled.

    Args:
        answers: whether the broker answers each CONNECT; as many as there may be connections.

    Attributes:
        log: what happened.
    """

    def __init__(self, *answers: bool) -> None:
        self.log: list[str] = []
        self._answers = iter(answers)

    async def run(self) -> None:
        self.log.append("connected" if next(self._answers) else "connecting")
        try:
            await asyncio.Event().wait()
        finally:
            self.log.append("farewell")

    async def part(self, within_s: float) -> None:
        self.log.append("parted")

    def cycle(self, every_s: float) -> duty.DutyCycle:
        """Awake until it is connected."""
        schedule = ScheduleConfig(every_s=every_s, awake_s=1.0)
        return duty.DutyCycle(schedule, cast("Session", self), cast("NodeDriver", self))

    def may_sleep(self, late: bool) -> bool:
        return self.log[-1:] == ["connected"]

    def wake(self) -> None:
        self.log.append("awake")

    def sleep(self) -> None:
        self.log.append("asleep")


async def test_a_node_is_asleep_before_its_connection_says_so() -> None:
    session = Connections(True)
    running = asyncio.create_task(session.cycle(3600.0).run())
    await until(lambda: "farewell" in session.log)
    running.cancel()
    await asyncio.wait([running])
    assert session.log == ["awake", "connected", "asleep", "farewell", "parted"]


async def test_a_node_that_stops_while_it_connects_says_so_on_this_connection() -> None:
    session = Connections(True, False)
    running = asyncio.create_task(session.cycle(1.0).run())
    await until(lambda: "connecting" in session.log)
    running.cancel()
    await asyncio.wait([running])
    assert session.log[4:] == ["awake", "connecting", "farewell"]


async def test_who_was_heard_from_an_earlier_waking_steps_before_it_sleeps(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    async with MiniServer(mosquitto.config, mode="buffered", max_staleness=2) as server:
        server.announce()
        async with node(tmp_path, mosquitto.config, **LONG):
            await server.update()
        server.close()
        server.announce(heard_before=((SLOT, 1),))
        async with node(tmp_path, mosquitto.config, **LONG):
            await server.update_from(1)
            assert "asleep" not in words(server)
            server.announce(heard=frozenset({SLOT}))
            await server.status("asleep")


async def test_who_was_heard_stays_awake_until_the_entries_came_that_it_asked_for(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_node, "RETRY_S", 0.1)
    async with (
        MiniServer(mosquitto.config, mode="buffered", max_staleness=2) as server,
        node(tmp_path, mosquitto.config, **LONG),
    ):
        server.announce()
        await server.update()
        server.offers_entries = False
        server.close()
        server.announce(known=0, heard_before=((SLOT, 1),))

        def asks_on() -> bool:
            return [want.entries_from for want in server.wants].count(0) >= 5

        await until(lambda: asks_on() or words(server)[-1] == "asleep", within_s=30)
        await until(lambda: not (tmp_path / KEPT).exists())
        assert words(server)[-1] == "online"
        server.offers_entries = True
        await server.update_from(1)
        assert "asleep" not in words(server)


@pytest.mark.parametrize("round_", [{"heard": frozenset({SLOT})}, {"asked": False}])
async def test_a_node_of_which_nothing_is_asked_sleeps_soon(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch, round_: dict[str, Any]
) -> None:
    monkeypatch.setattr(jobs, "GRACE_S", 0.2)
    async with MiniServer(mosquitto.config) as server:
        server.close()
        server.announce(**round_)
        async with node(tmp_path, mosquitto.config, **LONG):
            assert (await server.status("asleep")).version == 1
        assert server.updates == []


async def test_a_node_that_never_catches_up_sleeps_nevertheless(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MiniServer(mosquitto.config) as server:

        async def always_behind() -> None:
            while True:
                server.close()
                server.announce(known=16)  # all that lacks
                await asyncio.sleep(0.02)

        apply = Work.apply

        def slowly(work: Work, entries: tuple[Entry, ...], blob: bytes) -> tuple[bytes, ...]:
            time.sleep(0.1)
            return apply(work, entries, blob)

        monkeypatch.setattr(Work, "apply", slowly)
        closing = asyncio.create_task(always_behind())
        async with node(tmp_path, mosquitto.config, schedule={"every_s": 3600.0, "awake_s": 1.0}):
            await server.status("asleep")
        closing.cancel()


async def test_a_node_comes_back_again_and_again(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config, **BRIEFLY):
        for version in range(3):
            server.announce()
            await server.update_from(version)
            server.announce(heard=frozenset({SLOT}))
            await server.status("asleep")
            server.close()
        assert words(server).count("asleep") >= 3
        assert set(words(server)) <= {"starting", "online", "asleep"}
        assert len({status.boot for status in server.statuses}) == 1


async def test_a_node_goes_to_sleep_when_its_time_is_up_and_its_steps_go_on(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config, **BRIEFLY):
        server.announce()
        await gate.has_begun(1)
        await server.status("asleep")
        assert server.updates == []
        gate.open()
        await until((tmp_path / KEPT).exists, within_s=30)
        update = await server.update()
        assert update.header.version == 0
        assert gate.begun == 1
        assert "lost" not in words(server)


async def test_what_was_computed_offline_outlives_a_kill(federation: Federation) -> None:
    mains = federation.folder / "mains"
    settings: dict[str, Any] = {"limits": {"allow": ["test", "-e", str(mains)], "check_s": 0.1}}
    async with MiniServer(federation.broker, mode="buffered", max_staleness=2) as server:
        server.announce()
        awake_s = 2.0 * waiting.patience  # enough to hear of the round
        sleepy = federation.node(NODE, schedule={"every_s": 3600.0, "awake_s": awake_s}, **settings)
        asleep = await server.status("asleep")
        mains.touch()
        await until((federation.folder / NODE / "update").exists, within_s=30)
        sleepy.kill()
        assert server.updates == []
        mains.unlink()
        federation.node(NODE, **settings)
        assert (await server.update()).boot == asleep.boot


async def test_who_stops_a_sleeping_node_finds_it_stopped(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with MiniServer(mosquitto.config) as server:
        async with node(tmp_path, mosquitto.config, schedule={"every_s": 3600.0, "awake_s": 1.0}):
            asleep = await server.status("asleep")
            assert asleep.wakes_in_s is not None
            assert 3200 < asleep.wakes_in_s <= 3600
        await server.status("stopped")
        assert words(server)[-2:] == ["asleep", "stopped"]


async def test_who_stops_a_waking_node_finds_it_stopped(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with MiniServer(mosquitto.config) as server:
        async with node(tmp_path, mosquitto.config, **LONG):
            await server.status("online")
        await server.status("stopped")
        assert "asleep" not in words(server)


async def test_a_sleeping_node_ends_without_a_broker_too(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty, "PARTING_S", 0.2)
    async with MiniServer(mosquitto.config) as server:
        async with node(tmp_path, mosquitto.config, schedule={"every_s": 3600.0, "awake_s": 1.0}) as task:
            await server.status("asleep")
            mosquitto.kill()
        assert task.cancelled()


async def test_a_node_stays_awake_while_it_catches_up(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "PATIENCE_S", 1.2)  # longer than awake_s
    async with MiniServer(mosquitto.config, values=True) as server:
        server.close(server.mask.g_p)
        server.offers_chunks = False
        server.announce(asked=False)
        async with node(tmp_path, mosquitto.config, **BRIEFLY):
            await until(lambda: len(server.asked_chunks) >= 2, within_s=30)
            assert words(server)[-1] == "online"
            server.offers_chunks = True
            assert (await server.status("asleep")).version == 1


async def test_a_node_stays_awake_while_its_mask_comes(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with MiniServer(mosquitto.config, weights=100_000, retains_mask=False) as server:
        server.offers_chunks = False
        server.announce(asked=False)
        chunks = server.mask_chunks
        assert len(chunks) >= 5
        async with node(tmp_path, mosquitto.config, **BRIEFLY):
            await server.status("starting")
            for chunk in chunks:
                await asyncio.sleep(0.4)  # slower than awake_s, all together
                assert words(server) == ["starting"]
                server.say(chunk)
            await server.status("online")


async def test_a_federation_with_a_node_that_sleeps_finishes(federation: Federation) -> None:
    rounds = {"count": 4, "min_nodes": 2, "quorum": 1.0, "deadline_s": 60.0, "grace_s": 5.0}
    server = federation.server("--once", rounds=rounds)
    awake, sleepy = federation.node("awake"), federation.node("sleepy", schedule={"every_s": 1.0, "awake_s": 1.0})
    ends = [await node.says("finished") for node in (awake, sleepy)]
    assert ends[0]["digest"] == ends[1]["digest"]
    assert await server.ended() == 0
    assert sleepy.said("asleep")
    assert not server.said("died")
    sleepy.stop()
    assert await sleepy.ended() == 0
    await federation.eye.status("sleepy", "stopped")
