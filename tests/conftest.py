"""Fixtures that several folders of tests share."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.support.command import Meerkat, command
from tests.support.mosquitto import Mosquitto
from tests.support.proxy import Proxy

# A busy machine is no failure; pytest's own time-out ends what hangs.
settings.register_profile("meerkat", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("meerkat")


@pytest.fixture
def make_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Start a Mosquitto with more configuration lines; killed at the end."""
    made: list[Mosquitto] = []

    def make(*lines: str, anonymous: bool = True) -> Mosquitto:
        made.append(Mosquitto(tmp_path, *lines, anonymous=anonymous))
        return made[-1].start()

    yield make
    for broker in made:
        broker.kill()


@pytest.fixture
def mosquitto(make_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    """A running Mosquitto of this test's own, on a free loopback port."""
    return make_mosquitto()


@pytest.fixture
async def proxy(mosquitto: Mosquitto) -> AsyncIterator[Proxy]:
    """A fault-injecting proxy in front of `mosquitto`."""
    async with Proxy(mosquitto.port) as running:
        yield running


@pytest.fixture
def meerkat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Meerkat]:
    """The command line, in this process."""
    yield command(monkeypatch, capsys)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with two layers."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    from tests.model import tiny

    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("model") / "llama")
