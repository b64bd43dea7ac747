"""Fixtures that several folders of tests share."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub, which would wait for a hub

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.support import waiting
from tests.support.broker import Broker
from tests.support.command import Meerkat, command
from tests.support.mosquitto import Mosquitto
from tests.support.nats import Nats
from tests.support.proxy import Proxy
from tests.support.rabbitmq import RabbitMQ

SHARED = Path(os.environ.get("MEERKAT_SHARED", Path(__file__).parents[2] / "shared"))

# A busy machine is no failure; pytest's own time-out ends what hangs.
settings.register_profile("meerkat", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("meerkat")


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ("mosquitto", "rabbitmq", "nats")
    parser.addoption("--broker", choices=choices, default="mosquitto", help="on another one, only tests that use it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--broker") == "rabbitmq":
        waiting.patience = 3.0  # it takes ten seconds to start


def _least_first(item: pytest.Item) -> float:
    """A test that may take long says so by a time-out of its own."""
    mark = item.get_closest_marker("timeout")
    return -float(mark.args[0]) if mark and mark.args else 0.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long comes first: else one worker ends alone. On another broker than Mosquitto: only what uses it."""
    items.sort(key=_least_first)
    broker = config.getoption("--broker")
    if broker != "mosquitto":
        used = [item for item in items if {"make_mosquitto", "guarded"} & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=[item for item in items if item not in used])
        items[:] = used
    for item in items:
        for mark in item.iter_markers("not_on"):
            if broker in mark.kwargs:
                item.add_marker(pytest.mark.skip(reason=f"{broker}: {mark.kwargs[broker]}"))


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """RabbitMQ takes ten seconds to start: one for all tests of a process."""
    broker = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    yield broker
    broker.close()


@pytest.fixture
def make_mosquitto(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Broker]]:
    """Start a Mosquitto with more configuration lines, or the broker that --broker names; killed at the end."""
    made: list[Broker] = []
    chosen = request.config.getoption("--broker")

    def make(*lines: str, anonymous: bool = True) -> Broker:
        if chosen != "mosquitto" and (lines or not anonymous):
            pytest.skip(f"{chosen}: the test gives Mosquitto settings of its own (passwords, TLS)")
        if chosen == "rabbitmq":
            shared: RabbitMQ = request.getfixturevalue("rabbitmq")
            return shared.fresh()
        made.append(Nats(tmp_path) if chosen == "nats" else Mosquitto(tmp_path, *lines, anonymous=anonymous))
        return made[-1].start()

    yield make
    for broker in made:
        broker.kill()


@pytest.fixture
def mosquitto(make_mosquitto: Callable[..., Broker]) -> Broker:
    """A running Mosquitto (or what --broker names) of this test's own, on a free loopback port."""
    return make_mosquitto()


@pytest.fixture
async def proxy(mosquitto: Broker) -> AsyncIterator[Proxy]:
    """A fault-injecting proxy in front of `mosquitto`."""
    async with Proxy(mosquitto.port) as running:
        yield running


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Whatever a test does to logging ends with it: others read what is logged."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def meerkat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Meerkat:
    """The command line, in this process."""
    return command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with two layers."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    from tests.engines import tiny

    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} does not exist: set MEERKAT_SHARED to the folder of real models and data")
    return SHARED
