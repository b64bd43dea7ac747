"""The federation of these tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.server.federation import Federation
from tests.support.mosquitto import Mosquitto


@pytest.fixture
async def federation(mosquitto: Mosquitto, tmp_path: Path) -> AsyncIterator[Federation]:
    """Real processes on a Mosquitto of this test's own."""
    async with Federation(tmp_path, mosquitto.config) as running:
        yield running
