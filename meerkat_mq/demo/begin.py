"""`meerkat init`: the folder of a new federation, whose files run as they are."""

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import tomli_w
import typer
from rich.console import Console

from meerkat_mq.config import NodeConfig, ServerConfig, check_config, load_config
from meerkat_mq.core.files import write_atomically, writing
from meerkat_mq.errors import ConfigError
from meerkat_mq.observe.tables import say

HELD_OUT: Final = 0.2  # of the rows with a label
MOST_NODES: Final = 1000
CALIBRATION: Final = "calibration.jsonl"  # the rows' text, until there is some like what the model was pretrained on


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to make; it must not exist, or be empty.", show_default=False)],
    *,
    model: Annotated[str, typer.Option(help="Base model: folder or hub id.", show_default=False)],
    task: Annotated[str, typer.Option(help="Built-in task, or a task's TOML file.", show_default=False)],
    data: Annotated[str, typer.Option(help="Rows to divide among the nodes; a fifth is held out.", show_default=False)],
    nodes: Annotated[int, typer.Option(min=3, max=MOST_NODES, help="How many.")] = 4,
    name: Annotated[str, typer.Option(help="Of the federation.")] = "field",
    broker: Annotated[str, typer.Option(help="Its address.")] = "mqtt://127.0.0.1:1883",
) -> None:
    """Make the folder of a federation: federation.toml, a TOML file and rows for each node; say how it is started."""
    from meerkat_mq.tasks.data import hold_out, partition, read_rows, write_rows  # noqa: PLC0415
    from meerkat_mq.tasks.load import load_task  # noqa: PLC0415
    from meerkat_mq.tasks.sources import named_source  # noqa: PLC0415

    a_node = {"id": "node-0", "federation": name, "data": "rows", "state_dir": "state", "broker": {"url": broker}}
    check_config(a_node, NodeConfig, where="command line")
    found = load_task(task)
    rows = read_rows(named_source(data), found)
    train, held_out = hold_out(rows, HELD_OUT, seed=0, class_of=found.class_of)
    shards = partition(train, nodes, "iid", seed=0, class_of=found.class_of)
    said = {"federation": name, "model": _placed(model), "task": _placed(task), "url": broker}
    with writing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(str(folder), "has something in it", "name a new folder")
        write_rows(folder / "held-out.jsonl", held_out)
        write_rows(folder / CALIBRATION, [{"text": found.as_text(row)} for row in train])
        _write(folder / "federation.toml", "federation", said | {"min_nodes": max(3, 3 * nodes // 4)})
        load_config(folder / "federation.toml", ServerConfig)
        for number, shard in enumerate(shards):
            node = f"node-{number}"
            write_rows(folder / f"{node}.jsonl", shard)
            more = {"name": node, "data": f"{node}.jsonl", "state": f"{node}-state"}
            _write(folder / f"{node}.toml", "node", said | more)
            load_config(folder / f"{node}.toml", NodeConfig)
    for text in _next(folder, model, nodes):
        say(Console(), text)


def _placed(given: str) -> str:
    """A name as it is; a path so that it is found from the folder too."""
    return str(Path(given).resolve()) if Path(given).exists() else given


def _write(path: Path, template: str, values: Mapping[str, object]) -> None:
    """Write a TOML file from its template."""
    shown = {key: tomli_w.dumps({"_": value}).removeprefix("_ = ").rstrip() for key, value in values.items()}
    text = Path(__file__).with_name(f"{template}.template").read_text(encoding="utf-8")
    text = text.format(**shown, config=shlex.quote(os.path.relpath(path.resolve())))
    write_atomically(path, text.encode(), durable=False)


def _next(folder: Path, model: str, nodes: int) -> Iterator[str]:
    """What to type next."""
    mask, text, server, node = (
        shlex.quote(str(folder / name)) for name in ("mask.mkm", CALIBRATION, "federation.toml", "node-0.toml")
    )
    others = f"   # and node-1 to node-{nodes - 1}, each on its own machine or here"
    yield f"{folder}: federation.toml, {nodes} node files, their rows. Next, each in a terminal of its own:"
    yield ""
    yield f"  meerkat mask --model {shlex.quote(model)} --text {text} --out {mask}"
    yield f"  meerkat server --config {server}   # after `mosquitto` or `meerkat broker`"
    yield f"  meerkat node --config {node}{others}"
