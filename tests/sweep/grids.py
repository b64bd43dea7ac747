"""Small plans on a tiny model, and workers in this process."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from meerkat_mq.config import check_config
from meerkat_mq.sweep import cell as jobs
from meerkat_mq.sweep.grid import Cell, cells_of
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.sweep.rows import OWN_TASK
from meerkat_mq.sweep.workers import Job, Outcome
from meerkat_mq.tasks.data import write_rows
from tests.engines import tiny

TASK_FILE = """
name = "state"
template = "{line} The thing is"
label_words = [" broken", " running"]
max_tokens = 48
"""


def table(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A plan of two methods and two seeds, four rounds each."""
    write_rows(folder / "train.jsonl", tiny.ROWS[:48])
    write_rows(folder / "validation.jsonl", tiny.ROWS[48:])
    (folder / "task.toml").write_text(TASK_FILE)
    (folder / "text.txt").write_text("\n\n".join(tiny.TEXTS))
    files = {key: str(folder / f"{key}.jsonl") for key in ("train", "validation")}
    return {
        "model": str(model),
        "text": str(folder / "text.txt"),
        "calibration_sequences": 4,
        "calibration_tokens": 32,
        "nodes": 3,
        "passes": 8,
        "batch_size": 2,
        "seeds": [0, 1],
        "splits": [{"how": "iid"}],
        "tasks": [{"name": "state", "task": str(folder / "task.toml"), **files}],
        "methods": [
            {"name": "chosen", "mask": "magnitude", "density": 0.1, "lr": 0.01},
            {"name": "nothing", "mask": "none"},
        ],
        **changes,
    }


def plan(folder: Path, model: Path, **changes: Any) -> SweepPlan:
    return check_config(table(folder, model, **changes), SweepPlan, where="plan.toml")


def cells(made: SweepPlan) -> list[Cell]:
    return cells_of(made, jobs.identify(made, lambda _: None), OWN_TASK)


def figures(cell: Cell, folder: Path) -> dict[str, Any]:
    """A cell's figures, computed in this process."""
    mask, baseline = folder / f"{cell.mask_key}.mkm", folder / f"{cell.baseline_key}.json"
    jobs.make_baseline(cell, baseline, lambda _: None)
    if cell.method.mask == "none":
        return jobs.run_cell(cell, None, baseline, lambda _: None)
    jobs.make_cell_mask(cell, mask, lambda _: None)
    return jobs.run_cell(cell, mask, baseline, lambda _: None)


class WorkersHere:
    """Jobs one after the other, without processes.

    Attributes:
        done: function and name of every job.
        failing: functions whose jobs fail.
        before_job: called before each.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failing: set[str] = set()
        self.before_job: Callable[[Job], None] = lambda job: None
        self.shares: dict[str, float] = {}

    def __call__(self, processes: int) -> "WorkersHere":
        return self

    def __enter__(self) -> "WorkersHere":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, wanted: Sequence[Job], look: Callable[[], None] = lambda: None) -> Iterator[Outcome]:
        for job in wanted:
            self.before_job(job)
            self.done.append(job.function)
            look()
            if job.function in self.failing:
                yield Outcome(job, error="no luck today", trace="line 1\nline 2", seconds=0.1)
            else:
                value = getattr(jobs, job.function)(*job.arguments, lambda _: None)
                yield Outcome(job, value=value, seconds=0.1)
