"""`meerkat chaos`: drills from the command line."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from meerkat_mq.chaos.drill import Drill, new_file
from meerkat_mq.chaos.plan import Plan, load_plan
from meerkat_mq.chaos.verdict import DrillResult, print_verdict, render, violations_shown
from meerkat_mq.core.files import write_atomically, writing
from meerkat_mq.errors import DrillFailed
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.observe.process import run_task, say_error
from meerkat_mq.observe.signals import Interrupted
from meerkat_mq.observe.tables import say

LOG_FILE = "drill.log"
VERDICT_FILE = "verdict.json"
REPORT_FILE = "report.html"
LOOK_S = 0.25


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
    verdict = await _drill(plan, out, console)
    with writing(f"--out {out}"):
        write_atomically(out / VERDICT_FILE, verdict.to_json().encode())
        write_atomically(out / REPORT_FILE, render(verdict).encode("utf-8", errors="replace"))
    print_verdict(console, verdict)
    say(console, f"Report: {out / REPORT_FILE}")
    if as_json:
        sys.stdout.write(verdict.to_json() + "\n")
    if not verdict.holds:
        found = verdict.violations
        raise DrillFailed(
            f"plan {plan.name}",
            f"{violations_shown(len(found))}, the first: {found[0].checker}: {found[0].where}: {found[0].problem}",
            f"see {out / VERDICT_FILE}",
        )


async def _drill(plan: Plan, out: Path, console: Console) -> DrillResult:
    """Run a drill with its progress on the console."""

    def tell(line: str) -> None:
        now = f"{drill.clock():6.1f} s  round {drill.seen.version:>5}  {line}"
        console.print(now, markup=False, highlight=False)

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}")
    drill = Drill(plan, out, tell)
    with (
        new_file(out, LOG_FILE) as log,
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
    ):
        configure_logs(as_json=True, file=log)
        shown = asyncio.create_task(_show(drill, plan, bar))
        try:
            return await drill.run()
        finally:
            shown.cancel()


async def _show(drill: Drill, plan: Plan, bar: Progress) -> None:
    task = bar.add_task(plan.name, total=len(plan.strikes), shown="")
    while True:
        struck, what = len(drill.happened), ", ".join(drill.now) or "no fault"
        shown = f"{struck} of {len(plan.strikes)} faults · round {drill.seen.version:,} · {what}"
        bar.update(task, completed=struck, shown=shown)
        await asyncio.sleep(LOOK_S)
