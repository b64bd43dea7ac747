"""Every command in an environment without extras works, or says in one line which extra it wants.

Here the environment is made of links to the packages at hand. `make test-wheel` builds the wheel, installs it with pip
into an empty environment, and runs the same tests there.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from meerkat_mq.cli import command_line
from tests.support.bare import Bare, interpreter

COMMANDS = sorted(vars(typer.main.get_command(command_line()))["commands"])
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(300)

TASK = 'template = "{line} The thing is"\nlabel_words = [" broken", " running"]\n'
SERVER = """
federation = "f"
engine = "toy"
state_dir = "state"
once = true
[rounds]
count = 3
batch_size = 2
min_nodes = 3
[broker]
url = "{url}"
"""
NODE = """
federation = "f"
id = "{name}"
state_dir = "{name}"
data = "toy.jsonl"
exit_when_finished = true
[broker]
url = "{url}"
"""
WITH_MODEL = 'federation = "f"\nid = "m"\nstate_dir = "m"\ndata = "rows.jsonl"\nmodel = "model"\n'
EVALUATING = """
federation = "f"
state_dir = "e"
mask = "mask.mkm"
task = "task.toml"
[model]
source = "model"
[evaluation]
data = "rows.jsonl"
"""
SWEEP = 'rounds = 1\nlr = [0.1]\n[[methods]]\nname = "m"\n'


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """The environment, and a folder with the files that the commands are given."""
    folder = tmp_path_factory.mktemp("bare")
    rows = "".join(json.dumps({"line": f"row {i}", "text": f"row {i}", "label": i % 2}) + "\n" for i in range(8))
    files = {"rows.jsonl": rows, "task.toml": TASK, "sweep.toml": SWEEP, "model.toml": WITH_MODEL}
    for name, text in {**files, "evaluating.toml": EVALUATING, "toy.jsonl": '{"seed": 7}\n' * 8}.items():
        (folder / name).write_text(text)
    return interpreter(folder)


def test_no_extra_is_there(bare: Bare) -> None:
    """Else the tests here would prove nothing."""
    words = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, sys.argv[1:])))"
    packages = ["torch", "transformers", "safetensors", "peft", "datasets", "amqtt", "onnxruntime", "onnx", "pytest"]
    subprocess.run([bare.python, "-c", words, *packages], env=bare.environment, cwd=bare.folder, check=True)


def test_help_of_every_command(bare: Bare) -> None:
    for said in bare.run(["--version"], ["--help"], *([*name.split(), "--help"] for name in COMMANDS)):
        said.works("meerkat-mq" if said.arguments == ("--version",) else "Usage: ")


def test_commands_that_need_an_extra(bare: Bare) -> None:
    calls = {
        ("demo", "--out", "out"): "model",
        ("doctor", "--model", "model"): "model",
        ("mask", "--model", "model", "--text", "rows.jsonl", "--out", "m.mkm"): "model",
        ("bundle", "--model", "model", "--as-base", "out"): "model",
        ("export", "--model", "model", "--difference", "d.mkd", "--out", "out"): "model",
        ("verify", "state", "--model", "tuned", "--base", "model"): "model",
        ("sweep", "sweep.toml", "--out", "out"): "model",
        ("node", "--config", "model.toml"): "model",
        ("server", "--config", "evaluating.toml"): "model",
        ("partition", "hf:imdb:train", "--out", "s", "--nodes", "2", "--task", "task.toml"): "datasets",
    }
    before = set(bare.folder.iterdir())
    for said in bare.run(*calls):
        said.wants(calls[said.arguments])
    assert set(bare.folder.iterdir()) == before


def test_commands_that_need_none(bare: Bare) -> None:
    init, partition, certs, renew, revoke, simulate, chaos = bare.run(
        ["init", "fed", "--model", "model", "--task", "task.toml", "--data", "rows.jsonl", "--nodes", 3],
        ["partition", "rows.jsonl", "--out", "shards", "--nodes", 2, "--task", "task.toml"],
        ["certs", "ca", "--federation", "f", "--broker", "localhost", "--node", "a"],
        ["certs", "renew", "ca", "a"],
        ["certs", "revoke", "ca", "a"],
        ["simulate", "--repeat", 0],
        ["chaos", "no-such-plan"],
    )
    init.works("fed: federation.toml, 3 node files")
    partition.works("shards/node-1.jsonl: ")
    certs.works("valid until")
    renew.works("valid until")
    revoke.works("a: certificates revoked: 2")
    simulate.works("all that must hold, holds")
    chaos.refuses(2, "no-such-plan")


def test_a_federation(bare: Bare) -> None:
    """Broker, server and nodes, and the commands that look at what they left."""
    running = [broker := bare.start("broker", "--port", 0, "--json-logs")]
    try:
        url = f"mqtt://127.0.0.1:{_port(broker)}"
        (bare.folder / "server.toml").write_text(SERVER.format(url=url))
        running.append(server := bare.start("server", "--config", "server.toml"))
        for name in ("a", "b", "c"):
            (bare.folder / f"{name}.toml").write_text(NODE.format(url=url, name=name))
            running.append(bare.start("node", "--config", f"{name}.toml"))
        for service in (server, *running[2:]):
            said, _ = service.communicate(timeout=120)
            assert service.returncode == 0, said
            assert "Traceback" not in said
        broker.send_signal(signal.SIGTERM)
        said, _ = broker.communicate(timeout=60)
        assert broker.returncode == 0, said
    finally:
        for service in running:
            service.kill()
            service.wait()
    for looked in bare.run(["status", "state"], ["ledger", "state"], ["verify", "state"], ["report", "state"]):
        looked.works("3")


def _port(broker: subprocess.Popen[str]) -> int:
    assert broker.stdout is not None
    for line in broker.stdout:
        found = json.loads(line)
        if found["event"] == "broker started":
            return int(found["port"])
    raise AssertionError("the broker ended")


def test_every_command_is_called_here() -> None:
    """A new command belongs into one of the tests above."""
    text = Path(__file__).read_text(encoding="utf-8")
    words = {name: ", ".join(f'"{word}"' for word in name.split()) for name in COMMANDS}
    assert not [name for name in COMMANDS if f"[{words[name]}, " not in text and f"({words[name]}, " not in text]


@pytest.mark.skipif("MEERKAT_WHEEL_PYTHON" not in os.environ, reason="takes half a minute: make test-wheel")
def test_a_drill(bare: Bare) -> None:
    (said,) = bare.run(["chaos", "server-crash", "--seconds", 20, "--out", "drill"])
    said.works("Report: ")


@pytest.mark.skipif("MEERKAT_WHEEL_PYTHON" not in os.environ, reason="the links lead to this tree: make test-wheel")
def test_it_is_the_wheel(bare: Bare) -> None:
    words = "import meerkat_mq; print(meerkat_mq.__file__)"
    found = subprocess.run(
        [bare.python, "-c", words], env=bare.environment, cwd=bare.folder, capture_output=True, text=True, check=True
    )
    assert not Path(found.stdout).is_relative_to(ROOT)
    assert str(bare.python) != sys.executable
