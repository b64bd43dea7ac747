"""Masks and baselines that cells share: made once, kept in the sweep's folder."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from meerkat_mq.errors import ConfigError
from meerkat_mq.sweep.grid import Cell
from meerkat_mq.sweep.workers import Job, Outcome

FOLDER = "prepared"


@dataclass
class SharedFolder:
    """The folder of what cells share.

    Attributes:
        failed: why a file could not be made, by its path.
    """

    folder: Path
    failed: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out {self.folder.parent}", f"cannot be written ({error.strerror})", "choose another folder"
            ) from error

    def mask(self, cell: Cell) -> Path | None:
        """The cell's mask file; None where nothing is trained."""
        return None if cell.method.mask == "none" else self.folder / f"{cell.mask_key}.mkm"

    def baseline(self, cell: Cell) -> Path:
        """The evaluation of the untrained model."""
        return self.folder / f"{cell.baseline_key}.json"

    def jobs(self, cells: Iterable[Cell]) -> list[Job]:
        """What is still to be made for these cells."""
        jobs: dict[Path, Job] = {}
        for cell in cells:
            baseline, mask = self.baseline(cell), self.mask(cell)
            jobs.setdefault(baseline, Job(str(baseline), "make_baseline", (cell, baseline)))
            if mask is not None:
                jobs.setdefault(mask, Job(str(mask), "make_cell_mask", (cell, mask)))
        return [job for path, job in jobs.items() if not path.is_file()]

    def take(self, outcome: Outcome) -> None:
        """A job is done."""
        if outcome.error is not None:
            self.failed[outcome.job.name] = outcome

    @staticmethod
    def what(job: Job) -> str:
        """A job for people."""
        cell: Cell = job.arguments[0]
        axes = cell.axes
        if job.function == "make_baseline":
            return f"before training: {axes['task']}"
        return f"mask of {axes['method']}, seed {cell.mask_seed}"

    def failure(self, cell: Cell) -> Outcome | None:
        """Why a cell cannot run."""
        found = [self.failed.get(str(path)) for path in (self.baseline(cell), self.mask(cell))]
        return next((outcome for outcome in found if outcome is not None), None)
