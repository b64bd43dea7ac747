"""The engine of docs/engines.md, taken from the page, trained by real processes over Mosquitto."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.ledger.folder import verify_folder
from tests.support.broker import Broker

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "engines.md"
FLAGS = re.MULTILINE | re.DOTALL
NODES = ("node-0", "node-1", "node-2")
FORKS = """
import os, sys, torch
from meerkat_mq.__main__ import main

for name, *arguments in {commands!r}:
    if not os.fork():
        os.dup2(os.open(name + ".log", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["meerkat", *arguments]
        sys.exit(main())
sys.exit(any([os.wait()[1] for _ in {commands!r}]))
"""


def write_files(folder: Path, port: int) -> None:
    """Every file of the page, and the other nodes' as it says to make them."""
    page = PAGE.read_text(encoding="utf-8")
    for name, text in re.findall(r"^`([\w-]+\.(?:py|toml))`.*?^```\w+\n(.*?)^```", page, FLAGS):
        (folder / name).write_text(text.replace("127.0.0.1:1883", f"127.0.0.1:{port}"))
    for node in NODES[1:]:
        (folder / f"{node}.toml").write_text((folder / "node-0.toml").read_text().replace("node-0", node))


def logged(folder: Path, name: str, event: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.log").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line))["event"] == event]


@pytest.mark.timeout(200)
def test_the_engine_of_the_page_learns(mosquitto: Broker, tmp_path: Path) -> None:
    write_files(tmp_path, mosquitto.port)
    code = (tmp_path / "windows.py").read_text()
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    subprocess.run([sys.executable, "rows.py"], cwd=tmp_path, check=True)
    commands = [("server", "server", "--config", "federation.toml")]
    commands += [(node, "node", "--config", f"{node}.toml") for node in NODES]
    code = FORKS.format(commands=commands)  # PyTorch is imported once for all of them
    running = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, start_new_session=True)
    try:
        assert running.wait(timeout=180) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    evaluated = logged(tmp_path, "server", "evaluated")
    assert evaluated[0]["accuracy"] < 0.5
    assert evaluated[-1]["accuracy"] > 0.85
    (finished,) = logged(tmp_path, "server", "run finished")
    assert {logged(tmp_path, node, "finished")[-1]["digest"] for node in NODES} == {finished["digest"]}
    found = verify_folder(tmp_path / "server")
    assert (found.rounds, found.digest.hex()) == (150, finished["digest"])
