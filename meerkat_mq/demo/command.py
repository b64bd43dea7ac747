"""`meerkat demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from meerkat_mq.broker.embedded import installed_program
from meerkat_mq.core.files import new_folder
from meerkat_mq.extras import importing, need
from meerkat_mq.observe.process import run_task

EarlyStopping = Literal["off", "vpcs", "random"]
SMOLLM2 = "smollm2"


def command(
    model: Annotated[
        str | None, typer.Option(help="Base model instead of the demo's: folder, hub id, or smollm2.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Its task: a built-in one, or a TOML file.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Its rows: JSON, CSV, TSV, a folder, or hf:…; a fifth is held out.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to score the mask on; default: the rows'.")] = None,
    nodes: Annotated[int, typer.Option(help="Node processes; where rows have labels, the first holds one only.")] = 4,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the run.")] = None,
    local_steps: Annotated[int, typer.Option(help="T, the steps of a node in a round; more make fewer rounds.")] = 1,
    early_stopping: Annotated[EarlyStopping, typer.Option(help="Find nodes of extremely skewed data.")] = "off",
    directions: Annotated[int | None, typer.Option(help="Direction lanes of a round.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of each linear matrix that is trained.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the model on nodes.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of data and mask.")] = 0,
    bound: Annotated[
        bool | None,
        typer.Option(
            "--bound/--no-bound",
            help="First-order training on the same mask afterwards, for comparison; default: not on your own --model.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for everything that the run leaves.", show_default="runs/demo, else runs/demo-2, …"
        ),
    ] = None,
) -> None:
    """Run a whole federation on this machine: broker, server and nodes, live progress, a report at the end."""
    choices = {option: value for option, value in locals().items() if option != "out"}
    need("model", "meerkat demo")
    installed_program()
    from meerkat_mq.demo.plan import Choices, make_plan  # noqa: PLC0415

    if model == SMOLLM2 and not Path(model).is_dir():
        with importing("model", "meerkat demo"):
            from meerkat_mq.engines.torch.smollm2 import smollm2_folder  # noqa: PLC0415

        choices["model"] = str(smollm2_folder())
    plan = make_plan(Choices(**choices))
    with importing("model", "meerkat demo"):  # after the checks: it takes seconds
        from meerkat_mq.demo.run import run_demo  # noqa: PLC0415

    folder = new_folder(out, Path("runs/demo"))
    run_task(lambda: run_demo(plan, folder, Console()))
