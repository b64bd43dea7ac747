"""The rows of a cell: what the nodes train on, what is evaluated, what a mask is scored on."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from meerkat_mq.core.step import Row
from meerkat_mq.demo.corpus import TASK, pretraining_text, triage_rows
from meerkat_mq.demo.settings import DEMO
from meerkat_mq.errors import DataError
from meerkat_mq.sweep.grid import Cell
from meerkat_mq.sweep.plan import OWN_MODEL, SplitPlan
from meerkat_mq.tasks.data import ClassOf, partition, read_rows, read_texts

OWN_TASK = TASK
SEQUENCES, TOKENS = 100, 512


@dataclass(frozen=True)
class CellRows:
    """What a cell trains on, and what it is judged by; the same for all seeds."""

    train: Sequence[Row]
    evaluation: Sequence[Row]


def rows_of(cell: Cell) -> CellRows:
    """Read a cell's rows, and hold those for tuning out; DataError of files, or where they are too few."""
    plan = cell.plan
    if cell.task is None:
        train: Sequence[Row] = triage_rows(0, DEMO.training_rows + plan.tune_rows, "train")
    else:
        train = read_rows(cell.task.train, cell.described, cell.split.field)
    if plan.tune_rows + plan.nodes > len(train):
        raise DataError(
            "tune_rows",
            f"{plan.tune_rows} of {len(train)} training rows leave too few for {plan.nodes} nodes",
            "lower it",
        )
    order = Random("tuning").sample(range(len(train)), len(train))  # noqa: S311
    tuning = [train[index] for index in order[: plan.tune_rows]]
    kept = [train[index] for index in sorted(order[plan.tune_rows :])]
    if plan.evaluate_on == "tuning":
        return CellRows(kept, tuning[: plan.eval_rows])
    if cell.task is None:
        return CellRows(kept, triage_rows(0, plan.eval_rows, "held-out"))
    held_out = read_rows(cell.task.validation, cell.described)
    chosen = sorted(Random("evaluation").sample(range(len(held_out)), min(plan.eval_rows, len(held_out))))  # noqa: S311
    return CellRows(kept, [held_out[index] for index in chosen])


def shards_of(rows: Sequence[Row], nodes: int, split: SplitPlan, *, seed: int, class_of: ClassOf) -> list[list[Row]]:
    """Divide rows among nodes; DataError where they are too few."""
    if split.how == "extreme":
        return _extreme(rows, nodes, split, seed=seed, class_of=class_of)
    return partition(rows, nodes, split.how, seed=seed, alpha=split.alpha, class_of=class_of, field=split.field)


def _extreme(rows: Sequence[Row], nodes: int, split: SplitPlan, *, seed: int, class_of: ClassOf) -> list[list[Row]]:
    """The first nodes hold one label each, as many rows as an equal share, the others divide the rest evenly."""
    order = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
    labels = sorted({class_of(row) for row in rows})
    alone = [labels[(node + seed) % len(labels)] for node in range(split.nodes)]
    shards, share = list[list[Row]](), max(1, len(rows) // nodes)
    for node, label in enumerate(alone):
        same = [row for row in order if class_of(row) == label]
        if not same:
            raise DataError("splits", f"label {label} has no rows left for node {node}", "use fewer extreme nodes")
        shards.append(same[:share])
        order = [row for row in order if class_of(row) != label] + same[share:]
    if split.exclusive:
        order = [row for row in order if class_of(row) not in alone]
    if split.nodes == nodes:
        return shards
    return shards + partition(order, nodes - split.nodes, "iid", seed=seed, class_of=class_of)


def calibration(cell: Cell) -> tuple[Sequence[str], int, int]:
    """Text that a cell's mask is scored on, or DataError; how many sequences of it, and their tokens."""
    plan, text = cell.plan, cell.method.text or cell.plan.text
    own = plan.model == OWN_MODEL
    sequences = plan.calibration_sequences or (DEMO.calibration_sequences if own else SEQUENCES)
    tokens = plan.calibration_tokens or (DEMO.calibration_tokens if own else TOKENS)
    if text == "task":
        return [cell.described.as_text(row) for row in rows_of(cell).train], sequences, tokens
    if text is None:
        return list(pretraining_text(1000, DEMO.calibration_lines)), sequences, tokens
    return read_texts(text), sequences, tokens
