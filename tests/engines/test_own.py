"""The engine of docs/engines.md, taken from the page, trained by real processes over Mosquitto."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.extras import missing
from meerkat_mq.ledger.folder import verify_folder
from tests.support.absent import ABSENT, START
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


def write_files(folder: Path, port: int, nodes: Sequence[str] = NODES) -> None:
    """Every file of the page, and those of other nodes with PyTorch as it says to make them."""
    page = PAGE.read_text(encoding="utf-8")
    for name, text in re.findall(r"^`([\w-]+\.(?:py|toml))`.*?^```\w+\n(.*?)^```", page, FLAGS):
        (folder / name).write_text(text.replace("127.0.0.1:1883", f"127.0.0.1:{port}"))
    for node in nodes[1:]:
        (folder / f"{node}.toml").write_text((folder / "node-0.toml").read_text().replace("node-0", node))


def logged(folder: Path, name: str, event: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.log").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line))["event"] == event]


def python(folder: Path, *arguments: str) -> None:
    """Run Python in a folder, as the page says to."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True)


def run(folder: Path, nodes: Sequence[str], *others: str) -> None:
    """Server and nodes to the end of the run; others are nodes without PyTorch, and without code of the user's."""
    commands = [("server", "server", "--config", "federation.toml")]
    commands += [(node, "node", "--config", f"{node}.toml") for node in nodes]
    started: list[tuple[str, str, str, Sequence[str]]]
    started = [(FORKS.format(commands=commands), f"{ROOT}{os.pathsep}{folder}", "forks", ())]  # one import of PyTorch
    started += [(ABSENT + START, str(ROOT), node, ("node", "--config", f"{node}.toml")) for node in others]
    running = list[subprocess.Popen[bytes]]()
    try:
        for code, path, name, arguments in started:
            with (folder / f"{name}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code, *arguments], cwd=folder, stderr=log, start_new_session=True,
                        env=os.environ | {"PYTHONPATH": path},
                    )
                )  # fmt: skip
        for process in running:
            assert process.wait(timeout=180) == 0
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def learned(folder: Path) -> None:
    """The run got somewhere, all nodes ended with the server's weights, and these are what the ledger says."""
    evaluated = logged(folder, "server", "evaluated")
    assert evaluated[0]["accuracy"] < 0.5
    assert evaluated[-1]["accuracy"] > 0.85
    (finished,) = logged(folder, "server", "run finished")
    assert {logged(folder, node, "finished")[-1]["digest"] for node in NODES} == {finished["digest"]}
    found = verify_folder(folder / "server")
    assert (found.rounds, found.digest.hex()) == (150, finished["digest"])


@pytest.mark.timeout(200)
def test_the_engine_of_the_page_learns(mosquitto: Broker, tmp_path: Path) -> None:
    write_files(tmp_path, mosquitto.port)
    code = (tmp_path / "windows.py").read_text()
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    python(tmp_path, "rows.py")
    run(tmp_path, NODES)
    learned(tmp_path)


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    bool(missing("onnx") or missing("bundle")) or find_spec("onnxscript") is None,
    reason="needs pip install 'meerkat-mq[onnx,bundle]' onnxscript",
)
def test_a_node_without_pytorch_takes_part_with_what_the_page_exports(mosquitto: Broker, tmp_path: Path) -> None:
    write_files(tmp_path, mosquitto.port, NODES[:2])
    python(tmp_path, "rows.py")
    python(tmp_path, "export.py")
    run(tmp_path, NODES[:2], NODES[2])
    learned(tmp_path)
