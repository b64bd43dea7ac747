"""Nodes with and without PyTorch in one run, as processes on a real broker; and what a node without it imports."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.config import NodeConfig, ServerConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import ENGINES, check_named, make_engine, runs_of
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.engines.torch.merge import base_folder
from meerkat_mq.errors import ConfigError, RunMismatch
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.verify import Verified
from meerkat_mq.node.state import NodeState
from meerkat_mq.node.work import Work
from meerkat_mq.server.run import prepare_run
from tests.engines import tiny
from tests.engines.onnx.conftest import Bundled
from tests.support.absent import ABSENT, START
from tests.support.broker import Broker
from tests.support.command import Meerkat
from tests.support.web import serving

ROOT = Path(__file__).parents[3]
TASK = """
fields = ["line"]
template = "{line} The thing is"
label_words = [" broken", " running"]
descriptions = ["something broken", "something running"]
max_tokens = 48
"""
SERVER = """
federation = "mixed"
state_dir = "server"
mask = "mask.mkm"
task = "state.toml"
once = true
wait_for_nodes_s = 600
[broker]
url = "mqtt://127.0.0.1:{port}"
[rounds]
count = {rounds}
deadline_s = 600
min_nodes = {nodes}
min_updates = {nodes}
directions = 1
lr = 1e-3
batch_size = {rows}
local_steps = 2
"""
NODE = """
id = "{name}"
federation = "mixed"
data = "rows.jsonl"
state_dir = "{name}"
exit_when_finished = true
threads = 1
{engine}
[broker]
url = "mqtt://127.0.0.1:{port}"
[policy]
min_batch = 1
"""
FETCHED = """
[bundle]
url = "http://127.0.0.1:{port}/"
sha256 = "{sha256}"
"""
LOSSES = """
import json
from pathlib import Path
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import make_engine
from meerkat_mq.node.work import Work
from meerkat_mq.tasks.load import load_task

mask = Mask.load(Path("mask.mkm"))
engine = make_engine("onnx", Setup(mask, load_task("state.toml"), sys.argv[1]), "a test")
rows = [json.loads(line) for line in open("rows.jsonl")]
print(json.dumps([float(loss) for loss in engine.losses(engine.prepare(rows))]))
"""
CPU = """
import json, sys, time
from pathlib import Path
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import make_engine
from tests.engines.test_continuations import LINES, TEXT

engine = make_engine("onnx", Setup(Mask.load(Path("mask.mkm")), TEXT, sys.argv[1], threads=1), "a test")
batch = engine.prepare(LINES * 8)
engine.losses(batch)
process, thread = time.process_time(), time.thread_time()
for _ in range(20):
    engine.losses(batch)
print(json.dumps([time.process_time() - process, time.thread_time() - thread]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state.toml").write_text(TASK)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ROWS[:24]))
    return tmp_path


@pytest.fixture
def web(bundled: Bundled, family: str) -> Iterator[HTTPServer]:
    """Serves a bundle."""

    class Page(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(bundled(family, "int8")[1]))

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Page)) as server:
        yield server


def service(command: str, config: str, block: str = "") -> list[str]:
    return [sys.executable, "-c", block + START, command, "--config", config]


def finished(folder: Path, *nodes: Sequence[str], seconds: float = 240) -> Verified:
    """A server and nodes, each a process, to the end of a run: their weights are equal, and the ledger verifies."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        for command in (service("server", "federation.toml"), *nodes)
    ]
    try:
        logs = [process.communicate(timeout=seconds)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), "\n".join(logs)
    events = [[json.loads(line) for line in log.splitlines() if line.startswith("{")] for log in logs]
    (digest,) = [event["digest"] for event in events[0] if event["event"] == "run finished"]
    digests = [event["digest"] for log in events[1:] for event in log if event["event"] == "finished"]
    assert digests == [digest] * len(nodes)
    found = verify_folder(folder / "server")
    assert found.digest.hex() == digest
    return found


def hash_of(bundle: Path) -> str:
    return hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()


def run(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_without_pytorch_nothing_of_it_is_imported(bundled: Bundled, folder: Path, family: str) -> None:
    base, bundle, mask = bundled(family, "int8")
    mask.save(folder / "mask.mkm")
    done = run(folder, ABSENT + LOSSES, str(bundle))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 24
    done = run(folder, ABSENT + LOSSES, str(base))
    assert "is no bundle: there is no bundle.json in it; give the folder that `meerkat bundle` wrote" in done.stderr


def test_a_node_of_one_thread_uses_no_other(bundled: Bundled, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of NumPy's BLAS would wait busily for the products with the output head."""
    _, bundle, mask = bundled("llama", "int8")
    mask.save(folder / "mask.mkm")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    done = run(folder, CPU, str(bundle))
    assert done.returncode == 0, done.stderr
    process, thread = json.loads(done.stdout)
    assert process < 1.1 * thread + 0.01


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["llama", "llama-upper"])
def test_all_kinds_of_nodes_end_with_the_same_weights(
    bundled: Bundled, folder: Path, mosquitto: Broker, web: HTTPServer, family: str
) -> None:
    base, bundle, mask = bundled(family, "int8")
    mask.save(folder / "mask.mkm")
    assert Mask.load(folder / "mask.mkm").hash == mask.hash
    (folder / "federation.toml").write_text(SERVER.format(port=mosquitto.port, rounds=6, nodes=3, rows=4))
    engines = {"torch-0": f"model = '{base}'"}
    engines |= {"onnx-0": f"engine = 'onnx'\nmodel = '{bundle}'", "onnx-1": "engine = 'onnx'"}
    for name, engine in engines.items():
        (folder / f"{name}.toml").write_text(NODE.format(name=name, engine=engine, port=mosquitto.port))
    with (folder / "onnx-1.toml").open("a") as stream:  # it fetches its own
        stream.write(FETCHED.format(port=web.server_port, sha256=hash_of(bundle)))
    blocks = {name: ABSENT if name.startswith("onnx") else "" for name in engines}
    found = finished(folder, *(service("node", f"{name}.toml", block) for name, block in blocks.items()))
    assert (found.rounds, found.updates) == (6, 18)


@pytest.mark.skipif("MEERKAT_ARM_PYTHON" not in os.environ, reason="needs packages for aarch64: make test-arm")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("weights", ["random", pytest.param("genuine", marks=pytest.mark.real)])
def test_a_node_on_aarch64(
    bundled: Bundled, folder: Path, mosquitto: Broker, weights: str, request: pytest.FixtureRequest
) -> None:
    """With what pip installs for it, and nothing of this environment; the server is on this machine's processor."""
    source = request.getfixturevalue("minilm") if weights == "genuine" else None
    _, bundle, mask = bundled("bert", "int8", source)
    mask.save(folder / "mask.mkm")
    (folder / "federation.toml").write_text(SERVER.format(port=mosquitto.port, rounds=1, nodes=1, rows=1))
    engine = f"engine = 'onnx'\nmodel = '{bundle}'"
    (folder / "arm.toml").write_text(NODE.format(name="arm", engine=engine, port=mosquitto.port))
    node = ["env", "-u", "PYTHONPATH", os.environ["MEERKAT_ARM_PYTHON"], "-m", "meerkat_mq", "node"]
    found = finished(folder, [*node, "--config", "arm.toml"], seconds=1700)
    assert (found.rounds, found.updates) == (1, 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which PEFT looks at
def test_a_bundle_of_a_model_with_an_adapter(
    folders: dict[str, Path], tmp_path: Path, meerkat: Meerkat, bundled: Bundled
) -> None:
    bundled("llama")  # skips where a bundle cannot be made
    from tests.engines.test_merge import peft_model

    base, adapter, out = str(folders["llama"]), tmp_path / "adapter", tmp_path / "bundle"
    peft_model(folders["llama"], "llama").save_pretrained(adapter)
    merged = load_model(base_folder(base, adapter))
    mask = make_mask(merged, tiny.TEXTS, "magnitude", density=0.1, **tiny.SMALL)
    mask.save(tmp_path / "m.mkm")
    arguments = ("bundle", "--model", base, "--weights", "float32", "--mask", tmp_path / "m.mkm", "--out", out)
    meerkat(*arguments).failed(4, "is not the model that the mask was made on")
    assert not out.exists()
    said = meerkat(*arguments, "--adapter", adapter)
    assert said.code == 0, said
    assert f"SHA-256 of bundle.json: {hash_of(out)}" in said.out
    ours = make_engine("onnx", Setup(mask, tiny.TASK, str(out)), "a test")
    theirs = make_engine("transformers", Setup(mask, tiny.TASK, base, adapter=str(adapter)), "a test")
    plain = make_engine("onnx", Setup(bundled("llama")[2], tiny.TASK, str(bundled("llama")[1])), "a test")
    rows = tiny.ROWS[:6]
    found, wanted, without = (engine.losses(engine.prepare(rows)) for engine in (ours, theirs, plain))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(found - without).max() > 1e-2  # the adapter changes something
    with pytest.raises(ConfigError, match=r"^adapter: is given, and a bundle holds its adapter already"):
        make_engine("onnx", Setup(mask, tiny.TASK, str(out), adapter=str(adapter)), "a test")


def test_a_node_may_name_an_engine_that_stands_for_the_run_s() -> None:
    assert runs_of("onnx") == "transformers"
    assert runs_of("toy") == "toy"
    assert runs_of("a:b") == "a:b"
    allowed = [("transformers", "onnx"), ("transformers", None), ("a:b", "a:b"), ("a:b", "graph")]
    for run_engine, named in allowed:
        check_named(run_engine, named)
    others = [("transformers", "graph"), ("toy", "graph"), ("graph", None)]
    for run_engine, named in (("toy", "onnx"), ("a:b", "onnx"), ("a:b", None), ("transformers", "toy"), *others):
        with pytest.raises(RunMismatch):
            check_named(run_engine, named)
    assert ENGINES["onnx"].extra == "onnx"


def test_a_node_that_fetches_its_bundle_ends_in_order(folder: Path) -> None:
    """Nobody listens at port 1: the node says so, and goes on; a signal ends it at once."""
    text = NODE.format(name="n", engine="engine = 'onnx'", port=1) + FETCHED.format(port=1, sha256="0" * 64)
    (folder / "n.toml").write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-c", ABSENT + START, "node", "--config", "n.toml"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    with process.stderr as lines:
        try:
            line = next(line for line in lines if "bundle not fetched yet" in line)
            assert "Connection refused" in json.loads(line)["problem"]
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_values_need_gradients_which_a_bundle_does_not_give(bundled: Bundled, folder: Path) -> None:
    _, bundle, mask = bundled("llama", "int8")
    mask.save(folder / "mask.mkm")
    server = ServerConfig(federation="f", state_dir=folder, mask=folder / "mask.mkm", task=str(folder / "state.toml"))
    config = NodeConfig(
        id="n",
        federation="f",
        data=folder / "rows.jsonl",
        state_dir=folder / "n",
        engine="onnx",
        model=str(bundle),
        uplink="values",
    )
    run = prepare_run(server).descriptor
    with (
        NodeState(folder / "n") as state,
        pytest.raises(ConfigError, match=r'^uplink: is "values", and the engine onnx has no method gradient; set'),
    ):
        Work(config, run, mask, state)
