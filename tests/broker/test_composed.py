"""`broker/compose/` without its containers: each service's own command, on its own files."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from meerkat_mq.broker.certs import write_certificates
from tests.support.broker import HOST
from tests.support.mosquitto import ShippedMosquitto
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "broker/compose"

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.not_on(nats="its files are Mosquitto's", rabbitmq="its files are Mosquitto's"),
]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ShippedMosquitto]:
    list(write_certificates(tmp_path / "certificates", federation="field", hosts=[HOST], nodes=["node-0", "node-1"]))
    words = {
        "listener 8883": "listener {port} {host}",
        "/etc/mosquitto/meerkat": str(tmp_path / "certificates/broker"),
        "user mosquitto": "user {user}",
    }
    running = ShippedMosquitto(tmp_path, ROOT / "broker/mosquitto-tls.conf", words)
    try:
        yield running.start()  # type: ignore[misc]
    finally:
        running.kill()


def outside(folder: Path, service: dict[str, Any], text: str, port: int) -> str:
    """A text from inside a container, with the paths that its mounts have here."""
    text = text.replace("mqtts://broker:8883", f"mqtts://{HOST}:{port}")
    for volume in service["volumes"]:
        here, inside, *_ = volume.split(":")
        own = here.startswith(("./certificates", "./state"))
        text = text.replace(inside, str((folder if own else COMPOSE) / here))
    return text


def start(folder: Path, name: str, service: dict[str, Any], port: int) -> tuple[subprocess.Popen[bytes], Path]:
    """A service as a process of this host, and its log."""
    (folder / f"state/{name}").mkdir(parents=True)
    command = outside(folder, service, service["command"], port).split()
    number = command.index("--config") + 1
    config, log = folder / f"{name}.toml", folder / f"{name}.log"
    config.write_text(outside(folder, service, Path(command[number]).read_text(encoding="utf-8"), port))
    command[number] = str(config)
    with log.open("wb") as file:
        arguments = [sys.executable, "-m", "meerkat_mq", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(arguments, stdout=file, stderr=file, env=environment), log


async def test_the_composed_federation_runs(broker: ShippedMosquitto, tmp_path: Path) -> None:
    services = yaml.safe_load((COMPOSE / "compose.yaml").read_text(encoding="utf-8"))["services"]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name in ("server", "node-0", "node-1"):
            process, log = start(tmp_path, name, services[name], broker.port)
            running.append(process)
            if name == "server":
                said = log
        await until(lambda: '"model saved"' in said.read_text() or running[0].poll() is not None, within_s=120)
        assert '"model saved"' in said.read_text(), said.read_text()
        assert [process.poll() for process in running] == [None, None, None]
        assert (tmp_path / "state/server/state/difference.mkd").exists()  # where the README looks
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("names", "model"), [(["compose.yaml"], False), (["compose.yaml", "model.yaml"], True)])
def test_the_image_has_pytorch_where_a_node_needs_it(names: list[str], model: bool) -> None:
    files = [yaml.safe_load((COMPOSE / name).read_text(encoding="utf-8"))["services"] for name in names]
    extras = [found["server"]["build"]["args"]["EXTRAS"] for found in files if "build" in found.get("server", {})][-1]
    for name in ("server", "node-0", "node-1"):
        volumes = [volume.split(":") for found in files for volume in found[name]["volumes"]]
        mounts = {inside: here for here, inside, *_ in volumes}
        config = (COMPOSE / next(mounts[path] for path in mounts if path.endswith(".toml"))).read_text(encoding="utf-8")
        assert ("model = " in config or "mask = " in config) == model, name
        assert ('engine = "toy"' in config) == (name == "server" and not model)
        for path in re.findall(r'"(/etc/[^"]+)"', config):
            assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
    assert ("model" in extras) == model


def test_the_readme_says_how_both_are_started_and_made_readable() -> None:
    readme = (ROOT / "broker/README.md").read_text(encoding="utf-8")
    for words in (
        "docker compose up --build",
        "docker compose -f compose.yaml -f model.yaml up --build",
        "MEERKAT_USER",
    ):
        assert words in readme
    for inside in ("mask.mkm", "shards", "base"):  # what model.yaml mounts, and the README makes
        assert f"/{inside}" in (COMPOSE / "model.yaml").read_text(encoding="utf-8")
        assert inside in readme
    assert "chown -R 10001" in (ROOT / "nodes/README.md").read_text(encoding="utf-8")
    assert "--uid 10001" in (ROOT / "nodes/Containerfile").read_text(encoding="utf-8")
