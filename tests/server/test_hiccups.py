"""Server and node alike: what worked before is tried again, also by a process that starts in the middle of a fault."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.mqtt.test_what_worked_before import FAULTS, Fault, Hiccups
from tests.server.federation import PACE, Federation, Service, all_end
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.timeout(150)

ROUNDS = PACE | {"deadline_s": 5.0}


@pytest.fixture
def hiccups(tmp_path: Path, make_mosquitto: Callable[..., Mosquitto]) -> Hiccups:
    return Hiccups(tmp_path, make_mosquitto)


@pytest.fixture
async def federation(hiccups: Hiccups, tmp_path: Path) -> AsyncIterator[Federation]:
    async with Federation(tmp_path, hiccups.config) as running:
        yield running


def way(hiccups: Hiccups) -> dict[str, str]:
    return {key: str(value) for key, value in hiccups.config.model_dump(exclude_unset=True).items()}


async def refused(*services: Service, words: str) -> None:
    """Wait until each has said this one more time."""
    await asyncio.gather(*(one.says("cannot connect", times=len(one.said("cannot connect")) + 1) for one in services))
    assert all(words in one.said("cannot connect")[-1]["problem"] for one in services)


async def goes_on(server: Service) -> None:
    await server.says("round closed", times=len(server.said("round closed")) + 3)


async def test_a_fleet_outlives_refusals_that_pass(federation: Federation, hiccups: Hiccups) -> None:
    node = federation.node("node-0", broker=way(hiccups))
    server = federation.server(rounds=ROUNDS, broker=way(hiccups))
    await goes_on(server)
    for fault, words in (
        (hiccups.empty_passwords, "refuses user 'node'"),
        (hiccups.another_server, "its certificate does not verify"),
    ):
        heal = fault()
        await refused(node, server, words=words)
        heal()
        await goes_on(server)
    server.stop()
    node.stop()
    assert await all_end(server, node) == [0, 0]
    assert (server.plain, node.plain) == ([], [])


@pytest.mark.parametrize("fault", [Hiccups.no_ca, Hiccups.certificate_before_key])
async def test_a_restart_in_the_middle_of_one_is_no_first_start(
    federation: Federation, hiccups: Hiccups, fault: Fault
) -> None:
    words = FAULTS[fault][1]
    schedule = {"every_s": 1.0, "awake_s": 1.0}

    def start() -> list[Service]:
        return [
            federation.server(rounds=ROUNDS, broker=way(hiccups)),
            federation.node("node-0", broker=way(hiccups)),
            federation.node("node-1", broker=way(hiccups), schedule=schedule),
        ]

    services = start()
    await goes_on(services[0])
    await services[2].says("asleep")
    heal = fault(hiccups)
    await refused(*services, words=words)
    for service in services:
        service.kill()
    services = start()
    await refused(*services, words=words)
    await federation.node("node-2", broker=way(hiccups)).failed(2, words)
    heal()
    await goes_on(services[0])
    await services[2].says("connected")
    for service in services:
        service.stop()
    assert await all_end(*services) == [0, 0, 0]
