"""What `meerkat demo` runs: its own model and lines, or the model and data that it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meerkat_mq.config import EarlyStoppingConfig, RoundsConfig, check_config
from meerkat_mq.core.step import Row
from meerkat_mq.demo.corpus import TASK, pretraining_text, triage_rows
from meerkat_mq.demo.settings import DEMO, WEIGHTS
from meerkat_mq.errors import ConfigError, DataError
from meerkat_mq.tasks.data import ClassOf, hold_out, partition, read_rows, read_texts
from meerkat_mq.tasks.load import load_task
from meerkat_mq.tasks.task import Task

HELD_OUT = 0.2
GIVEN_STEPS = 100  # of a node, on a model that is given


@dataclass(frozen=True)
class Choices:
    """The command line's choices; None where the demo's own default stands."""

    model: str | None = None
    task: str | None = None
    data: Path | str | None = None
    text: Path | str | None = None
    nodes: int = DEMO.nodes
    rounds: int | None = None
    local_steps: int = DEMO.local_steps
    early_stopping: Literal["off", "vpcs", "random"] = "off"
    directions: int | None = None
    lr: float | None = None
    density: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    bound: bool | None = None


@dataclass(frozen=True)
class DemoPlan:
    """A demo, ready to run.

    Attributes:
        name: of the model, for people.
        calibration: text that scores the mask, made when it is needed.
        shards: the rows of each node; the first node's have one label only.
        sequences: of calibration text, of `length` tokens.
        bound: whether first-order training on the same mask follows, for comparison: on a model of one's own it may
            take longer, and far more memory, than the run itself.
        first_order_steps: of AdamW with `first_order_lr`, for the bound.
    """

    source: str
    name: str
    task: Task
    calibration: Callable[[], Sequence[str]]
    shards: Sequence[Sequence[Row]]
    held_out: Sequence[Row]
    rounds: RoundsConfig
    early_stopping: EarlyStoppingConfig
    density: float
    sequences: int
    length: int
    bound: bool
    first_order_steps: int
    first_order_lr: float
    dtype: Literal["float32", "bfloat16"]
    seed: int


def make_plan(choices: Choices) -> DemoPlan:
    """Fill in what was not chosen.

    Raises:
        MeerkatError: a choice lacks another, or a file cannot be used.
    """
    if choices.nodes < 2:
        raise ConfigError("--nodes", f"{choices.nodes} is below 2", "a federation needs two nodes")
    if choices.directions is not None and choices.directions > choices.nodes:
        raise ConfigError("--directions", f"{choices.directions} lanes for {choices.nodes} nodes", "lower it")
    if choices.density is not None and not 0 < choices.density <= 1:
        raise ConfigError("--density", f"{choices.density} is outside (0, 1]", "0.001 is common")
    if choices.seed < 0:
        raise ConfigError("--seed", f"{choices.seed} is below 0", "use 0 or more")
    given = [choices.model, choices.task, choices.data, choices.text]
    if given == [None, None, None, None]:
        return _own(choices)
    if choices.model is None or choices.task is None or choices.data is None:
        problem = "go together, and --text goes with them"
        raise ConfigError("--model, --task, --data", problem, "give all three, or none for the demo's own model")
    return _given(choices, choices.model, load_task(choices.task), choices.data)


def _own(choices: Choices) -> DemoPlan:
    early_stopping = DEMO.early_stopping.model_copy(update={"by": choices.early_stopping})
    rows = triage_rows(choices.seed, DEMO.training_rows, "train")
    return DemoPlan(
        source=str(WEIGHTS),
        name="meerkat-demo (Llama architecture)",
        task=TASK,
        calibration=lambda: list(pretraining_text(1000, DEMO.calibration_lines)),
        shards=shards(rows, choices.nodes, TASK.class_of, choices.seed),
        held_out=triage_rows(choices.seed, DEMO.held_out_rows, "held-out"),
        rounds=_rounds(
            choices,
            count=_count(DEMO.rounds, choices, early_stopping),
            directions=min(DEMO.directions, choices.nodes),
            lr=DEMO.lr,
            eps=DEMO.eps,
            batch_size=DEMO.batch,
        ),
        early_stopping=early_stopping,
        density=DEMO.density if choices.density is None else choices.density,
        sequences=DEMO.calibration_sequences,
        length=DEMO.calibration_tokens,
        bound=choices.bound is not False,
        first_order_steps=150,
        first_order_lr=1e-2,
        dtype=choices.dtype,
        seed=choices.seed,
    )


def _given(choices: Choices, model: str, task: Task, data: Path | str) -> DemoPlan:
    rows = read_rows(data, task)
    train, held_out = hold_out(rows, HELD_OUT, seed=choices.seed, class_of=task.class_of)
    if not held_out:
        problem = f"{len(rows)} rows, no two of one label: none can be held out"
        raise DataError(str(data), problem, "give more rows")
    text, early_stopping = choices.text, EarlyStoppingConfig(by=choices.early_stopping)
    count = _count(GIVEN_STEPS, choices, early_stopping)

    def calibration() -> Sequence[str]:
        return read_texts(text) if text is not None else [task.as_text(row) for row in train]

    return DemoPlan(
        source=model,
        name=model,
        task=task,
        calibration=calibration,
        shards=shards(train, choices.nodes, task.class_of, choices.seed),
        held_out=held_out,
        rounds=_rounds(choices, count=count, directions=choices.nodes, lr=1e-3, eps=1e-3, batch_size=16),
        early_stopping=early_stopping,
        density=1e-3 if choices.density is None else choices.density,
        sequences=100,
        length=512 if text is not None else 128,
        bound=choices.bound is True,
        first_order_steps=100,
        first_order_lr=1e-3,
        dtype=choices.dtype,
        seed=choices.seed,
    )


def _count(steps: int, choices: Choices, config: EarlyStoppingConfig) -> int:
    """Rounds in which a node does about so many local steps, at least half of them after a calibration."""
    if config.by == "off" or choices.local_steps <= config.steps:
        return max(1, steps // max(1, choices.local_steps))
    return 1 + max(1, max(steps // 2, steps - config.calibration_steps) // choices.local_steps)


def _rounds(choices: Choices, **defaults: float) -> RoundsConfig:
    chosen = {"count": choices.rounds, "directions": choices.directions, "lr": choices.lr}
    always = {"local_steps": choices.local_steps, "min_nodes": choices.nodes, "min_updates": min(3, choices.nodes)}
    table = defaults | always | {key: value for key, value in chosen.items() if value is not None}
    return check_config(table, RoundsConfig, where="command line")


def shards(rows: Sequence[Row], nodes: int, class_of: ClassOf, seed: int) -> list[list[Row]]:
    """One shard a node, of about equal size: the first holds one label only, the others are IID.

    Raises:
        DataError: too few rows, or one label only.
    """
    labels = sorted({class_of(row) for row in rows})
    if len(rows) < 2 * nodes or len(labels) < 2:
        raise DataError("data", f"{len(rows)} rows of {len(labels)} labels are too few for {nodes} nodes", "give more")
    only = labels[(1 + seed) % len(labels)]
    same = [row for row in rows if class_of(row) == only]
    size = min(len(same), len(rows) // nodes)
    rest = same[size:] + [row for row in rows if class_of(row) != only]
    return [same[:size], *partition(rest, nodes - 1, "iid", seed=seed, class_of=class_of)]
