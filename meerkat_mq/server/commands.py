"""`meerkat status`, `ledger`, `verify` and `report`: all that they need is a state_dir, also while its server runs."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meerkat_mq.core.files import writing
from meerkat_mq.errors import ConfigError
from meerkat_mq.extras import need
from meerkat_mq.ledger.folder import mask_of, verify_folder
from meerkat_mq.ledger.inspect import path_shown, rebuilt_path, round_shown, rounds_shown, run_shown, steps_shown
from meerkat_mq.ledger.shown import RoundShown, RunShown, StepShown, UpdateShown, json_line
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.verify import run_of
from meerkat_mq.observe.figures import duration
from meerkat_mq.observe.page import write_report
from meerkat_mq.observe.signals import Interrupted
from meerkat_mq.observe.tables import path_table, round_pages, round_table, say, status_line, status_table, step_table
from meerkat_mq.server.alive import is_alive
from meerkat_mq.server.reporting import PAGE_FILE, read_report

REFRESH_S = 1.0
PIPE_WIDTH = 200
STEPS_A_PAGE = 500
HIGHEST = 2**32 - 1
STOPPED = (KeyboardInterrupt, Interrupted)  # by Ctrl-C: how one ends a watch

StateDir = Annotated[Path, typer.Argument(help="The server's state_dir.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="JSON lines instead of tables.")]
ShownT = TypeVar("ShownT", RoundShown, UpdateShown)


def _console() -> Console:
    """Standard output; where nobody looks at its width, wide enough for any table."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


@contextmanager
def _ledger(folder: Path) -> Iterator[Ledger]:
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        yield ledger


def run_now(ledger: Ledger) -> RunShown:
    """The run as it stands, whether a server runs on its folder, and which certificates of that server expire soon."""
    from meerkat_mq.mqtt.expiry import kept  # noqa: PLC0415 - brings an MQTT library

    shown, folder = run_shown(ledger), ledger.path.parent
    warnings = filter(None, (shown.warning, *(expiry.warning() for expiry in kept(folder))))
    return replace(shown, running=is_alive(folder, shown.host), warning="; ".join(warnings))


def status(
    state_dir: StateDir,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Again each second, until the run is finished.")] = False,
    as_json: Json = False,
) -> None:
    """Show a run: accuracy, loss, round, whether the server is running; each node, its last verdict and virtual path.

    A node's updates are the messages that came with one, repeated ones too; its bytes are all that came from it;
    its GradIP is the mean size over the recent rounds.
    """
    console = _console()
    with _ledger(state_dir) as ledger:
        shown = run_now(ledger)
        if as_json or not (watch and console.is_terminal):
            _status_lines(console, ledger, shown, watch=watch, as_json=as_json)
            return
        with Live(status_table(shown), console=console, auto_refresh=False) as live, suppress(*STOPPED):
            while not shown.finished:
                time.sleep(REFRESH_S)
                shown = run_now(ledger)
                live.update(status_table(shown), refresh=True)


def _status_lines(console: Console, ledger: Ledger, shown: RunShown, *, watch: bool, as_json: bool) -> None:
    if not watch and not as_json:
        console.print(status_table(shown))
        return
    with suppress(*STOPPED):
        while True:
            say(console, json_line(shown) if as_json else status_line(shown))
            if not watch or shown.finished:
                return
            time.sleep(REFRESH_S)
            shown = run_now(ledger)


def ledger(
    state_dir: StateDir,
    *,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest rounds.")] = 20,
    first: Annotated[
        int | None, typer.Option("--from", min=0, max=HIGHEST, help="The first round, not --last.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many, with --from.")] = 20,
    version: Annotated[int | None, typer.Option("--round", min=0, max=HIGHEST, help="One round whole.")] = None,
    node: Annotated[str | None, typer.Option(help="What one node gave to these rounds.")] = None,
    gradip: Annotated[bool, typer.Option("--gradip", help="GradIP of each step, of all nodes or of --node.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="The virtual path of --node in --round, from theta.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a run's ledger holds: rounds, newest last; one round whole; one node's path; GradIP."""
    if rebuild and (version is None or node is None):
        raise ConfigError("--rebuild", "is for one node in one round", "give --round and --node too")
    if version is not None and node is not None and not (gradip or rebuild):
        raise ConfigError("--node", "is for many rounds, --round for one", "give one of the two, or --rebuild too")
    with _ledger(state_dir) as opened:
        start, number = (max(0, opened.version - last), last) if first is None else (first, count)
        if rebuild and version is not None and node is not None:
            _show_steps(_rebuilt(opened, state_dir, version, node), as_json=as_json)
        elif gradip:
            start, number = (start, number) if version is None else (version, 1)
            _show_steps(steps_shown(opened, node, start, number), as_json=as_json)
        elif version is not None:
            _show([round_shown(opened, version)], round_pages, as_json=as_json)
        elif node is not None:
            _show(path_shown(opened, node, start, number), path_table, as_json=as_json)
        else:
            _show(rounds_shown(opened, start, number), round_table, as_json=as_json)


def _show(rows: Iterable[ShownT], table: Callable[[Iterable[ShownT]], RenderableType], *, as_json: bool) -> None:
    console = _console()
    if not as_json:
        console.print(table(rows))
        return
    for row in rows:
        say(console, json_line(row))


def _show_steps(steps: Iterable[StepShown], *, as_json: bool) -> None:
    """As many as there are, in pages."""
    console, rows, head = _console(), iter(steps), True
    while page := list(islice(rows, STEPS_A_PAGE)):
        if as_json:
            for row in page:
                say(console, json_line(row))
        else:
            console.print(step_table(page, head=head))
        head = False


def _rebuilt(ledger: Ledger, folder: Path, version: int, node: str) -> Iterator[StepShown]:
    mask = mask_of(folder, run_of(ledger))
    with _progress("rebuilding theta") as progress:
        path = rebuilt_path(ledger, mask, version, node, progress)
        first = next(path)
    return chain([first], path)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where somebody sees it; to be told how many are done, of how many."""
    errors = Console(stderr=True)
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=errors, transient=True, disable=not errors.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def verify(
    state_dir: StateDir,
    *,
    mask: Annotated[Path | None, typer.Option(help="The run's mask file; default: the copy in state_dir.")] = None,
    model: Annotated[Path | None, typer.Option(help="An export (of any kind) to compare too; needs --base.")] = None,
    base: Annotated[str | None, typer.Option(help="What it was exported from: folder or hub id.")] = None,
) -> None:
    """Prove that the model is what the ledger says: rebuild it from the mask, and recompute every entry."""
    if (model is None) != (base is None):
        raise ConfigError("--model, --base", "only one of them was given", "give both, or neither")
    if model is not None:
        need("model", "meerkat verify --model")
    began = time.monotonic()
    with _progress("verifying") as progress:
        found = verify_folder(state_dir, mask=mask, model=model, base=base, progress=progress)
    also = f"; {', '.join(found.files)} too" if found.files else ""
    said = f"{found.rounds:,} rounds and {found.updates:,} updates are as they must be{also}"
    chain = "no chain: names and times were not compared" if found.chain is None else f"chain {found.chain.hex()}"
    say(Console(), f"{state_dir}: {said}; digest {found.digest.hex()}, {chain}, {duration(time.monotonic() - began)}")


def report(
    state_dir: StateDir,
    *,
    out: Annotated[Path | None, typer.Option(help="The page to write; default: report.html in state_dir.")] = None,
) -> None:
    """Make the page of a run, running, interrupted or finished: one HTML file, for a browser or a phone."""
    target = state_dir / PAGE_FILE if out is None else out
    with _progress("reading the ledger") as progress:
        made = read_report(state_dir, progress)
    with writing(str(target), "name another file with --out"):
        write_report(target, made)
    console = Console()
    if made.warning:
        say(console, f"warning: {made.warning}")
    closed = f"{made.closed:,} of {made.descriptor.count:,} rounds"
    say(console, f"Report: {target} ({made.standing.value}, {closed})")
