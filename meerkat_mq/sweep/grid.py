"""The cells of a grid: what each one is, what it costs, and the key by which it is found again."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import ConfigError, DataError
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.sweep.plan import (
    PASSES_OF_A_GRADIENT,
    PASSES_OF_A_SCALAR,
    Layer,
    MethodPlan,
    SplitPlan,
    SweepPlan,
    TaskPlan,
)
from meerkat_mq.tasks.load import load_task
from meerkat_mq.tasks.sources import data_files
from meerkat_mq.tasks.task import Task

DEADLINE_S = 60.0
_NOT_DECIDING = {"tasks", "methods", "local_steps", "splits", "seeds", "watts", "text", "model", "prefix_mib"}


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        task: None: the demo's own.
        local_steps: T; None where there are no rounds.
        lr: None where nothing is trained.
        from_layer: None: all blocks may be masked.
        contents: hashes of the model and of every file, by what they are.
    """

    plan: SweepPlan
    method: MethodPlan
    task: TaskPlan | None
    described: Task
    split: SplitPlan
    local_steps: int | None
    seed: int
    lr: float | None
    contents: tuple[tuple[str, str], ...]
    from_layer: Layer | None = None

    @property
    def setting_key(self) -> str:
        """Hash of all that decides but its place in the grid: rows of one line of the table agree in it."""
        off = {"early_stopping"} if self.method.early_stopping.by == "off" else set()
        return hash_of(
            self.plan.model_dump(mode="json", exclude=_NOT_DECIDING),
            self.method.model_dump(mode="json", exclude={"lr", "text", "from_layer", *self.method.idle, *off}),
            self.described.describe().model_dump(mode="json"),
            self.contents,
        )

    @property
    def key(self) -> str:
        """Hash of everything that decides the cell's figures."""
        split = self.split.model_dump(mode="json", exclude_none=True)  # what is not said is not in older keys
        return hash_of(self.setting_key, split, self.local_steps, self.seed, self.lr, *self._layer)

    @property
    def _layer(self) -> tuple[Layer, ...]:
        """Absent where all blocks may be masked: keys of older cells are the same."""
        return () if self.from_layer is None else (self.from_layer,)

    @property
    def mask_seed(self) -> int:
        """The cell's, where the mask is a choice among weights."""
        return 0 if self.method.mask in ("dense", "lora") else self.seed

    @property
    def mask_key(self) -> str:
        """Hash of everything that decides the mask: cells share masks."""
        kinds = {"model", "text"} | ({"train"} if self.method.text == "task" else set())
        held_out = self.plan.tune_rows if self.method.text == "task" else 0
        return hash_of(
            self.method.model_dump(mode="json", include={"mask", "density", "rank"} - self.method.idle.keys()),
            self.plan.model_dump(mode="json", include={"calibration_sequences", "calibration_tokens", "device"}),
            (self.mask_seed, held_out, [item for item in self.contents if item[0] in kinds]),
            self.described.text_settings if self.method.text == "task" else None,
            *self._layer,
        )

    @property
    def baseline_key(self) -> str:
        """Hash of everything that decides the accuracy before training."""
        evaluation = {"dtype", "device", "eval_rows", "evaluate_on"} | ({"tune_rows"} if self.plan.tune_rows else set())
        return hash_of(
            self.plan.model_dump(mode="json", include=evaluation),
            self.described.describe().model_dump(mode="json"),
            [item for item in self.contents if item[0] in ("model", "train", "validation")],
        )

    @property
    def run_id(self) -> bytes:
        """16 bytes, of the seed alone: local step i of a node sees the same rows in every zeroth-order method."""
        return short_hash(f"sweep {self.seed}".encode())

    @property
    def axes(self) -> dict[str, Any]:
        """The cell's place in the grid, as in its row."""
        return {
            "method": self.method.name,
            "task": self.described.name if self.task is None else self.task.name,
            "split": self.split.shown,
            "local_steps": self.local_steps,
            "lr": self.lr,
            "from_layer": self.from_layer,
            "seed": self.seed,
        }

    @property
    def shown(self) -> str:
        """The place in the grid, for people."""
        axes = self.axes
        steps = "" if self.local_steps is None else f", T = {self.local_steps}"
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        rate += "" if self.from_layer is None else f", from layer {self.from_layer:g}"
        return f"{axes['method']}, {axes['task']}, {axes['split']}{steps}{rate}, seed {self.seed}"

    def settings(self, mask_hash: bytes, *, measured: bool) -> RoundSettings:
        """The rounds of a federated cell: as many as the budget holds, calibration rounds at their own length.

        Args:
            measured: whether the mask has a g_p; GradIP is measured only where early stopping needs it.

        Raises:
            ConfigError: the budget does not hold one round.
        """
        assert self.lr is not None
        assert self.local_steps is not None
        stopping = self.method.early_stopping
        if stopping.steps >= self.local_steps:
            stopping = EarlyStoppingConfig()  # it would change nothing
        one = RoundSettings(
            run_id=self.run_id,
            mask_hash=mask_hash,
            count=1,
            local_steps=self.local_steps,
            directions=self.method.directions,
            lr=self.lr,
            eps=self.method.eps,
            batch_size=self.plan.batch_size,
            min_nodes=self.plan.nodes,
            min_updates=1,
            quorum=1.0,
            deadline_s=DEADLINE_S,
            grace_s=0.0,
            perturbations=self.method.perturbations,
            early_stopping=stopping,
            measured=measured and stopping.by == "vpcs",
        )
        count = self.plan.rounds or self._rounds_within(one, self.plan.passes or 0)
        return one.model_copy(update={"count": count, "digest_every": count})

    def _rounds_within(self, settings: RoundSettings, passes: int) -> int:
        left, count = passes // (PASSES_OF_A_SCALAR * self.method.perturbations), 0
        while (left := left - settings.steps_of(count)) >= 0:
            count += 1
        if not count:
            raise ConfigError(
                "passes", f"{passes} do not hold one round of {self.shown}", "raise passes, or lower local_steps"
            )
        return count

    @property
    def gradient_steps(self) -> int:
        """Steps of first-order training: as many as a node's budget of passes holds."""
        assert self.plan.passes is not None
        return self.plan.passes // PASSES_OF_A_GRADIENT


def hash_of(*parts: Any) -> str:
    """A short name for what decides a result."""
    return short_hash(json.dumps(parts, sort_keys=True).encode()).hex()


def cells_of(plan: SweepPlan, model: str, own: Task) -> list[Cell]:
    """Every cell of a plan, one seed after the other, so that an interrupted grid has whole comparisons.

    Args:
        plan: checked.
        model: the checkpoint's fingerprint.
        own: the demo's task.

    Raises:
        MeerkatError: a task has no learning rate, a budget holds no round, or a task or file cannot be read.
    """
    cells = []
    for seed, task, split in product(plan.seeds, plan.tasks or (None,), plan.splits):
        described = own if task is None else load_task(task.task or task.name)
        if (limit := (task and task.max_tokens) or plan.max_tokens) is not None:
            described = described.with_limit(limit)
        for method in plan.methods:
            contents = tuple(_contents(plan, method, task, model).items())
            for steps, lr, layer in _points(plan, method, described.name if task is None else task.name):
                cells.append(Cell(plan, method, task, described, split, steps, seed, lr, contents, layer or None))
    for cell in cells:
        if cell.method.federated:
            cell.settings(bytes(16), measured=True)
    return list({cell.key: cell for cell in cells}.values())


def _points(plan: SweepPlan, method: MethodPlan, task: str) -> Iterator[tuple[int | None, float | None, Layer]]:
    """(T, learning rate, from_layer) of a method on a task."""
    rates = method.rates(task)
    if not rates and method.mask != "none":
        raise ConfigError(f"methods.{method.name}.lr", f"names none for task {task}", "add one")
    yield from product(plan.local_steps if method.federated else (None,), rates or (None,), method.from_layer)


def _contents(plan: SweepPlan, method: MethodPlan, task: TaskPlan | None, model: str) -> Mapping[str, str]:
    text = None if method.mask == "none" else method.text or plan.text
    sources = {
        "text": text if isinstance(text, Path) else None,
        "train": task.train if task is not None else None,
        "validation": task.validation if task is not None else None,
    }
    named = {kind: _file_hash(source) if isinstance(source, Path) else source or "" for kind, source in sources.items()}
    return {"model": model, **named, "task text": str(text == "task")}


@cache
def _file_hash(path: Path) -> str:
    """Of a file; of a folder, that of its files' names and hashes."""
    try:
        if path.is_dir():
            return hash_of([(file.name, _file_hash(file)) for file in data_files(path, texts=True)])
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "give the path of a file") from error
