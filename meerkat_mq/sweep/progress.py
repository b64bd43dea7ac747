"""What people see of a sweep: a line a cell, and on a terminal a bar with the time left."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from meerkat_mq.observe.figures import DASH, duration, percent
from meerkat_mq.observe.tables import say
from meerkat_mq.sweep.grid import Cell

Kind = tuple[str, str]
LEAST_SHARE = 0.02  # of a cell that must be done to tell how long it takes


class Estimate:
    """How long the rest takes: by what finished cells of the same method and task took."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._seconds: dict[Kind, list[float]] = {}

    def add(self, kind: Kind, seconds: float) -> None:
        """A cell took so long."""
        self._seconds.setdefault(kind, []).append(seconds)

    def left(self, waiting: Sequence[Kind], running: Sequence[tuple[Kind, float, float]]) -> float | None:
        """Seconds until all cells are done, those that wait and those that run: (cell, seconds so far, share done)."""
        known = {kind: statistics.fmean(seconds) for kind, seconds in self._seconds.items()}
        for kind, seconds, share in running:
            if share > LEAST_SHARE:
                known.setdefault(kind, seconds / share)
        if not known:
            return None
        guess = statistics.fmean(known.values())
        rest = [max(0.0, known.get(kind, guess) * (1 - share)) for kind, _, share in running]
        work = sum(known.get(kind, guess) for kind in waiting) + sum(rest)
        return max([work / self._processes, *rest])


class SweepProgress:
    """Shows how far a grid is, within its `bar`."""

    def __init__(
        self, console: Console, cells: Sequence[Cell], rows: Mapping[str, Mapping[str, Any]], processes: int
    ) -> None:
        self._console = console
        self._cells = {cell.key: cell for cell in cells}
        self._estimate = Estimate(processes)
        self._began: dict[str, float] = {}
        self._done = {key for key in self._cells if key in rows and "failed" not in rows[key]}
        for key in self._done:
            self._estimate.add(_kind(self._cells[key]), float(rows[key]["seconds"]))
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self.bar.add_task("preparing", total=len(cells), completed=len(self._done), shown="")
        if self._done:
            say(self._console, f"{len(self._done)} of {len(cells)} cells are done already")

    def prepared(self, what: str, seconds: float) -> None:
        """Something that cells share was made."""
        say(self._console, f"{what}, {duration(seconds)}")

    def look(self, shares: Mapping[str, float]) -> None:
        """Move the bar."""
        for name in shares:
            self._began.setdefault(name, time.monotonic())
        running = sum(share for name, share in shares.items() if name in self._cells)
        self.bar.update(
            self._task,
            completed=len(self._done) + running,
            shown=f"{len(self._done)} of {len(self._cells)} cells, {self._left(shares)}",
            description="sweeping" if any(name in self._cells for name in shares) else "preparing",
        )

    def finished(self, cell: Cell, row: Mapping[str, Any], shares: Mapping[str, float]) -> None:
        """A cell has its row."""
        self._done.add(cell.key)
        if "failed" in row:
            outcome = f"failed: {row['failed']}"
        else:
            self._estimate.add(_kind(cell), float(row["seconds"]))
            outcome = f"{percent(row['accuracy_before'])} → {percent(row['accuracy'])}"
            outcome += ", diverged" if row.get("diverged") else ""
            outcome += f", {duration(row['seconds'])}"
        say(self._console, f"{len(self._done)} of {len(self._cells)}  {cell.shown}: {outcome}; {self._left(shares)}")

    def _left(self, shares: Mapping[str, float]) -> str:
        now = time.monotonic()
        running = [
            (_kind(self._cells[name]), now - self._began.get(name, now), share)
            for name, share in shares.items()
            if name in self._cells
        ]
        waiting = [_kind(cell) for key, cell in self._cells.items() if key not in self._done and key not in shares]
        seconds = self._estimate.left(waiting, running)
        return f"about {DASH if seconds is None else duration(seconds)} left"


def _kind(cell: Cell) -> Kind:
    axes = cell.axes
    return axes["method"], axes["task"]
