"""`meerkat partition`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meerkat_mq.core.files import write_atomically
from meerkat_mq.errors import ConfigError, printable, shown_names
from meerkat_mq.tasks import data as files
from meerkat_mq.tasks.load import load_task
from meerkat_mq.tasks.sources import named_source


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Name --out, and the reason, where it cannot be written.

    Raises:
        ConfigError: of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {out}", f"cannot be written ({error.strerror})", "choose another place") from error


def partition(
    data: Annotated[str, typer.Argument(help="Rows to divide: JSON, CSV, TSV, a folder, or hf:… (docs/tasks.md).")],
    out: Annotated[Path, typer.Option(help="Folder for node-0.jsonl, node-1.jsonl, …")],
    nodes: Annotated[int, typer.Option(help="How many shards.")],
    task: Annotated[str, typer.Option(help="Built-in task or a task's TOML file.")],
    split: Annotated[files.Division, typer.Option(help="How rows are spread.")] = "dirichlet",
    alpha: Annotated[float, typer.Option(help="Of the Dirichlet distribution; smaller is more skewed.")] = 0.5,
    field: Annotated[str | None, typer.Option(help="Of --split field: each value is one node's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same shards.")] = 0,
) -> None:
    """Divide a data file into shards for nodes; a folder with shards of another division is left as it is."""
    if (field is not None) != (split == "field"):
        raise ConfigError("--field", "and --split field need each other", "give both or neither")
    found = load_task(task)
    rows = files.read_rows(named_source(data), found, field)
    shards = files.partition(rows, nodes, split, seed=seed, alpha=alpha, class_of=found.class_of, field=field)
    contents = {f"node-{number}.jsonl": files.encode_rows(rows) for number, rows in enumerate(shards)}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(out.glob("node-*.jsonl")):  # a folder keeps one division: it may be written to its end
            if contents.get(path.name) != path.read_bytes():
                remedy = "name a new folder, or remove the node-*.jsonl files that are there"
                raise ConfigError(f"--out {out}", f"holds {path.name} of another division", remedy)
        for name, content in contents.items():
            write_atomically(out / name, content)
    for name, shard in zip(contents, shards, strict=True):
        labels = f", by label {files.class_counts(shard, found)}" if found.classes else ""
        values = shown_names(sorted({files.value_of(row, field) for row in shard}), "") if field else ""
        said = printable(f"{out / name}: {len(shard)} rows{labels}" + f", {field} {values}" * bool(field))
        Console().print(said, markup=False, emoji=False, highlight=False, soft_wrap=True)
