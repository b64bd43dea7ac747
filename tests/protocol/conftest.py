"""The node in JavaScript, installed once a session from a copy of `protocol/` alone."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.protocol.javascript import JavaScriptNode
from tests.server.federation import NAME, Federation
from tests.support.broker import Broker

PROTOCOL = Path(__file__).parents[2] / "protocol"
NPM = ("npm", "install", "--no-audit", "--no-fund", "--no-progress", "--loglevel=error")
NPM_S = 150.0


def _installed(protocol: Path) -> str:
    """Copy `protocol/` and install what its node needs; what went wrong, or ""."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} missing (`make test` installs Debian's nodejs and npm)"
    shutil.copytree(PROTOCOL, protocol, ignore=shutil.ignore_patterns("node_modules", "__pycache__"))
    try:
        done = subprocess.run(
            NPM, cwd=protocol / "javascript", capture_output=True, text=True, timeout=NPM_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"npm install did not end within {NPM_S:g} s"
    return f"npm install failed: {' '.join(done.stderr.splitlines()[:3])}" if done.returncode else ""


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the installed node; skips with a reason where it cannot be had, but not under CI=true."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    protocol, result = folder / "protocol", folder / "javascript.txt"
    with FileLock(folder / "javascript.lock"):
        if not result.exists():
            result.write_text(_installed(protocol), encoding="utf-8")
    if problem := result.read_text(encoding="utf-8"):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"the node in JavaScript: {problem}")
    return protocol / "javascript"


@pytest.fixture
def start_node(javascript: Path, mosquitto: Broker, tmp_path: Path) -> Iterator[Callable[..., JavaScriptNode]]:
    """Start a node in JavaScript; killed at the end."""
    started: list[JavaScriptNode] = []

    def start(*flags: str, name: str = "js-1", node: str = "js-1", seed: int = 14) -> JavaScriptNode:
        data = tmp_path / f"{name}.jsonl"
        data.write_text(f'{{"seed": {seed}}}\n' * 8)
        settings = ("--broker", mosquitto.url, "--federation", NAME, "--id", node, "--data", str(data))
        started.append(JavaScriptNode(javascript, tmp_path / f"{name}.log", *settings, *flags))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
async def federation(mosquitto: Broker, tmp_path: Path) -> AsyncIterator[Federation]:
    """Real processes on a Mosquitto of this test's own."""
    async with Federation(tmp_path, mosquitto.config) as running:
        yield running
