"""Brokers that are configured for a network."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.broker.guarded import Guarded
from tests.server.federation import Federation


@pytest.fixture
def guarded(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Guarded]:
    """Mosquitto, or what --broker names."""
    guarded = Guarded(tmp_path, request.config.getoption("--broker"))
    try:
        guarded.broker.start()
        yield guarded
    finally:
        guarded.broker.kill()


@pytest.fixture
async def federation(guarded: Guarded, tmp_path: Path) -> AsyncIterator[Federation]:
    async with Federation(tmp_path, guarded.way("observer")) as running:
        yield running
