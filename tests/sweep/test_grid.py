from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.errors import ConfigError, DataError
from meerkat_mq.sweep.grid import Cell, cells_of
from meerkat_mq.sweep.plan import SplitPlan
from meerkat_mq.sweep.rows import OWN_TASK, rows_of, shards_of
from meerkat_mq.tasks.data import by_label
from tests.engines import tiny
from tests.sweep import grids

NOWHERE = Path("nowhere")


def cells(folder: Path, **changes: Any) -> list[Cell]:
    return cells_of(grids.plan(folder, NOWHERE, **changes), "fingerprint", OWN_TASK)


def method(**changes: Any) -> dict[str, Any]:
    return {"name": "m", "mask": "magnitude", "lr": 0.01} | changes


def test_every_point_once(tmp_path: Path) -> None:
    methods = [method(lr=[0.1, 0.2]), method(name="bound", optimiser="first-order"), {"name": "none", "mask": "none"}]
    found = cells(tmp_path, methods=methods, local_steps=[1, 2, 2], splits=[{"how": "iid"}, {"how": "one-label"}])
    places = [tuple(cell.axes.values()) for cell in found]
    assert len(set(places)) == len(places) == 2 * 2 * (2 * 2 + 1 + 1)
    assert len({cell.key for cell in found}) == len(found)
    assert {cell.local_steps for cell in found if cell.method.name != "m"} == {None}


def test_a_key_depends_on_what_decides_the_cell(tmp_path: Path) -> None:
    def key(**changes: Any) -> str:
        return cells(tmp_path, **changes)[0].key

    first = key()
    assert key() == key(watts=99.0) == key(seeds=[0, 5]) == key(prefix_mib=1) == first
    others: list[dict[str, Any]] = [
        {"passes": 10},
        {"eval_rows": 3},
        {"nodes": 4},
        {"max_tokens": 8},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"methods": [method(eps=0.1)]},
        {"methods": [method(density=0.2)]},
        {"methods": [method(from_layer=0.5)]},
        {"methods": [method(from_layer=1)]},
    ]
    assert len({first, *(key(**change) for change in others)}) == 1 + len(others)
    made = grids.plan(tmp_path, NOWHERE)
    assert cells_of(made, "another model", OWN_TASK)[0].key != first


def test_layers_are_an_axis_and_0_is_all_of_them(tmp_path: Path) -> None:
    (plain,) = cells(tmp_path, seeds=[0], methods=[method()])
    found = cells(tmp_path, seeds=[0], methods=[method(from_layer=[0, 0.5, 1])])
    assert [cell.from_layer for cell in found] == [None, 0.5, 1]
    assert (found[0].key, found[0].mask_key) == (plain.key, plain.mask_key)
    assert len({cell.mask_key for cell in found}) == len({cell.key for cell in found}) == 3
    assert {cell.baseline_key for cell in found} == {plain.baseline_key}
    assert [cell.shown.partition("lr ")[2] for cell in found] == [
        "0.01, seed 0",
        "0.01, from layer 0.5, seed 0",
        "0.01, from layer 1, seed 0",
    ]


@pytest.mark.parametrize(
    ("made", "idle"),
    [
        ({}, {"rank": 3}),
        ({}, {"early_stopping": EarlyStoppingConfig(steps=7)}),
        ({"mask": "dense"}, {"density": 0.5, "rank": 3}),
        ({"mask": "lora"}, {"density": 0.5}),
        ({"optimiser": "first-order"}, {"eps": 0.5, "directions": 2, "perturbations": 2, "rank": 3}),
        ({"mask": "none", "lr": {}}, {"density": 0.5, "eps": 0.5, "text": NOWHERE}),
    ],
)
def test_what_decides_nothing_is_in_no_key(tmp_path: Path, made: dict[str, Any], idle: dict[str, Any]) -> None:
    cell = cells(tmp_path, methods=[method(**made)])[0]
    other = replace(cell, method=cell.method.model_copy(update=idle))
    assert (other.key, other.mask_key) == (cell.key, cell.mask_key)


def test_a_data_set_counts_by_its_name(tmp_path: Path) -> None:
    def key(name: str) -> str:
        task = grids.table(tmp_path, NOWHERE)["tasks"][0] | {"train": f"hf:{name}:train"}
        return cells(tmp_path, tasks=[task])[0].key

    assert key("some/set") == key("some/set") != key("another/set")


@pytest.mark.parametrize(
    ("by", "steps", "measured"), [("off", 10, False), ("random", 10, False), ("vpcs", 1, False), ("vpcs", 10, True)]
)
def test_gradip_is_measured_only_where_it_judges(tmp_path: Path, by: str, steps: int, measured: bool) -> None:
    early = {"by": by, "calibration_steps": 20}
    cell = cells(tmp_path, passes=80, local_steps=[steps], methods=[method(early_stopping=early)])[0]
    assert cell.settings(bytes(16), measured=True).measured == measured


@pytest.mark.parametrize(
    ("passes", "steps", "changes", "rounds"),
    [
        (320, 10, {}, 16),
        (320, 30, {}, 5),
        (320, 10, {"perturbations": 5}, 3),
        (320, 10, {"early_stopping": {"by": "random", "calibration_steps": 100}}, 1 + 6),
        (320, 10, {"early_stopping": {"by": "random", "calibration_steps": 40, "every": 3}}, 7),
    ],
)
def test_a_budget_in_passes(tmp_path: Path, passes: int, steps: int, changes: dict[str, Any], rounds: int) -> None:
    (cell,) = cells(tmp_path, seeds=[0], passes=passes, local_steps=[steps], methods=[method(**changes)])
    assert cell.settings(bytes(16), measured=True).count == rounds


def test_a_first_order_step_costs_three(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, seeds=[0], passes=320, methods=[method(optimiser="first-order")])
    assert cell.gradient_steps == 106


def test_a_budget_that_holds_no_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="passes: 8 do not hold one round of m, state, iid, T = 5"):
        cells(tmp_path, local_steps=[5], methods=[method()])


def test_a_task_without_a_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"methods\.m\.lr: names none for task state"):
        cells(tmp_path, methods=[method(lr={"sst2": 0.1})])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    made = grids.plan(tmp_path, NOWHERE, text=str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match=r"missing\.txt: cannot be read"):
        cells_of(made, "fingerprint", OWN_TASK)


def test_masks_are_shared_where_nothing_differs(tmp_path: Path) -> None:
    found = cells(tmp_path, methods=[method(), method(name="other rate", lr=0.5), method(name="lora", mask="lora")])
    keys: dict[str, set[str]] = {}
    for cell in found:
        keys.setdefault(cell.method.name, set()).add(cell.mask_key)
    assert keys["m"] == keys["other rate"]
    assert [len(found) for found in keys.values()] == [2, 2, 1]


def test_tuning_rows_are_never_trained_on(tmp_path: Path) -> None:
    tuning = rows_of(cells(tmp_path, tune_rows=10, evaluate_on="tuning")[0])
    final = rows_of(cells(tmp_path, tune_rows=10)[0])
    assert len(tuning.evaluation) == 10
    assert tuning.train == final.train
    assert not [row for row in tuning.evaluation if row in final.train]
    assert list(final.evaluation) == tiny.ROWS[48:]


def test_extreme_nodes_hold_one_label_each() -> None:
    rows = [{"line": str(number), "label": number % 4} for number in range(80)]
    for seed in (0, 1):
        shards = shards_of(rows, 5, SplitPlan(how="extreme", nodes=2), seed=seed, class_of=by_label)
        labels = [{row["label"] for row in shard} for shard in shards]
        assert [len(found) for found in labels[:2]] == [1, 1]
        assert labels[0] != labels[1]
        assert all(len(found) >= 2 for found in labels[2:])
        assert [len(shard) for shard in shards] == [16] * 5
        assert sorted(int(row["line"]) for shard in shards for row in shard) == list(range(80))


def test_exclusive_labels_are_nobody_elses() -> None:
    rows = [{"line": str(number), "label": number % 4} for number in range(80)]
    split = SplitPlan(how="extreme", nodes=2, exclusive=True)
    shards = shards_of(rows, 5, split, seed=3, class_of=by_label)
    labels = [{row["label"] for row in shard} for shard in shards]
    assert labels == [{3}, {0}, {1, 2}, {1, 2}, {1, 2}]
    assert split.shown == "extreme 2 exclusive"
