import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meerkat_mq.sweep.cell import load_evaluation, own_mix, save_evaluation
from meerkat_mq.sweep.results import TABLE_FILE, Results
from meerkat_mq.sweep.rows import rows_of, shards_of
from meerkat_mq.sweep.training import Trained, diverged
from meerkat_mq.tasks.data import write_rows
from meerkat_mq.tasks.task import Evaluation
from tests.engines import tiny
from tests.sweep import grids

COSTS = ("cpu_seconds", "wall_seconds", "energy_joules", "peak_memory_mib")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one(folder: Path, model: Path, method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    chosen = {"name": "chosen", "mask": "magnitude", "density": 0.1, "lr": 0.01} | method
    said = {key: value for key, value in chosen.items() if value is not None}
    (cell,) = grids.cells(grids.plan(folder, model, seeds=[0], methods=[said], **changes))
    return grids.figures(cell, folder)


def test_own_mix() -> None:
    assert own_mix([1.0, 0.5], [3, 1]) == pytest.approx(0.75 * 1.0 + 0.25 * 0.5)
    assert own_mix([1.0, 0.5], [0, 9]) == 0.5
    assert own_mix([1.0, None, 0.0], [1, 5, 3]) == pytest.approx(0.25)
    assert own_mix([None, 1.0], [4, 0]) == 0.0


def test_a_cell_repeats_to_the_bit(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [one(tmp_path, tiny_llama, {}) for _ in range(2)]
    first, second = ({key: value for key, value in row.items() if key not in COSTS} for row in rows)
    assert first == second
    assert first["rounds"] == 4
    assert first["forward_passes"] == 3 * 8
    assert first["bytes_up"] == 4 * 52
    assert not first["diverged"]


def test_a_cell_above_a_frozen_prefix(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [one(tmp_path, tiny_llama, {"from_layer": 0.5}, prefix_mib=mib) for mib in (0, 16)]
    assert rows[0]["weights"] == rows[1]["weights"] == one(tmp_path, tiny_llama, {})["weights"] / 2
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)
    assert rows[0]["forward_passes"] == 3 * 8


def test_another_seed_is_another_path(tmp_path: Path, tiny_llama: Path) -> None:
    made = grids.plan(tmp_path, tiny_llama)
    rows = [grids.figures(cell, tmp_path) for cell in grids.cells(made) if cell.method.name == "chosen"]
    assert rows[0]["digest"] != rows[1]["digest"]


def test_what_a_row_says_of_the_labels(tmp_path: Path, tiny_llama: Path) -> None:
    row = one(tmp_path, tiny_llama, {}, splits=[{"how": "one-label"}])
    assert [sum(count > 0 for count in node) for node in row["labels"]] == [1, 1, 1]
    assert row["own_mix_min"] == min(row["recalls"])
    assert row["own_mix_min"] <= row["own_mix_mean"] <= 1


def test_nodes_that_hold_one_value_of_a_field_each(tmp_path: Path, tiny_llama: Path) -> None:
    systems = [{**row, "system": ("web", "db", "auth")[number % 3]} for number, row in enumerate(tiny.ROWS[:42])]
    plan = grids.plan(tmp_path, tiny_llama, seeds=[0], splits=[{"how": "iid"}, {"how": "field", "field": "system"}])
    write_rows(tmp_path / "train.jsonl", systems)
    even, by_system = (cell for cell in grids.cells(plan) if cell.method.name == "chosen")
    assert by_system.axes["split"] == "field system"
    shards = shards_of(rows_of(by_system).train, 3, by_system.split, seed=0, class_of=by_system.described.class_of)
    assert [{row["system"] for row in shard} for shard in shards] == [{"auth"}, {"db"}, {"web"}]
    rows = [grids.figures(cell, tmp_path) for cell in (even, by_system)]
    assert rows[0]["digest"] != rows[1]["digest"]
    assert rows[1]["balanced_accuracy"] == pytest.approx(sum(rows[1]["recalls"]) / 2)


def test_first_order_spends_the_same_budget(tmp_path: Path, tiny_llama: Path) -> None:
    row = one(tmp_path, tiny_llama, {"optimiser": "first-order"}, passes=12)
    assert row["forward_passes"] == 3 * 12
    assert row["bytes_up"] == 0
    assert row["loss"] < row["loss_before"]


def test_perturbations_spend_the_same_budget(tmp_path: Path, tiny_llama: Path) -> None:
    row = one(tmp_path, tiny_llama, {"mask": "dense", "density": None, "perturbations": 2})
    assert (row["rounds"], row["forward_passes"]) == (2, 3 * 8)


def test_training_that_breaks_is_a_row(tmp_path: Path, tiny_llama: Path) -> None:
    row = one(tmp_path, tiny_llama, {"lr": 1e19})
    assert row["diverged"]
    assert row["ended"] is not None
    assert row["forward_passes"] <= 3 * 8


@pytest.mark.parametrize(
    ("before", "after", "broken"),
    [
        ((0.77, 0.732), (1.38, 0.292), True),
        ((0.77, 0.732), (1.38, 0.75), False),
        ((0.77, 0.732), (1.0, 0.7), False),
        ((1.38, 0.25), (1.6, 0.25), True),
        ((3.0, 0.25), (3.2, 0.25), False),
        ((1.38, 0.25), (math.nan, 0.25), True),
    ],
)
def test_what_has_diverged(before: tuple[float, float], after: tuple[float, float], broken: bool) -> None:
    first, last = (Evaluation(8, {"loss": loss, "accuracy": accuracy}) for loss, accuracy in (before, after))
    done = Trained(np.zeros(1, np.float32), rounds=1, passes=2, cpu_seconds=0.1, wall_seconds=0.1)
    assert diverged(done, last, first, classes=4) == broken
    assert diverged(replace(done, ended="no round closed"), first, first, classes=4)


@pytest.mark.parametrize(("before", "after", "broken"), [(3.0, 2.5, False), (3.0, 3.2, False), (3.0, 3.4, True)])
def test_what_has_diverged_without_classes(before: float, after: float, broken: bool) -> None:
    first, last = (Evaluation(8, {"loss": loss, "perplexity": math.exp(loss)}) for loss in (before, after))
    done = Trained(np.zeros(1, np.float32), rounds=1, passes=2, cpu_seconds=0.1, wall_seconds=0.1)
    assert diverged(done, last, first, classes=0) == broken


def test_nothing_trained(tmp_path: Path, tiny_llama: Path) -> None:
    row = one(tmp_path, tiny_llama, {"mask": "none", "density": None, "lr": None})
    assert row["accuracy"] == row["accuracy_before"]
    assert row["forward_passes"] == 0


OTHER_KINDS = {
    "choice": 'kind = "choice"\ntemplate = "{line} The thing is"\noptions = ["a", "b"]\n',
    "completion": 'kind = "completion"\ntemplate = "{line} The thing is"\ncompletion = " {a}"\n',
    "text": 'kind = "text"\nfield = "line"\n',
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_tasks(tmp_path: Path, tiny_llama: Path, kind: str) -> None:
    rows = [row | {"a": "broken", "b": "running"} for row in tiny.ROWS]
    for name, part in (("t.jsonl", rows[:40]), ("v.jsonl", rows[40:])):
        write_rows(tmp_path / name, part)
    (tmp_path / "t.toml").write_text(OTHER_KINDS[kind] + "max_tokens = 40\n")
    files = {"train": str(tmp_path / "t.jsonl"), "validation": str(tmp_path / "v.jsonl")}
    tasks = [{"name": kind, "task": str(tmp_path / "t.toml"), **files}]
    federated = one(tmp_path, tiny_llama, {}, tasks=tasks, evaluate_every=3)
    bound = one(tmp_path, tiny_llama, {"optimiser": "first-order"}, tasks=tasks, passes=60)
    nothing = one(tmp_path, tiny_llama, {"mask": "none", "density": None, "lr": None}, tasks=tasks)
    assert federated["loss_before"] == bound["loss_before"] == nothing["loss"]
    assert bound["loss"] < bound["loss_before"]
    assert not federated["diverged"]
    assert federated["own_mix_mean"] is None
    judged = "accuracy" if kind == "choice" else "perplexity"
    assert (bound["perplexity"] < bound["perplexity_before"]) if judged == "perplexity" else "macro_f1" in bound
    assert ("exact_match" in bound) == (kind == "completion")
    results = Results(tmp_path)
    for number, row in enumerate((federated, bound)):
        results.add(row | {"key": f"{number}", "setting": "s", "method": "m"})
    heads = (tmp_path / TABLE_FILE).read_text(encoding="utf-8")
    assert ("| perplexity before | perplexity | tokens right" in heads) == (judged == "perplexity")
    assert "nan" not in heads


def test_a_curve(tmp_path: Path, tiny_llama: Path) -> None:
    row = one(tmp_path, tiny_llama, {}, evaluate_every=3)
    assert [point[0] for point in row["curve"]] == [3, 4]
    assert row["curve"][-1][1:3] == (row["accuracy"], row["loss"])
    assert 0 < row["curve"][0][3] < row["curve"][1][3] < row["cpu_seconds"] + 0.01
    assert row["digest"] == one(tmp_path, tiny_llama, {})["digest"]


def test_early_stopping_leaves_its_judgements_and_gradips(tmp_path: Path, tiny_llama: Path) -> None:
    early = {"by": "vpcs", "calibration_steps": 6, "rho_later": 1e-9, "quiet": 1e9}
    row = one(tmp_path, tiny_llama, {"early_stopping": early}, passes=20, local_steps=[2])
    assert [judgement["early_stopped"] for judgement in row["judgements"]] == [True] * 3
    assert [len(gradip["values"]) for gradip in row["gradips"]] == [6] * 3
    assert row["rounds"] == 3
    assert row["forward_passes"] == 3 * 2 * (6 + 1 + 1)


def test_an_evaluation_is_kept(tmp_path: Path) -> None:
    kept = Evaluation(3, {"loss": math.log(2), "accuracy": 1 / 3, "majority": 2 / 3}, recalls=(0.5, None))
    save_evaluation(tmp_path / "before.json", kept)
    assert load_evaluation(tmp_path / "before.json") == kept
