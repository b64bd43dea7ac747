"""Progress of a run while it goes on: a live display on a terminal, plain lines elsewhere."""

import math
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live as Display
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.text import Text

from meerkat_mq.errors import printable
from meerkat_mq.observe.events import Evaluated, RoundClosed, RunEvent, RunFinished, RunStarted, Warned
from meerkat_mq.observe.figures import DASH, Smoother, duration, human_bytes, named, percent
from meerkat_mq.observe.measure import measure_of
from meerkat_mq.observe.tables import say

REPORTS, STAGE_REPORTS = 20, 5
SMOOTHED_ROUNDS = 20


class Live:
    """Shows a run; used as a context manager, and as the run's observer within it.

    Args:
        console: where to; without a terminal it gets lines, an evaluation or 5 % of the rounds each.
        rounds: of the whole run.
        nodes: expected.
    """

    def __init__(self, console: Console, *, rounds: int, nodes: int) -> None:
        self._console = console
        self._rounds = rounds
        self._nodes = nodes
        self._last: RoundClosed | None = None
        self._evaluations: list[Evaluated] = []
        self._average = Smoother(SMOOTHED_ROUNDS)
        self._loss = 0.0
        self._spinner = Spinner("dots")
        self._stage = ""  # "" while rounds close
        self._early_stopped: list[str] = []
        columns = (BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True))
        self._progress = Progress(TextColumn("rounds"), *columns, TextColumn("left"), console=console)
        self._task = self._progress.add_task("rounds", total=rounds)
        self._display: Display | None = None
        if console.is_interactive:
            self._display = Display(console=console, get_renderable=self._render, refresh_per_second=5)

    def __enter__(self) -> Self:
        if self._display is not None:
            self._display.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stage = ""
        if self._display is not None:
            self._display.stop()

    def note(self, text: str) -> None:
        """Say which stage begins, e.g. "scoring the mask …"."""
        self._stage = printable(text)
        self._spinner.update(text=Text(self._stage))
        if self._display is None:
            say(self._console, text)
        else:
            self._display.refresh()

    def advance(self, done: int, total: int) -> None:
        """Say how far the stage is: on a terminal each time, else at each fifth."""
        if self._display is not None:
            self._spinner.update(text=Text(f"{self._stage}: {done:,} of {total:,}"))
        elif done * STAGE_REPORTS // total > (done - 1) * STAGE_REPORTS // total:
            say(self._console, f"{done:,} of {total:,} steps")

    def __call__(self, event: RunEvent) -> None:
        """Take an event of the server."""
        match event:
            case RunStarted():
                self.note(f"waiting for {self._nodes} {'node' if self._nodes == 1 else 'nodes'} …")
            case RoundClosed():
                self._closed(event)
            case Evaluated():
                self._evaluated(event)
            case Warned():
                say(self._console, f"warning: {event.text}")
            case RunFinished():
                say(
                    self._console, f"{event.version} rounds in {duration(event.seconds)}, theta's digest {event.digest}"
                )

    def _closed(self, event: RoundClosed) -> None:
        before = self._last.version if self._last else 0
        self._last, self._stage = event, ""
        if math.isfinite(event.loss):  # else it would be the average for good
            self._loss = self._average.add(event.loss)
        self._progress.update(self._task, completed=event.version)
        if event.judgements:
            found = [judgement.node for judgement in event.judgements if judgement.early_stopped]
            self._early_stopped = [f"early-stopped: {named(found)}"]
            calibrated = f"{len(event.judgements)} nodes calibrated"
            say(self._console, ", ".join([f"round {event.round}: {calibrated}", *self._early_stopped]))
        if self._display is None and event.version * REPORTS // self._rounds > before * REPORTS // self._rounds:
            done = f"{event.version} of {self._rounds} rounds ({event.version / self._rounds:.0%})"
            say(self._console, f"{done}: {', '.join(self._figures(event))}")

    def _evaluated(self, event: Evaluated) -> None:
        self._evaluations = [*self._evaluations[:1], event]
        if self._display is None:
            place = f"{event.version} of {self._rounds} rounds"
            say(self._console, f"{place}: {self._held_out()} on {event.rows:,} held-out rows")

    def _held_out(self) -> str:
        """The newest evaluation: the figure that it is judged by, or its loss where the task has no such figure."""
        if not self._evaluations:
            return f"accuracy {DASH}"
        first, last = self._evaluations[0], self._evaluations[-1]
        measure = measure_of(last.figures)
        if measure is None or measure.key not in first.figures:
            return f"held-out loss {last.loss:.4f}" + ("" if first is last else f" (from {first.loss:.4f})")
        start = f"from {measure.shown(first.figures[measure.key])}" if first is not last else ""
        if not start and "majority" in last.figures:
            start = f"majority {percent(last.figures['majority'])}"
        return f"{measure.words} {measure.shown(last.figures[measure.key])}" + f" ({start})" * bool(start)

    def _figures(self, last: RoundClosed) -> list[str]:
        return [
            f"loss {self._loss:.4f}",
            f"{last.online} of {self._nodes} nodes online",
            f"{human_bytes(last.bytes_up)} up",
            duration(last.seconds),
            *self._early_stopped,
        ]

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._last is not None:
            parts += [self._progress, Text(" · ".join([self._held_out(), *self._figures(self._last)]))]
        return Group(*parts, *([self._spinner] if self._stage else []))
