"""`meerkat chaos`: drills from the command line."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from meerkat_mq.chaos.drill import LOOK_S, Drill
from meerkat_mq.chaos.page import write_page
from meerkat_mq.chaos.plan import Plan, load_plan
from meerkat_mq.chaos.verdict import DrillResult, print_verdict, violations_shown
from meerkat_mq.core.files import write_atomically
from meerkat_mq.errors import ConfigError, DrillFailed
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.observe.process import run_task, say_error
from meerkat_mq.observe.signals import Interrupted

LOG_FILE = "drill.log"
VERDICT_FILE = "verdict.json"
REPORT_FILE = "report.html"


def command(
    plan: Annotated[str, typer.Argument(help="A plan's TOML file, or the name of one that comes with the package.")],
    seconds: Annotated[float | None, typer.Option(help="Duration, instead of the plan's; at least 5.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what the drill leaves; default: a new one below runs/chaos.")
    ] = None,
    buffered: Annotated[
        bool, typer.Option("--buffered", help="Rounds take what comes instead of waiting (docs/buffered.md).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Inject faults into a federation and check what must hold; exit code 0 only if all of it does."""
    folder = (out or Path("runs/chaos") / f"{Path(plan).stem}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    loaded = load_plan(plan, out=folder, seconds=seconds, buffered=buffered)
    try:
        run_task(lambda: _command(loaded, folder, as_json))
    except Interrupted as signal:
        problem, remedy = "was interrupted, so nothing is proven", "let it come to its end"
        say_error(DrillFailed(f"plan {loaded.name}", problem, remedy))
        raise typer.Exit(signal.exit_code) from None


async def _command(plan: Plan, out: Path, as_json: bool) -> None:
    console = Console(stderr=as_json)
    verdict = await run_drill(plan, out, console)
    print_verdict(console, verdict)
    console.print(f"Report: {out / REPORT_FILE}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(verdict.to_json() + "\n")
    if not verdict.holds:
        found = verdict.violations
        raise DrillFailed(
            f"plan {plan.name}",
            f"{violations_shown(len(found))}, the first: {found[0].checker}: {found[0].where}: {found[0].problem}",
            f"see {out / VERDICT_FILE}",
        )


async def run_drill(plan: Plan, out: Path, console: Console) -> DrillResult:
    """Run a drill with its progress on the console; leaves verdict.json and report.html in `out`.

    Raises:
        MeerkatError: the drill could not be carried out.
    """
    with (
        _log_in(out) as log,
        Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"), console=console,
            disable=not console.is_terminal,
        ) as bar,
    ):  # fmt: skip
        configure_logs(as_json=True, file=log)
        drill = Drill(plan, out, lambda line: console.print(_line(drill, line), markup=False, highlight=False))
        shown = asyncio.create_task(_show(drill, plan, bar))
        try:
            verdict = await drill.run()
        finally:
            shown.cancel()
    try:
        write_atomically(out / VERDICT_FILE, verdict.to_json().encode())
        write_page(out / REPORT_FILE, verdict)
    except OSError as error:
        raise ConfigError(f"--out {out}", f"cannot be written ({error.strerror})", "choose another folder") from error
    return verdict


def _log_in(out: Path) -> TextIO:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return (out / LOG_FILE).open("x", encoding="utf-8")
    except FileExistsError:
        if not out.is_dir():
            raise ConfigError(f"--out {out}", "cannot be written (File exists)", "choose another folder") from None
        raise ConfigError(f"--out {out}", "holds an earlier drill", "name another folder") from None
    except OSError as error:
        raise ConfigError(f"--out {out}", f"cannot be written ({error.strerror})", "choose another folder") from error


def _line(drill: Drill, text: str) -> str:
    return f"{drill.progress.seconds:6.1f} s  round {drill.progress.version:>5}  {text}"


async def _show(drill: Drill, plan: Plan, bar: Progress) -> None:
    task = bar.add_task(plan.name, total=len(plan.strikes), shown="")
    while True:
        now = drill.progress
        what = ", ".join(now.now) or "no fault"
        shown = f"{now.struck} of {len(plan.strikes)} faults · round {now.version:,} · {what}"
        bar.update(task, completed=now.struck, shown=shown)
        await asyncio.sleep(LOOK_S)
