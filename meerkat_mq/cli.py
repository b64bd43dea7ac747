"""`meerkat`: the command line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meerkat_mq import __version__
from meerkat_mq.broker.__main__ import command as broker
from meerkat_mq.chaos.command import command as chaos
from meerkat_mq.chaos.simulator.command import command as simulate
from meerkat_mq.config import Dtype, ModelConfig, check_config
from meerkat_mq.errors import ConfigError, MeerkatError
from meerkat_mq.node.__main__ import command as node
from meerkat_mq.observe.process import run_service
from meerkat_mq.server.__main__ import command as server
from meerkat_mq.server.commands import ledger, status, verify
from meerkat_mq.sweep.command import command as sweep

app = typer.Typer(
    name="meerkat",
    help="Fine-tune language models across unreliable devices over plain MQTT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("server")(server)
app.command("node")(node)
app.command("broker")(broker)
app.command("simulate")(simulate)
app.command("chaos")(chaos)
app.command("sweep")(sweep)
app.command("status")(status)
app.command("ledger")(ledger)
app.command("verify")(verify)

Method = Literal["sensitivity", "magnitude-activation", "magnitude", "random", "dense", "lora"]
EarlyStopping = Literal["off", "vpcs", "random"]
Split = Literal["iid", "dirichlet", "one-label"]


def _version(wanted: bool) -> None:
    if wanted:
        Console().print(f"meerkat-mq {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Base model instead of the demo's: folder or hub id.")] = None,
    task: Annotated[str | None, typer.Option(help="Its task: a built-in one, or a TOML file.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its rows: JSON lines; a fifth is held out.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to score the mask on; default: the rows'.")] = None,
    nodes: Annotated[int, typer.Option(help="Node processes; the first holds one label only.")] = 4,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the run.")] = None,
    local_steps: Annotated[int, typer.Option(help="T, the steps of a node in a round; more make fewer rounds.")] = 1,
    early_stopping: Annotated[EarlyStopping, typer.Option(help="Find nodes of extremely skewed data.")] = "off",
    directions: Annotated[int | None, typer.Option(help="Direction lanes of a round.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of each linear matrix that is trained.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the model on nodes.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of data and mask.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for everything that the run leaves.")] = Path("runs/demo"),
) -> None:
    """Run a whole federation on this machine: broker, server and nodes, live progress, a report at the end."""
    from meerkat_mq.demo.plan import Choices, make_plan  # noqa: PLC0415

    choices = Choices(
        model=model,
        task=task,
        data=data,
        text=text,
        nodes=nodes,
        rounds=rounds,
        local_steps=local_steps,
        early_stopping=early_stopping,
        directions=directions,
        lr=lr,
        density=density,
        dtype=dtype,
        seed=seed,
    )
    plan = make_plan(choices)
    from meerkat_mq.demo.run import run_demo  # noqa: PLC0415 - after the checks: it imports torch

    sys.exit(run_service(lambda: run_demo(plan, out, Console())))


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {out}", f"cannot be written ({error.strerror})", "choose another place") from error


def _rows_source(given: str) -> Path | str:
    return given if given.startswith("hf:") else Path(given)


@app.command()
def mask(
    model: Annotated[str, typer.Option(help="Base model: local folder or hub id.")],
    text: Annotated[str, typer.Option(help="Calibration text: plain, or JSON lines, CSV or hf:… with a field text.")],
    out: Annotated[Path, typer.Option(help="Mask file to write.")],
    method: Annotated[
        Method, typer.Option(help="How weights are scored; or all of them, or an adapter.")
    ] = "sensitivity",
    density: Annotated[
        float | None,
        typer.Option(
            help="Share u of each linear matrix that is trained, 0 < u ≤ 1; not of dense and lora.",
            show_default="0.001",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter, with --method lora.", show_default="8")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of calibration text.")] = 100,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Order of the text, and the random mask.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<i>.")] = "cpu",
    dtype: Annotated[
        Dtype, typer.Option(help="Of the model while it is scored; it must hold the checkpoint exactly.")
    ] = "float32",
) -> None:
    """Score the weights of a model and write a mask."""
    from meerkat_mq.model.data import read_texts  # noqa: PLC0415 - torch only where a model is used
    from meerkat_mq.model.load import load_model  # noqa: PLC0415
    from meerkat_mq.model.masks import make_mask  # noqa: PLC0415

    for option, unused in (
        ("--density", density is not None and method in ("dense", "lora")),
        ("--rank", rank is not None and method != "lora"),
    ):
        if unused:
            raise ConfigError(option, f"means nothing to --method {method}", "leave it out")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}", "is not a file in a folder that exists", "make the folder, name the file")
    check_config({"source": model, "device": device}, ModelConfig, where="command line")
    texts, loaded = read_texts(_rows_source(text)), load_model(model, dtype=dtype, device=device)
    with Progress(
        TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("scoring")
        made = make_mask(
            loaded,
            texts,
            method,
            density=1e-3 if density is None else density,
            rank=8 if rank is None else rank,
            seed=seed,
            sequences=sequences,
            length=length,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    with _writing(out):
        made.save(out)
    Console().print(
        f"{out}: {made.size:,} of {made.covered:,} weights in {len(made.matrices)} matrices, hash {made.hash.hex()}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def partition(
    data: Annotated[str, typer.Argument(help="Rows to divide: JSON lines, CSV, or hf:… (docs/tasks.md).")],
    out: Annotated[Path, typer.Option(help="Folder for node-0.jsonl, node-1.jsonl, …")],
    nodes: Annotated[int, typer.Option(help="How many shards.")],
    task: Annotated[str, typer.Option(help="Built-in task or a task's TOML file.")],
    split: Annotated[Split, typer.Option(help="How labels are spread.")] = "dirichlet",
    alpha: Annotated[float, typer.Option(help="Of the Dirichlet distribution; smaller is more skewed.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same shards.")] = 0,
) -> None:
    """Divide a data file into shards for nodes."""
    from meerkat_mq.model import data as files  # noqa: PLC0415
    from meerkat_mq.model.tasks import load_task  # noqa: PLC0415

    found = load_task(task)
    shards = files.partition(
        files.read_rows(_rows_source(data), found), nodes, split, seed=seed, alpha=alpha, label_field=found.label_field
    )
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        path = out / f"node-{number}.jsonl"
        files.write_rows(path, rows)
        labels = [sum(row[found.label_field] == label for row in rows) for label in range(len(found.label_words))]
        Console().print(f"{path}: {len(rows)} rows, by label {labels}", highlight=False, soft_wrap=True)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's CA and all that it signs.")],
    federation: Annotated[str | None, typer.Option(help="Make the server's certificate, and Mosquitto's ACL.")] = None,
    broker: Annotated[
        list[str] | None, typer.Option(help="Make the broker's certificate, for this name or address; again for more.")
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option(help="Make a node's certificate, for this id; again for more.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=36_500, help="Validity of certificates.")] = 397,
    ca_days: Annotated[int, typer.Option(min=1, max=36_500, help="Validity of a new CA.")] = 3650,
    renew: Annotated[bool, typer.Option("--renew", help="Replace these certificates; the CA stays.")] = False,
) -> None:
    """Make certificates for a broker with TLS, the server and nodes; the first time, their CA too."""
    from meerkat_mq.broker.certs import write_certificates  # noqa: PLC0415 - slow to import

    if not (federation or broker or node):
        raise ConfigError("command line", "asks for no certificate", "add --federation, --broker or --node")
    for made in write_certificates(
        folder,
        federation=federation,
        hosts=broker or (),
        nodes=node or (),
        days=days,
        ca_days=ca_days,
        renew=renew,
    ):
        Console().print(f"{made.folder}: valid until {made.until:%Y-%m-%d}", highlight=False, soft_wrap=True)


@app.command()
def export(
    model: Annotated[str, typer.Option(help="Base model of the run: local folder or hub id.")],
    difference: Annotated[Path, typer.Option(help="difference.mkd from the server's state_dir.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet, or be empty.")],
) -> None:
    """Write the fine-tuned model as a Hugging Face folder."""
    from meerkat_mq.model.export import export_model  # noqa: PLC0415
    from meerkat_mq.wire.difference import Difference  # noqa: PLC0415

    found = Difference.load(difference)
    export_model(model, found.mask, found.theta, out)
    Console().print(
        f"{out}: version {found.version} of run {found.run_id.hex()[:8]}, {found.mask.size:,} weights trained",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    """Entry point: errors become one line on stderr and their exit code."""
    try:
        app()
    except MeerkatError as error:
        Console(stderr=True).print(f"meerkat: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
