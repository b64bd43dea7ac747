"""The command line on a tiny model, from mask to export, and what users get wrong on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat_mq import __version__
from meerkat_mq.config import EvaluationConfig, ModelConfig, RoundsConfig, ServerConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.observe.events import Evaluated, RunEvent, RunFinished
from meerkat_mq.server.service import serve
from tests.server.federation import Federation
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.timeout(300)  # the first import of torch takes long on a busy machine

TASK = """
template = "{line} The thing is"
label_words = [" broken", " running"]
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows with two labels, which serve as calibration text too."""
    lines = [
        {"text": f"The {colour} {thing} was {state}.", "line": f"The {colour} {thing} was {state}.", "label": label}
        for colour in ("red", "green", "blue", "black")
        for thing in ("pump", "valve", "motor")
        for label, state in enumerate(("broken", "running"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "task.toml").write_text(TASK)
    return path


async def test_from_mask_to_export(
    meerkat: Meerkat, tmp_path: Path, rows: Path, mosquitto: Mosquitto, tiny_llama: Path
) -> None:
    made = meerkat(
        *("mask", "--model", tiny_llama, "--text", rows, "--out", tmp_path / "m.mkm"),
        *("--density", 0.1, "--sequences", 4, "--length", 32),
    )
    mask = Mask.load(tmp_path / "m.mkm")
    assert f"{mask.size:,} of " in made.out
    assert mask.hash.hex() in made.out

    events: list[RunEvent] = []
    config = ServerConfig(
        federation="f",
        state_dir=tmp_path / "server",
        broker=mosquitto.config,
        rounds=RoundsConfig(count=4, batch_size=4, min_updates=1),
        mask=tmp_path / "m.mkm",
        task=str(tmp_path / "task.toml"),
        model=ModelConfig(source=str(tiny_llama)),
        evaluation=EvaluationConfig(data=rows, every=2),
        once=True,
    )
    async with Federation(tmp_path, mosquitto.config, models=True) as federation:
        node = federation.node("a", model=str(tiny_llama), data=str(rows), threads=1, exit_when_finished=True)
        await serve(config, observer=events.append)
        assert await node.ended() == 0, node.plain
    kinds = [type(event).__name__ for event in events]
    assert (kinds[0], kinds[-1]) == ("RunStarted", "RunFinished")
    assert [event.version for event in events if isinstance(event, Evaluated)] == [0, 2, 4]
    assert isinstance(events[-1], RunFinished)
    assert events[-1].digest == node.said("finished")[0]["digest"]

    difference, tuned = tmp_path / "server" / "difference.mkd", tmp_path / "tuned"
    said = meerkat("export", "--model", tiny_llama, "--difference", difference, "--out", tuned)
    assert "version 4 of run" in said.out
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (tiny_llama, tuned))
    assert len(before) == len(after)
    assert before != after
    card = (tuned / "README.md").read_text()
    assert all(words in card for words in (events[-1].digest, "| rounds | 4 of 4 |", "| federation | f |", "| loss | "))

    small = tmp_path / "small"
    assert meerkat("export", "--model", tiny_llama, "--difference", difference, "--out", small, "--as", "delta").out
    assert {path.name for path in small.iterdir()} == {"README.md", "delta.safetensors"}

    peft = tmp_path / "peft"
    assert meerkat("export", "--model", tiny_llama, "--difference", difference, "--out", peft, "--as", "peft").out
    for folder in (small, peft):
        said = meerkat("verify", tmp_path / "server", "--model", folder, "--base", tiny_llama)
        assert f"difference.mkd, {folder} too; digest " in said.out
    file = small / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    meerkat("verify", tmp_path / "server", "--model", small, "--base", tiny_llama).failed(
        4, f"{small}: ", " is not what base and theta give; export the model again"
    )

    said = meerkat("verify", tmp_path / "server", "--model", tuned, "--base", tiny_llama)
    assert f"4 rounds and 4 updates are as they must be; difference.mkd, {tuned} too; digest " in said.out
    assert events[-1].digest in said.out

    settings = tuned / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"rms_norm_eps": 0.1}))
    meerkat("verify", tmp_path / "server", "--model", tuned, "--base", tiny_llama).failed(
        4, f"{tuned}: logits of ", "base and theta give (config.json is not the base's); export the model again"
    )


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "meerkat_mq", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"meerkat-mq {__version__}\n"
    command = [sys.executable, "-m", "meerkat_mq", "server", "--config", "none.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = "meerkat: none.toml: cannot be read (No such file or directory); give the path of a TOML file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_version_and_help(meerkat: Meerkat) -> None:
    assert meerkat("--version").out == f"meerkat-mq {__version__}\n"
    said = meerkat("--help")
    assert said.code == 0
    for name in ("demo", "mask", "partition", "server", "node", "broker", "export"):
        assert name in said.out
    assert meerkat("no-such-command").code == 2


@pytest.mark.parametrize("density", ["0", "-0.1", "1.01", "nan"])
def test_a_density_outside_0_to_1(meerkat: Meerkat, rows: Path, tiny_llama: Path, tmp_path: Path, density: str) -> None:
    out = tmp_path / "m.mkm"
    meerkat("mask", "--model", tiny_llama, "--text", rows, "--out", out, "--density", density).failed(
        4, f"density: {float(density)} is outside (0, 1]", "0.001 keeps one weight in a thousand"
    )
    assert not out.exists()


def test_a_wrong_command_line_for_a_mask(meerkat: Meerkat, rows: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def fails(code: int, *words: str, **changes: object) -> None:
        options = {"model": tiny_llama, "text": rows, "out": tmp_path / "m.mkm"} | changes
        meerkat("mask", *(part for key, value in options.items() for part in (f"--{key}", value))).failed(code, *words)

    fails(4, "none: no such folder; give the folder of a Hugging Face model", model=tmp_path / "none")
    fails(3, "none.txt: cannot be read (No such file or directory)", text=tmp_path / "none.txt")
    fails(2, f"--out {tmp_path}: is not a file in a folder that exists", out=tmp_path)
    fails(2, "is not a file in a folder that exists; make the folder", out=tmp_path / "none" / "m.mkm")
    fails(2, "command line: device: ", "not 'gpu'", device="gpu")
    fails(2, "--density: means nothing to --method dense; leave it out", method="dense", density=0.5)
    fails(2, "--density: means nothing to --method lora; leave it out", method="lora", rank=3, density=0.5)
    fails(2, "--rank: means nothing to --method magnitude; leave it out", method="magnitude", rank=8)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "x"}\n{"text": \n')
    fails(3, "broken.jsonl:2: is not JSON", text=broken)


def test_partition_divides_a_file(meerkat: Meerkat, rows: Path, tmp_path: Path) -> None:
    arguments = ("partition", rows, "--out", tmp_path / "shards", "--task", tmp_path / "task.toml", "--split", "iid")
    said = meerkat(*arguments, "--nodes", 5)
    assert said.code == 0
    shards = [tmp_path / "shards" / f"node-{number}.jsonl" for number in range(5)]
    assert sorted(line for shard in shards for line in shard.read_text().splitlines()) == sorted(
        rows.read_text().splitlines()
    )
    assert said.out.splitlines()[0].startswith(f"{shards[0]}: 5 rows, by label [")
    by_field = ("partition", rows, "--out", tmp_path / "by-field", "--task", tmp_path / "task.toml", "--nodes", 2)
    said = meerkat(*by_field, "--split", "field", "--field", "label")
    assert said.out.splitlines()[1].endswith(" rows, by label [0, 12], label 1")
    meerkat(*by_field, "--split", "field").failed(2, "--field: and --split field need each other")
    meerkat(*by_field, "--field", "label").failed(2, "--field: and --split field need each other")
    meerkat(*by_field, "--split", "field", "--field", "system").failed(3, "rows.jsonl:1: field 'system' is missing")
    meerkat(*arguments, "--nodes", 25).failed(3, "nodes: 25 nodes for 24 rows")
    meerkat(*arguments, "--nodes", 2, "--split", "dirichlet", "--alpha", 0).failed(3, "alpha: 0.0 is not above 0")


def test_partition_refuses_what_is_wrong(meerkat: Meerkat, rows: Path, tmp_path: Path) -> None:
    def fails(code: int, *words: str, data: Path = rows, out: Path = tmp_path / "s", task: object = "sst2") -> None:
        meerkat("partition", data, "--out", out, "--nodes", 2, "--task", task).failed(code, *words)

    fails(3, "sst3: is no built-in task; use one of agnews", task="sst3")
    fails(3, "rows.jsonl:1: field 'sentence' is missing")
    fails(3, "none.jsonl: cannot be read", data=tmp_path / "none.jsonl")
    fails(2, "rows.jsonl: cannot be written", out=rows, task=tmp_path / "task.toml")


def test_export_refuses_what_is_wrong(meerkat: Meerkat, tiny_llama: Path, tmp_path: Path) -> None:
    def fails(code: int, *words: str, difference: Path) -> None:
        arguments = ("--model", tiny_llama, "--difference", difference, "--out", tmp_path / "out")
        meerkat("export", *arguments).failed(code, *words)

    fails(4, "none.mkd: cannot be read", difference=tmp_path / "none.mkd")
    (tmp_path / "bad.mkd").write_bytes(bytes(100))
    fails(4, "bad.mkd: is damaged", "copy it again from the server's state_dir", difference=tmp_path / "bad.mkd")
