"""Attack H23: a password that is read by whoever reads errors, logs or state folders."""

import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from meerkat_mq.config import BrokerConfig, NodeConfig, check_config, load_config
from meerkat_mq.errors import BrokerError, ConfigError, shown
from meerkat_mq.observe.logs import configure_logs
from tests.server.federation import Federation, all_end
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto
from tests.support.peer import peer

NODE = 'id = "a"\nfederation = "f"\ndata = "d"\nstate_dir = "s"\n'
URLS = (
    "mqtt://user:s3cret@host",
    "mqtts://user:s3cret@host:8883/x",
    "mqtt://user:s3://cret@host",
    "mqtt://user:s3 cret@host",
    "mqtt://user:s3cret%40host",
    "mqtt://user:s3cret",
    "mqtt://user:s3:/cret",
    "user:s3cret",
    "user:s3cret@host",
    "mqtt://user:" + "s3cret" * 40 + "@" + "host" * 20,
)


def hides(text: object) -> None:
    assert not any(part in str(text) for part in ("s3", "cret")), text


@pytest.mark.parametrize("url", URLS)
def test_no_error_of_a_configuration_shows_a_password(tmp_path: Path, url: str) -> None:
    quoted = json.dumps(url)
    for text in (
        f"{NODE}[broker]\nurl = {quoted}\n",
        f"{NODE}[broker]\nurl = [{quoted}]\n",
        f"{NODE}[[broker]]\nurl = {quoted}\n",
        f"{NODE}[[broker]]\nusername = 'user'\npassword = 's3cret'\n",
        *([f"{NODE}broker = {quoted}\n", f"{NODE}broker = [{quoted}]\n"] if "://" in url else []),
    ):
        (tmp_path / "node.toml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "node.toml", NodeConfig)
        hides(caught.value)


@pytest.mark.parametrize("url", ["mqtt://user:s3cret@host", "mqtts://user:s3@cret@host:8883", "mqtt://u:s3cret%40h"])
def test_no_error_and_no_value_in_one_shows_a_url_with_a_password(url: str) -> None:
    for part in range(3):
        hides(BrokerError(*(f"it was {url}, really" if part == at else "words" for at in range(3))))
    hides(shown({"of": [url * 2]}))
    with pytest.raises(ConfigError) as caught:
        check_config({"id": "a", url: 1}, NodeConfig, where="x")
    hides(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["URL"],
        ["status", "URL"],
        ["node", "--config", "URL"],
        ["node", "URL", "--config", "x"],
        ["server", "--URL"],
        ["certs", "pki", "--broker", "URL"],
        ["certs", "pki", "--federation", "URL"],
        ["certs", "pki", "--node", "URL"],
        ["init", "new", "--model", "m", "--task", "t", "--data", "d", "--broker", "URL"],
        ["export", "--model", "URL", "--difference", "URL", "--out", "x"],
        ["chaos", "URL"],
        ["sweep", "URL", "--out", "x"],
    ],
)
def test_no_command_shows_a_url_with_a_password(
    meerkat: Meerkat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = meerkat(*(argument.replace("URL", "mqtt://user:s3cret@host") for argument in arguments))
    assert done.code != 0
    hides(done)


@pytest.mark.parametrize("as_json", [True, False])
def test_no_log_line_shows_a_url_with_a_password(as_json: bool) -> None:
    url, text = "mqtt://user:s3cret@host", io.StringIO()
    configure_logs(as_json=as_json, file=text)
    log = structlog.get_logger().bind(broker=url)
    log.warning(f"about {url}", problem=f"cannot reach {url}: refused", all=[url, {"url": url}], times=3)
    try:
        raise ValueError(url)
    except ValueError:
        log.exception("library failed")
    hides(text.getvalue())
    assert "library failed" in text.getvalue()
    if as_json:
        assert json.loads(text.getvalue().splitlines()[0])["all"] == ["mqtt://***@host", {"url": "mqtt://***@host"}]


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"url": "mqtt://0.0.0.0:PORT", "username": "a", "password": "s3cret"}, True),
        ({"url": "mqtt://0.0.0.0:PORT", "username": "a"}, False),
        ({"url": "mqtt://127.0.0.1:PORT", "username": "a", "password": "s3cret"}, False),
        ({"url": "mqtt://localhost:PORT", "username": "a", "password": "s3cret"}, False),
    ],
)
async def test_a_password_over_plain_mqtt_to_another_host_is_warned_of(
    mosquitto: Mosquitto, settings: dict[str, Any], warns: bool
) -> None:
    """0.0.0.0 leads here, but is no loopback address: it stands for another host."""
    broker = BrokerConfig(**settings | {"url": settings["url"].replace("PORT", str(mosquitto.port))})
    with capture_logs() as logs:
        async with peer(broker, "a"):
            pass
    assert [entry["log_level"] for entry in logs if "password" in entry["event"]] == ["warning"] * warns
    hides(logs)


async def test_what_services_leave_in_their_state_folders_is_their_owners_alone(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        async with Federation(tmp_path, mosquitto.config) as federation:
            nodes = [federation.node(name, exit_when_finished=True) for name in ("a", "b")]
            server = federation.server("--once", rounds={"count": 3, "min_nodes": 2})
            assert await all_end(server, *nodes) == [0, 0, 0]
            folders = [service.config.with_suffix("") for service in (server, *nodes)]
    finally:
        os.umask(before)
    for folder in folders:
        left = [folder, *folder.rglob("*")]
        assert len(left) > 2
        assert {oct(stat.S_IMODE(path.stat().st_mode) & 0o077) for path in left} == {"0o0"}
