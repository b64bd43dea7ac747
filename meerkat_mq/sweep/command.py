"""`meerkat sweep`: a grid from the command line."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meerkat_mq.config import load_config
from meerkat_mq.errors import within
from meerkat_mq.extras import need
from meerkat_mq.observe.signals import Interrupted
from meerkat_mq.observe.tables import say
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.sweep.run import check_plan, run_sweep


def command(
    plan: Annotated[Path, typer.Argument(help="The plan's TOML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, masks and baselines; default: the plan's below runs/sweep.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Cells at a time; default: one a CPU.")] = None,
) -> None:
    """Run a grid of simulated federations; started again with the same folder, it goes on where it was."""
    need("model", "meerkat sweep")
    console = Console()
    folder = out or Path("runs/sweep") / plan.stem
    loaded = load_config(plan, SweepPlan)
    with within(str(plan)):
        check_plan(loaded)
        if any(method.mask == "lora" for method in loaded.methods):
            need("lora", 'a method with mask = "lora"')
    try:
        run_sweep(loaded, folder, processes or os.cpu_count() or 1, console)
    except Interrupted as signal:
        say(console, f"{signal.word}; the same command goes on from {folder}")
        raise typer.Exit(signal.exit_code) from None
