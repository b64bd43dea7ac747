"""A node in a buffered run: it stops when it is too far behind, and keeps its update until that is heard."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.core.path import seeds_of
from meerkat_mq.wire.messages import Update
from tests.node.mini_server import RUN_ID, SLOT, Gate, MiniServer, node
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

BUFFERED: dict[str, Any] = {"mode": "buffered", "max_staleness": 2, "local_steps": 1000}
KEPT = Path("state/update")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


async def test_a_node_that_steps_too_long_ends_after_the_present_step_and_sends_that(
    tmp_path: Path, mosquitto: Mosquitto, gate: Gate
) -> None:
    async with MiniServer(mosquitto.config, **BUFFERED) as server, node(tmp_path, mosquitto.config):
        server.announce()
        gate.let_through(2)
        await gate.has_begun(3)
        server.close()
        server.close()
        server.announce(known=2)

        def one_more_step_and_done() -> bool:
            gate.let_through(1)
            return bool(server.updates)

        await until(one_more_step_and_done)
        assert 3 <= len(server.updates[0].scalars) < BUFFERED["local_steps"]
        assert server.updates[0].header.version == 0


async def test_who_ends_a_node_waits_for_no_more_than_a_step(tmp_path: Path, mosquitto: Mosquitto, gate: Gate) -> None:
    gate.open(pause_s=0.02)
    async with MiniServer(mosquitto.config, local_steps=1000) as server:
        async with node(tmp_path, mosquitto.config):
            server.announce()
            await gate.has_begun(2)
        assert gate.begun < 100
        await server.status("stopped")


async def send_one(folder: Path, mosquitto: Mosquitto, server: MiniServer, gate: Gate) -> Update:
    """An update, whose process then ends before it is heard."""
    gate.open()
    async with node(folder, mosquitto.config):
        server.announce()
        update = await server.update()
        assert (folder / KEPT).is_file()
    return update


async def test_an_update_outlives_its_process(tmp_path: Path, mosquitto: Mosquitto, gate: Gate) -> None:
    async with MiniServer(mosquitto.config, **BUFFERED) as server:
        update = await send_one(tmp_path, mosquitto, server, gate)
        begun = gate.begun
        async with node(tmp_path, mosquitto.config):
            assert await server.update(2) == replace(update, seeds=seeds_of(RUN_ID, 0, 0, len(update.scalars)))
            assert gate.begun == begun
            server.announce(heard=frozenset({SLOT}))
            await until(lambda: not (tmp_path / KEPT).exists())
        assert server.statuses[-1].boot != update.boot


async def test_an_update_that_is_too_old_by_now_is_forgotten(tmp_path: Path, mosquitto: Mosquitto, gate: Gate) -> None:
    async with MiniServer(mosquitto.config, **BUFFERED) as server:
        update = await send_one(tmp_path, mosquitto, server, gate)
        for _ in range(3):
            server.close()
        server.announce(known=3)
        async with node(tmp_path, mosquitto.config):
            again = await server.update(2)
            assert (again.header.version, again.boot) == (3, server.statuses[-1].boot)
        assert again.boot != update.boot


async def test_an_update_of_another_run_is_left_alone(tmp_path: Path, mosquitto: Mosquitto, gate: Gate) -> None:
    async with MiniServer(mosquitto.config, **BUFFERED) as server:
        await send_one(tmp_path, mosquitto, server, gate)
    async with MiniServer(mosquitto.config, **BUFFERED, run="1" * 32) as server, node(tmp_path, mosquitto.config):
        server.announce(asked=False)
        await server.status("online")
        assert not (tmp_path / KEPT).exists()
        assert server.updates == []


async def test_a_round_that_waits_needs_no_disk(tmp_path: Path, mosquitto: Mosquitto, gate: Gate) -> None:
    gate.open()
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config):
        server.announce()
        await server.update()
        assert not (tmp_path / KEPT).exists()
        assert server.updates[0].header.version == 0
