"""What lies in broker/ and nodes/ fits the code, and itself."""

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from meerkat_mq.broker.certs import write_certificates
from meerkat_mq.config import NodeConfig, ServerConfig, load_config
from meerkat_mq.wire.topics import SERVER_NAME

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "broker/compose"
UNITS = sorted((ROOT / "nodes").glob("*.service"))
TOMLS = sorted([*(ROOT / "nodes").glob("*.toml"), *COMPOSE.rglob("*.toml")])


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return services


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Places inside, and what they hold."""
    return {inside: outside for outside, inside, *_ in (volume.split(":") for volume in service["volumes"])}


def test_there_are_examples() -> None:
    assert {"gateway.toml", "duty-cycled.toml", "gpu-server.toml", "federation.toml"} <= {path.name for path in TOMLS}


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_example_is_valid(path: Path) -> None:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    broker = (load_config(path, NodeConfig) if "id" in table else load_config(path, ServerConfig)).broker
    assert broker.tls
    assert {broker.ca_file, broker.cert_file, broker.key_file} == {
        Path("/etc/meerkat/tls") / name for name in ("ca.pem", "cert.pem", "key.pem")
    }


def test_the_composed_federation_is_one(services: dict[str, Any], tmp_path: Path) -> None:
    """Each service finds its files, with the certificate that the README's command makes for it."""
    *_, last = write_certificates(tmp_path, federation="field", hosts=["broker"], nodes=["node-0", "node-1"])
    assert last.folder == tmp_path / "nodes/node-1"
    for name, service in services.items():
        for outside in mounts(service).values():
            if outside.startswith("./certificates/"):
                assert (tmp_path / outside.removeprefix("./certificates/") / "cert.pem").exists(), name
            elif not outside.startswith("./state/"):
                assert (COMPOSE / outside).exists(), name
    federation = load_config(COMPOSE / "federation.toml", ServerConfig)
    assert federation.federation == "field"
    for node in ("node-0", "node-1"):
        found = mounts(services[node])
        config = load_config(COMPOSE / found["/etc/meerkat/node.toml"], NodeConfig)
        assert (config.id, config.federation, config.broker) == (node, federation.federation, federation.broker)
        assert found["/etc/meerkat/tls"].endswith(f"/nodes/{node}")
        assert str(config.data) in found
    assert (federation.broker.host, federation.broker.port) == ("broker", 8883)
    assert mounts(services["broker"])["/etc/mosquitto/mosquitto.conf"] == "../mosquitto-tls.conf"


def test_containers_have_no_rights(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["user"].startswith("${MEERKAT_USER:?")
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_image_is_made_of_files_that_there_are_and_runs_as_nobody() -> None:
    text = (ROOT / "nodes/Containerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for name in line.split()]
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / name).exists() for name in copied)
    assert "-c constraints.txt" in text
    assert text.index("\nUSER meerkat\n") < text.index("\nENTRYPOINT ")


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_has_few_rights(unit: Path) -> None:
    lines = unit.read_text(encoding="utf-8").splitlines()
    for rule in ("CapabilityBoundingSet=", "NoNewPrivileges=yes", "PrivateUsers=yes", "ProtectSystem=strict"):
        assert rule in lines
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    command = [program, "security", "--offline=true", "--threshold=15", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze is too old")
    assert done.returncode == 0, [*done.stdout.splitlines()[-1:], done.stderr]


def test_a_node_that_ended_is_started_again_after_a_while() -> None:
    """Whatever it ended with: a cloned card must not keep the healthy device down for good."""
    timer = configparser.ConfigParser()
    timer.optionxform = str  # type: ignore[assignment,method-assign]
    timer.read(ROOT / "nodes/meerkat-node.timer", encoding="utf-8")
    assert (ROOT / "nodes" / timer["Timer"]["Unit"]).exists()
    assert timer["Timer"]["OnUnitInactiveSec"] == "15min"
    assert timer["Install"]["WantedBy"] == "timers.target"
    readme = (ROOT / "nodes/README.md").read_text(encoding="utf-8")
    assert "systemctl enable --now meerkat-node.service meerkat-node.timer" in readme


def test_the_servers_user_is_the_same_everywhere() -> None:
    for page in ("docs/secure-a-federation.md", "broker/README.md"):
        named = set(re.findall(r"`(meerkat\.[a-z]+)`", (ROOT / page).read_text(encoding="utf-8")))
        assert named <= {SERVER_NAME}
