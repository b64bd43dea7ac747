"""`meerkat init`: the folder of a new federation, whose files run as they are."""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import tomli_w
import typer
from rich.console import Console

from meerkat_mq.config import NodeConfig, ServerConfig, check_config, load_config
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.step import Row
from meerkat_mq.errors import ConfigError
from meerkat_mq.observe.tables import say
from meerkat_mq.tasks.task import Task

HELD_OUT_EVERY: Final = 5  # of the rows with a label, every fifth is held out
MOST_NODES: Final = 1000
CALIBRATION: Final = "calibration.jsonl"  # the rows' text, until there is some like what the model was pretrained on

SERVER_TOML = """\
# The server: meerkat server --config {config}
# Every key is explained in docs/configuration.md.
federation = {federation}
state_dir = "server-state"        # the run: ledger, snapshots, model. A new run wants a new folder
mask = "mask.mkm"                 # `meerkat mask` makes it
task = {task}

[broker]
url = {url}

[rounds]
count = 200                       # rounds of the run
min_nodes = {min_nodes}                     # nodes that must be there before a round opens
quorum = 0.75                     # share of them that a round needs
deadline_s = 60                   # a round with its quorum closes at the latest then
lr = 1e-3                         # too high: the loss rises, and the server warns; too low: nothing moves

[model]                           # only to evaluate; without these two sections the server needs no PyTorch
source = {model}

[evaluation]
data = "held-out.jsonl"           # rows that no node has
every = 10
"""
NODE_TOML = """\
# A node: meerkat node --config {config}
id = {name}
federation = {federation}
data = {data}    # its own rows; they never leave it
model = {model}                   # the same base model on every machine
state_dir = {state}

[broker]
url = {url}
"""


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
    from meerkat_mq.tasks.data import partition, read_rows  # noqa: PLC0415
    from meerkat_mq.tasks.load import load_task  # noqa: PLC0415
    from meerkat_mq.tasks.sources import named_source  # noqa: PLC0415

    a_node = {"id": "node-0", "federation": name, "data": "rows", "state_dir": "state", "broker": {"url": broker}}
    check_config(a_node, NodeConfig, where="command line")
    found = load_task(task)
    rows = read_rows(named_source(data), found)
    held_out, train = divided(rows, found)
    shards = partition(train, nodes, "iid", seed=0, class_of=found.class_of)
    _make(folder)
    place = _Places(folder.resolve(), name, _placed(model), _placed(task), broker)
    try:
        _write(place, found, shards, held_out)
    except OSError as error:
        raise ConfigError(str(folder), f"cannot be written ({error.strerror})", "choose another folder") from error
    for text in _next(folder, model, nodes):
        say(Console(), text)


def divided(rows: Sequence[Row], task: Task) -> tuple[list[Row], list[Row]]:
    """Held-out rows, every fifth of each label, and the others."""
    seen: dict[int, int] = {}
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        found = task.class_of(row)
        number = seen[found] = seen.get(found, -1) + 1
        parts[number % HELD_OUT_EVERY != HELD_OUT_EVERY - 1].append(row)
    return parts


def _placed(given: str) -> str:
    """A name as it is; a path so that it is found from the folder too."""
    return str(Path(given).resolve()) if Path(given).exists() else given


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(str(folder), "has something in it", "name a new folder")
    except OSError as error:
        raise ConfigError(str(folder), f"cannot be made ({error.strerror})", "choose another folder") from error


class _Places:
    """What all files of a federation say alike."""

    def __init__(self, folder: Path, federation: str, model: str, task: str, url: str) -> None:
        self.folder = folder
        self.said = {"federation": federation, "model": model, "task": task, "url": url}

    def toml(self, template: str, path: Path, **values: object) -> None:
        """Write a file from its template, and see that it can be read."""
        shown = {key: _toml(value) for key, value in (self.said | values).items()}
        text = template.format(**shown, config=shlex.quote(os.path.relpath(path)))
        write_atomically(path, text.encode(), durable=False)


def _toml(value: object) -> str:
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").rstrip()


def _write(place: _Places, task: Task, shards: Sequence[Sequence[Row]], held_out: Sequence[Row]) -> None:
    from meerkat_mq.tasks.data import write_rows  # noqa: PLC0415

    nodes, folder = len(shards), place.folder
    write_rows(folder / "held-out.jsonl", held_out)
    write_rows(folder / CALIBRATION, [{"text": task.as_text(row)} for rows in shards for row in rows])
    place.toml(SERVER_TOML, folder / "federation.toml", min_nodes=max(3, 3 * nodes // 4))
    load_config(folder / "federation.toml", ServerConfig)
    for number, rows in enumerate(shards):
        name = f"node-{number}"
        write_rows(folder / f"{name}.jsonl", rows)
        place.toml(NODE_TOML, folder / f"{name}.toml", name=name, data=f"{name}.jsonl", state=f"{name}-state")
        load_config(folder / f"{name}.toml", NodeConfig)


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
