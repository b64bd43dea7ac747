"""`meerkat init`: a folder whose files run as they are."""

import asyncio
import json
from pathlib import Path

import pytest

from meerkat_mq.config import NodeConfig, ServerConfig, load_config
from meerkat_mq.demo.begin import HELD_OUT
from meerkat_mq.demo.corpus import TASK, triage_rows
from meerkat_mq.node.service import run_node
from meerkat_mq.tasks.data import hold_out, read_rows, write_rows
from meerkat_mq.tasks.load import load_task
from tests.server.federation import Service
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "my rows.jsonl"
    write_rows(file, [{"sentence": f"row {number}", "label": number % 2} for number in range(60)])
    return file


def test_held_out_rows_are_a_fifth_of_each_label() -> None:
    rows = triage_rows(0, 500, "train")
    train, held_out = hold_out(rows, HELD_OUT, seed=0, class_of=TASK.class_of)
    assert len(held_out) + len(train) == 500
    for label in range(4):
        had = sum(row["label"] == label for row in rows)
        assert sum(row["label"] == label for row in held_out) == round(had / 5)


def test_the_files_can_be_read_and_say_what_was_asked_for(meerkat: Meerkat, tmp_path: Path, rows: Path) -> None:
    folder = tmp_path / "a field"
    said = meerkat("init", folder, "--model", "some/model", "--task", "sst2", "--data", rows, "--nodes", 5,
                   "--name", "barn", "--broker", "mqtts://broker.example:8883")  # fmt: skip
    assert said.code == 0, said.err
    server = load_config(folder / "federation.toml", ServerConfig)
    assert (server.federation, server.mask, server.task) == ("barn", folder / "mask.mkm", "sst2")
    assert (server.rounds.min_nodes, server.broker.url) == (3, "mqtts://broker.example:8883")
    assert server.model is not None
    assert server.model.source == "some/model"
    nodes = [load_config(folder / f"node-{number}.toml", NodeConfig) for number in range(5)]
    assert [node.id for node in nodes] == [f"node-{number}" for number in range(5)]
    assert len({node.state_dir for node in nodes}) == 5
    task = load_task("sst2")
    shards = [read_rows(node.data, task) for node in nodes]
    assert server.evaluation is not None
    assert sum(map(len, shards)) + len(read_rows(server.evaluation.data, task)) == 60
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["mask", "server", "node"]
    assert all(f"'{folder}/" in line for line in lines[2:])


def test_every_name_that_a_shell_takes_can_be_read_back(meerkat: Meerkat, tmp_path: Path, rows: Path) -> None:
    """TOML takes no U+007F as it is."""
    folder, model = tmp_path / "a field", 'a\x7f\t"b\\ \u0085\u2028😀'
    said = meerkat("init", folder, "--model", model, "--task", "sst2", "--data", rows, "--nodes", 3)
    assert said.code == 0, said.err
    server = load_config(folder / "federation.toml", ServerConfig)
    assert server.model is not None
    assert server.model.source == model


def test_what_is_wrong_is_said_and_nothing_is_left(meerkat: Meerkat, tmp_path: Path, rows: Path) -> None:
    good = {"--model": "m", "--task": "sst2", "--data": rows, "--nodes": 3}

    def fails(code: int, *words: str, **changes: object) -> None:
        choices = good | {f"--{key}": value for key, value in changes.items()}
        said = meerkat("init", tmp_path / "new", *(part for pair in choices.items() for part in pair))
        said.failed(code, *words)
        assert not (tmp_path / "new").exists()

    fails(3, "sst3", task="sst3")
    fails(3, "none.jsonl: cannot be read", data=tmp_path / "none.jsonl")
    fails(2, "url", broker="broker.example")
    fails(2, "federation", name="a/b")
    fails(3, "every node needs at least one row", nodes=1000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    arguments = [part for pair in good.items() for part in pair]
    meerkat("init", tmp_path / "full", *arguments).failed(2, "has something in it; name a new folder")


@pytest.mark.timeout(300)
async def test_the_commands_that_it_names_run(
    meerkat: Meerkat, mosquitto: Mosquitto, tmp_path: Path, tiny_llama: Path, rows: Path
) -> None:
    """A server and a node as processes of their own; the other nodes, of other files alike, in this one."""
    folder = tmp_path / "field"
    said = meerkat("init", folder, "--model", tiny_llama, "--task", "sst2", "--data", rows, "--nodes", 3,
                   "--broker", mosquitto.config.url)  # fmt: skip
    mask, *_ = (line.split()[1:] for line in said.out.splitlines()[2:])
    assert meerkat(*mask, "--density", 0.01).code == 0
    config = folder / "federation.toml"
    config.write_text(config.read_text().replace("count = 200 ", "count = 2 "))
    server = Service("meerkat_mq.server", config, ["--once"], {})
    first = Service("meerkat_mq.node", folder / "node-0.toml", [], {})
    others = [load_config(folder / f"node-{number}.toml", NodeConfig) for number in (1, 2)]
    nodes = [asyncio.create_task(run_node(config)) for config in others]
    try:
        assert await server.ended(within_s=200) == 0, server.plain
        assert len(server.said("round closed", heard=3)) == 2
        assert json.dumps(server.said("evaluated")[-1]["version"]) == "2"
    finally:
        for service in (server, first):
            service.kill()
        for node in nodes:
            node.cancel()
        await asyncio.wait(nodes)
