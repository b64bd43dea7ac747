"""What `meerkat demo` runs: its own model and lines, or the model and data that it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from meerkat_mq.config import EarlyStoppingConfig, RoundsConfig, check_config
from meerkat_mq.core.step import Row
from meerkat_mq.demo.corpus import TASK, pretraining_text, triage_rows
from meerkat_mq.demo.settings import DEMO, GIVEN, GIVEN_TEXT_TOKENS, OWN_LINES, WEIGHTS, DemoSettings
from meerkat_mq.errors import ConfigError, DataError
from meerkat_mq.tasks.data import ClassOf, hold_out, partition, read_rows, read_texts
from meerkat_mq.tasks.load import load_task
from meerkat_mq.tasks.sources import named_source
from meerkat_mq.tasks.task import Task

HELD_OUT = 0.2
EVALUATIONS = 12


@dataclass(frozen=True)
class Choices:
    """The options of the command line; None where the demo's own default stands."""

    model: str | None = None
    task: str | None = None
    data: str | None = None
    text: str | None = None
    nodes: int = 4
    rounds: int | None = None
    local_steps: int = 1
    early_stopping: Literal["off", "vpcs", "random"] = "off"
    directions: int | None = None
    lr: float | None = None
    density: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    bound: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """A federation that is ready to run, and what comes before and after it.

    Attributes:
        source: base model, folder or hub id.
        name: of the model, for people.
        task: what its rows mean.
        calibration: text that scores the mask, made when it is needed.
        shards: the rows of each node; the first node's have one label only.
        held_out: rows that the server evaluates on, every so many rounds.
        settings: of the mask, and of the first-order training.
        bound: whether first-order training on the same mask follows, for comparison: on a model of one's own it may
            take longer, and far more memory, than the run itself.
    """

    source: str
    name: str
    task: Task
    calibration: Callable[[], list[str]]
    shards: Sequence[Sequence[Row]]
    held_out: Sequence[Row]
    every: int
    rounds: RoundsConfig
    early_stopping: EarlyStoppingConfig
    dtype: Literal["float32", "bfloat16"]
    settings: DemoSettings
    bound: bool
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
    data = [choices.task, choices.data, choices.text]
    if data == [None, None, None]:
        return _own(choices)
    if choices.model is None or choices.task is None or choices.data is None:
        problem = "go together, and --text goes with them"
        raise ConfigError(
            "--model, --task, --data", problem, "give all three, or --model alone for the demo's own lines"
        )
    return _given(choices, choices.model, load_task(choices.task), choices.data)


def _own(choices: Choices) -> DemoPlan:
    """The demo's own lines, for its own model or another."""
    source, settings = (str(WEIGHTS), DEMO) if choices.model is None else (choices.model, OWN_LINES)
    train = triage_rows(choices.seed, settings.training_rows, "train")
    held_out = triage_rows(choices.seed, settings.held_out_rows, "held-out")

    def calibration() -> list[str]:
        return list(pretraining_text(1000, settings.calibration_lines))

    return _plan(choices, settings, TASK, source=source, train=train, held_out=held_out, calibration=calibration)


def _given(choices: Choices, model: str, task: Task, data: str) -> DemoPlan:
    rows, text = read_rows(named_source(data), task), choices.text
    train, held_out = hold_out(rows, HELD_OUT, seed=choices.seed, class_of=task.class_of)
    if not held_out:
        problem = f"{len(rows)} rows, no two of one label: none can be held out"
        raise DataError(data, problem, "give more rows")
    settings = GIVEN if text is None else replace(GIVEN, calibration_tokens=GIVEN_TEXT_TOKENS)

    def calibration() -> list[str]:
        return [task.as_text(row) for row in train] if text is None else read_texts(named_source(text))

    return _plan(choices, settings, task, source=model, train=train, held_out=held_out, calibration=calibration)


def _plan(
    choices: Choices,
    settings: DemoSettings,
    task: Task,
    *,
    source: str,
    train: Sequence[Row],
    held_out: Sequence[Row],
    calibration: Callable[[], list[str]],
) -> DemoPlan:
    own, early_stopping = settings is DEMO, settings.early_stopping.model_copy(update={"by": choices.early_stopping})
    chosen: dict[str, Any] = {"lr": choices.lr, "density": choices.density, "directions": choices.directions}
    settings = replace(settings, **{key: value for key, value in chosen.items() if value is not None})
    parts = _shards_of(task, train, choices)
    table = {
        "count": _count(settings.rounds, choices, early_stopping),
        "directions": min(settings.directions, choices.nodes),
        "lr": settings.lr,
        "eps": settings.eps,
        "batch_size": settings.batch,
        "local_steps": choices.local_steps,
        "min_nodes": choices.nodes,
        "min_updates": min(3, choices.nodes),
    }
    rounds = check_config(table, RoundsConfig, where="command line")
    return DemoPlan(
        source=source,
        name="meerkat-demo (Llama architecture)" if own else source,
        task=task,
        shards=parts,
        held_out=held_out,
        rounds=rounds,
        every=max(1, rounds.count // EVALUATIONS),
        early_stopping=early_stopping,
        dtype=choices.dtype,
        calibration=calibration,
        settings=settings,
        bound=own if choices.bound is None else choices.bound,
        seed=choices.seed,
    )


def _shards_of(task: Task, rows: Sequence[Row], choices: Choices) -> list[list[Row]]:
    """A node with one label alone shows what skewed data does; rows without classes are divided evenly."""
    if task.classes:
        return shards(rows, choices.nodes, task.class_of, choices.seed)
    return partition(rows, choices.nodes, "iid", seed=choices.seed, class_of=task.class_of)


def _count(steps: int, choices: Choices, config: EarlyStoppingConfig) -> int:
    """Rounds in which a node does about so many local steps, at least half of them after a calibration."""
    if choices.rounds is not None:
        return choices.rounds
    if config.by == "off" or choices.local_steps <= config.steps:
        return max(1, steps // max(1, choices.local_steps))
    return 1 + max(1, max(steps // 2, steps - config.calibration_steps) // choices.local_steps)


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
