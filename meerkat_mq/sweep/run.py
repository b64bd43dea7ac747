"""A sweep from its plan to its results: masks and baselines once, then cell by cell, in worker processes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from meerkat_mq.core.files import writing
from meerkat_mq.core.lock import locked
from meerkat_mq.demo.corpus import TASK
from meerkat_mq.errors import ModelError, RunError
from meerkat_mq.observe.signals import handled, interrupt
from meerkat_mq.observe.tables import say
from meerkat_mq.sweep.grid import Cell, cells_of
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.sweep.progress import SweepProgress
from meerkat_mq.sweep.results import SETTINGS, TABLE_FILE, Results
from meerkat_mq.sweep.rows import rows_of, shards_of
from meerkat_mq.sweep.workers import Job, Outcome, Workers

PREPARED = "prepared"  # what cells share: masks, and evaluations of the untrained model


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
            name = f"mask of {cell.method.name}, seed {cell.mask_seed}"
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
