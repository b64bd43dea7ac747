"""A sweep from its plan to its results: masks and baselines once, then cell by cell, in worker processes."""

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from meerkat_mq.core.files import writing
from meerkat_mq.core.lock import locked
from meerkat_mq.demo.corpus import TASK
from meerkat_mq.errors import ModelError, RunError
from meerkat_mq.observe.figures import DASH, duration
from meerkat_mq.observe.measure import ACCURACY, measure_of
from meerkat_mq.observe.signals import handled, interrupt
from meerkat_mq.observe.tables import say
from meerkat_mq.sweep.grid import Cell, cells_of
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.sweep.results import SETTINGS, TABLE_FILE, Results
from meerkat_mq.sweep.rows import rows_of, shards_of
from meerkat_mq.sweep.workers import Job, Outcome, Workers

PREPARED = "prepared"  # what cells share: masks, and evaluations of the untrained model
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
            outcome = _outcome(row)
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


def _outcome(row: Mapping[str, Any]) -> str:
    """The figure that a cell is judged by, before and after."""
    measure = measure_of({"accuracy": row["accuracy_before"], "perplexity": row.get("perplexity_before")}) or ACCURACY
    return f"{measure.shown(row[f'{measure.key}_before'])} → {measure.shown(row[measure.key])}"


def _kind(cell: Cell) -> Kind:
    axes = cell.axes
    return axes["method"], axes["task"]


def run_sweep(plan: SweepPlan, out: Path, processes: int, console: Console) -> None:
    """Run every cell that `out` has no row of, in `processes` processes at a time.

    Raises:
        MeerkatError: the plan, a file of it or `out` cannot be used.
        RunError: the grid is done, but for cells that failed.
        Interrupted: by a signal; no process is left, and every file is whole.
    """
    with _locked(out), handled(interrupt), Workers(processes) as workers:
        (outcome,) = workers.run([Job("model", "identify", (plan,))])
        if outcome.error is not None:
            raise ModelError("model", outcome.error)
        cells, results = cells_of(plan, outcome.value, TASK), Results(out)
        progress = SweepProgress(console, cells, results.rows, processes)
        with progress.bar:
            _run(cells, out / PREPARED, workers, results, progress)
    failed = sum(not results.finished(cell.key) for cell in cells)
    say(console, f"Results: {out / TABLE_FILE}")
    if failed:
        raise RunError(
            str(out), f"{failed} of {len(cells)} cells failed", f"see {TABLE_FILE}; the same command tries them again"
        )


def check_plan(plan: SweepPlan) -> None:
    """Find what is wrong with a plan's files and budgets, before the model is looked for; MeerkatError names it."""
    seen = set[tuple[str, str]]()
    for cell in cells_of(plan, "", TASK):
        place = (cell.axes["task"], cell.axes["split"])
        if place not in seen:
            seen.add(place)
            train, class_of = rows_of(cell).train, cell.described.class_of
            shards_of(train, plan.nodes, cell.split, seed=cell.seed, class_of=class_of)


def _run(cells: Sequence[Cell], shared: Path, workers: Workers, results: Results, progress: SweepProgress) -> None:
    waiting = {cell.key: cell for cell in cells if not results.finished(cell.key)}
    failed = _prepare(waiting.values(), shared, workers, progress)
    jobs = list[Job]()
    for key, cell in waiting.items():
        mask, baseline = _files(cell, shared)
        failure = failed.get(baseline) or failed.get(mask)
        if failure is None:
            jobs.append(Job(key, "run_cell", (cell, mask, baseline)))
        else:
            results.add(row_of(cell, failure.failure))
            progress.finished(cell, results.rows[key], {})
    for outcome in workers.run(jobs, lambda: progress.look(workers.shares)):
        cell = waiting[outcome.job.name]
        figures = outcome.value if outcome.error is None else outcome.failure
        results.add(row_of(cell, figures | {"seconds": round(outcome.seconds, 2)}))
        progress.finished(cell, results.rows[cell.key], workers.shares)


def _files(cell: Cell, shared: Path) -> tuple[Path | None, Path]:
    """A cell's mask, None where nothing is trained; and the evaluation of its model before training."""
    mask = None if cell.method.mask == "none" else shared / f"{cell.mask_key}.mkm"
    return mask, shared / f"{cell.baseline_key}.json"


def _prepare(
    cells: Iterable[Cell], shared: Path, workers: Workers, progress: SweepProgress
) -> dict[Path | None, Outcome]:
    """Make what these cells share, where it is not there yet; returns why a file could not be made."""
    with writing(f"--out {shared.parent}"):
        shared.mkdir(parents=True, exist_ok=True)
    jobs, failed = dict[Path, Job](), dict[Path | None, Outcome]()
    for cell in cells:
        mask, baseline = _files(cell, shared)
        jobs.setdefault(baseline, Job(f"before training: {cell.axes['task']}", "make_baseline", (cell, baseline)))
        if mask is not None:
            above = "" if cell.from_layer is None else f" from layer {cell.from_layer:g}"
            name = f"mask of {cell.method.name}{above}, seed {cell.mask_seed}"
            jobs.setdefault(mask, Job(name, "make_cell_mask", (cell, mask)))
    missing = [job for file, job in jobs.items() if not file.is_file()]
    for outcome in workers.run(missing, lambda: progress.look(workers.shares)):
        if outcome.error is None:
            progress.prepared(outcome.job.name, outcome.seconds)
        else:
            failed[outcome.job.arguments[-1]] = outcome
    return failed


def row_of(cell: Cell, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `results.jsonl`: where in the grid, how it was run, what it came to."""
    plan = cell.plan
    return {
        "key": cell.key,
        **cell.axes,
        "evaluated_on": plan.evaluate_on,
        "budget": f"{plan.rounds} rounds" if plan.passes is None else f"{plan.passes} passes",
        "setting": cell.setting_key,
        **{name: _setting(cell, name) for name in SETTINGS},
        **figures,
    }


def _setting(cell: Cell, name: str) -> Any:
    """None of one that decides nothing here."""
    method = cell.method
    if name == "early_stopping":
        return method.early_stopping.by
    if name == "max_tokens":
        return cell.described.max_tokens
    if name in method.idle:
        return None
    return getattr(method if name in type(method).model_fields else cell.plan, name)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / "lock", f"--out {out}", "sweep"):
            yield
