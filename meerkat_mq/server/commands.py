"""`meerkat status`, `ledger` and `verify`: all that they need is a server's state_dir, also while the server runs."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meerkat_mq.errors import ConfigError
from meerkat_mq.observe.figures import duration
from meerkat_mq.observe.tables import (
    RoundShown,
    RunShown,
    UpdateShown,
    json_line,
    path_table,
    round_pages,
    round_table,
    say,
    status_line,
    status_table,
)
from meerkat_mq.server.inspect import path_shown, round_shown, rounds_shown, run_shown
from meerkat_mq.server.ledger import LEDGER_FILE, Ledger
from meerkat_mq.server.verify import verify_folder

REFRESH_S = 1.0
PIPE_WIDTH = 200
HIGHEST = 2**32 - 1

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


def status(
    state_dir: StateDir,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Again each second, until the run is finished.")] = False,
    as_json: Json = False,
) -> None:
    """Show how a run stands: round, pace, loss, and each node with its last verdict.

    A node's updates are the messages that came with one, repeated ones too; its bytes are all that came from it.
    """
    console = _console()
    with _ledger(state_dir) as ledger:
        shown = run_shown(ledger)
        if as_json or not (watch and console.is_terminal):
            _status_lines(console, ledger, shown, watch=watch, as_json=as_json)
            return
        with Live(status_table(shown), console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
            while shown.version < shown.rounds:
                time.sleep(REFRESH_S)
                shown = run_shown(ledger)
                live.update(status_table(shown), refresh=True)


def _status_lines(console: Console, ledger: Ledger, shown: RunShown, *, watch: bool, as_json: bool) -> None:
    if not watch and not as_json:
        console.print(status_table(shown))
        return
    with suppress(KeyboardInterrupt):
        while True:
            say(console, json_line(shown) if as_json else status_line(shown))
            if not watch or shown.version >= shown.rounds:
                return
            time.sleep(REFRESH_S)
            shown = run_shown(ledger)


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
    as_json: Json = False,
) -> None:
    """Show what a run's ledger holds: rounds, newest last; one round whole; or one node's path."""
    if version is not None and node is not None:
        raise ConfigError("--node", "is for many rounds, --round for one", "give one of the two")
    with _ledger(state_dir) as opened:
        start, number = (max(0, opened.version - last), last) if first is None else (first, count)
        if version is not None:
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


def verify(
    state_dir: StateDir,
    *,
    mask: Annotated[Path | None, typer.Option(help="The run's mask file; default: the copy in state_dir.")] = None,
    model: Annotated[Path | None, typer.Option(help="An exported model to compare too; needs --base.")] = None,
    base: Annotated[str | None, typer.Option(help="What it was exported from: folder or hub id.")] = None,
) -> None:
    """Prove that the model is what the ledger says: rebuild it from the mask, and recompute every entry."""
    if (model is None) != (base is None):
        raise ConfigError("--model", "and --base belong together", "give both, or neither")
    began, errors = time.monotonic(), Console(stderr=True)
    with Progress(
        TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=errors, transient=True, disable=not errors.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("verifying")
        found = verify_folder(
            state_dir,
            mask=mask,
            model=model,
            base=base,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    also = f"; {', '.join(found.files)} too" if found.files else ""
    said = f"{found.rounds:,} rounds and {found.updates:,} updates are as they must be{also}"
    say(Console(), f"{state_dir}: {said}; digest {found.digest.hex()}, {duration(time.monotonic() - began)}")
