"""A sweep from its plan to its results: masks and baselines once, then cell by cell, in worker processes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from meerkat_mq.core.lock import locked
from meerkat_mq.demo.corpus import TASK
from meerkat_mq.errors import ConfigError, ModelError, RunError
from meerkat_mq.observe.signals import Interrupted, handled, interrupt
from meerkat_mq.sweep.grid import Cell, cells_of
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.sweep.prepared import FOLDER, SharedFolder
from meerkat_mq.sweep.progress import SweepProgress
from meerkat_mq.sweep.results import TABLE_FILE, Results
from meerkat_mq.sweep.rows import rows_of, shards_of
from meerkat_mq.sweep.workers import Job, Workers

__all__ = ["Interrupted", "check_plan", "run_sweep"]


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
        with SweepProgress(console, cells, results.rows, processes) as progress:
            _run(cells, SharedFolder(out / FOLDER), workers, results, progress)
    failed = sum(not results.finished(cell.key) for cell in cells)
    console.print(f"Results: {out / TABLE_FILE}", soft_wrap=True, highlight=False, markup=False)
    if failed:
        raise RunError(
            str(out), f"{failed} of {len(cells)} cells failed", f"see {TABLE_FILE}; the same command tries them again"
        )


def check_plan(plan: SweepPlan) -> None:
    """Find what is wrong with a plan's files and budgets, before the model is looked for.

    Raises:
        MeerkatError: names the key or the file.
    """
    seen = set[tuple[str, str]]()
    for cell in cells_of(plan, "", TASK):
        place = (cell.axes["task"], cell.axes["split"])
        if place not in seen:
            seen.add(place)
            train, class_of = rows_of(cell).train, cell.described.class_of
            shards_of(train, plan.nodes, cell.split, seed=cell.seed, class_of=class_of)


def _run(
    cells: Sequence[Cell], shared: SharedFolder, workers: Workers, results: Results, progress: SweepProgress
) -> None:
    waiting = {cell.key: cell for cell in cells if not results.finished(cell.key)}
    for outcome in workers.run(shared.jobs(waiting.values()), lambda: progress.look(workers.shares)):
        shared.take(outcome)
        if outcome.error is None:
            progress.prepared(shared.what(outcome.job), outcome.seconds)
    jobs = list[Job]()
    for key, cell in waiting.items():
        failed = shared.failure(cell)
        if failed is None:
            jobs.append(Job(key, "run_cell", (cell, shared.mask(cell), shared.baseline(cell))))
        else:
            results.add(row_of(cell, failed.failure))
            progress.finished(cell, results.rows[key], {})
    for outcome in workers.run(jobs, lambda: progress.look(workers.shares)):
        cell = waiting[outcome.job.name]
        figures = outcome.value if outcome.error is None else outcome.failure
        results.add(row_of(cell, figures | {"seconds": round(outcome.seconds, 2)}))
        progress.finished(cell, results.rows[cell.key], workers.shares)


def row_of(cell: Cell, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `results.jsonl`: where in the grid, how it was run, what it came to."""
    plan, method = cell.plan, cell.method
    names = ("optimiser", "mask", "density", "rank", "eps", "directions", "perturbations")
    return {
        "key": cell.key,
        **cell.axes,
        "evaluated_on": plan.evaluate_on,
        "budget": f"{plan.rounds} rounds" if plan.passes is None else f"{plan.passes} passes",
        "setting": cell.setting_key,
        **{name: None if name in method.idle else getattr(method, name) for name in names},
        "early_stopping": method.early_stopping.by,
        "nodes": plan.nodes,
        "batch_size": plan.batch_size,
        "max_tokens": cell.described.max_tokens,
        "eval_rows": plan.eval_rows,
        "tune_rows": plan.tune_rows,
        "model": plan.model,
        "dtype": plan.dtype,
        "device": plan.device,
        **figures,
    }


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / "lock", f"--out {out}", "sweep"):
            yield
    except OSError as error:
        raise ConfigError(f"--out {out}", f"cannot be written ({error.strerror})", "choose another folder") from error
