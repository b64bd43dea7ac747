"""What the command line of the demo may say, and what it comes to."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from meerkat_mq.config import load_config
from meerkat_mq.demo.corpus import TASK, triage_rows
from meerkat_mq.demo.plan import Choices, make_plan, shards
from meerkat_mq.demo.settings import DEMO, OWN_LINES
from meerkat_mq.errors import ConfigError, DataError
from meerkat_mq.tasks.classification import Classification
from meerkat_mq.tasks.data import by_label, write_rows
from meerkat_mq.tasks.load import load_task


def test_without_choices_the_demo_runs_its_own_model() -> None:
    plan = make_plan(Choices())
    assert (plan.rounds.count, plan.rounds.directions, plan.settings.density) == (
        DEMO.rounds,
        DEMO.directions,
        DEMO.density,
    )
    assert len(plan.shards) == plan.rounds.min_nodes == 4
    lines = {row["line"] for shard in plan.shards for row in shard}
    assert not lines & {row["line"] for row in plan.held_out}


def test_the_bound_is_on_for_the_demos_own_model_and_off_for_a_given_one(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    write_rows(data, triage_rows(0, 60, "train"))
    task = tmp_path / "task.toml"
    task.write_text(tomli_w.dumps(TASK.model_dump(mode="json")))
    given: dict[str, Any] = {"model": "x", "task": str(task), "data": str(data)}
    assert [make_plan(Choices(bound=bound)).bound for bound in (None, True, False)] == [True, True, False]
    assert [make_plan(Choices(bound=bound, **given)).bound for bound in (None, True, False)] == [False, True, False]


def test_a_model_alone_is_trained_on_the_demos_own_lines() -> None:
    plan, own = make_plan(Choices(model="x")), make_plan(Choices())
    assert (plan.source, plan.name, plan.task, plan.bound) == ("x", "x", TASK, False)
    assert plan.shards == own.shards
    assert list(plan.held_out) == list(own.held_out)[: OWN_LINES.held_out_rows]
    assert (plan.rounds.lr, plan.rounds.count) == (OWN_LINES.lr, OWN_LINES.rounds)
    with pytest.raises(ConfigError, match="give all three, or --model alone"):
        make_plan(Choices(model="x", task="sst2"))


@pytest.mark.parametrize(
    ("choices", "count"),
    [
        ({"local_steps": 10}, 30),
        ({"local_steps": 10, "early_stopping": "vpcs"}, 16),
        ({"local_steps": 100, "early_stopping": "random"}, 2),
        ({"local_steps": 500}, 1),
        ({"local_steps": 500, "early_stopping": "vpcs"}, 2),
        ({"early_stopping": "vpcs"}, DEMO.rounds),
        ({"local_steps": 10, "rounds": 4}, 4),
    ],
)
def test_more_local_steps_make_fewer_rounds_of_as_many_steps(choices: dict[str, Any], count: int) -> None:
    plan = make_plan(Choices(**choices))
    assert plan.rounds.count == count
    assert plan.rounds.local_steps == choices.get("local_steps", 1)
    assert plan.early_stopping.by == choices.get("early_stopping", "off")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_node_holds_one_label_and_no_row_is_lost(seed: int) -> None:
    rows = triage_rows(seed, 400, "train")
    parts = shards(rows, 4, TASK.class_of, seed)
    assert len({row["label"] for row in parts[0]}) == 1
    assert all(len({row["label"] for row in part}) >= 3 for part in parts[1:])
    assert sorted(row["line"] for part in parts for row in part) == sorted(row["line"] for row in rows)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"rounds": -5}, "count: input should be greater than or equal to 1, not -5"),
        ({"rounds": 0}, "count: .* not 0"),
        ({"lr": float("nan")}, "lr: .* not nan"),
        ({"lr": 0.0}, r"lr: .* not 0\.0"),
        ({"directions": 0}, "directions: .* not 0"),
        ({"directions": 5}, "--directions: 5 lanes for 4 nodes"),
        ({"local_steps": 0}, "local_steps: .* not 0"),
        ({"local_steps": 1001}, "local_steps: .* not 1001"),
        ({"nodes": 1}, "--nodes: 1 is below 2"),
        ({"nodes": 70_000}, "1600 rows of 4 labels are too few for 70000 nodes"),
        ({"density": 1.5}, r"--density: 1\.5 is outside"),
        ({"seed": -1}, "--seed: -1 is below 0"),
        ({"model": "here", "task": "sst2"}, "--model, --task, --data: go together"),
        ({"text": "here"}, "--text goes with them"),
    ],
)
def test_bad_choices_are_named_before_anything_runs(choices: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        make_plan(Choices(**choices))


def test_one_label_is_too_few() -> None:
    with pytest.raises(DataError, match="20 rows of 1 labels are too few"):
        shards([{"label": 1}] * 20, 4, by_label, 0)


def test_the_task_that_the_demo_writes_can_be_read(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"template": 'a "quoted"\n\\ line with 😀: {line}', "name": "odd"})
    (tmp_path / "task.toml").write_text(tomli_w.dumps(task.model_dump(mode="json")), encoding="utf-8")
    assert load_task(str(tmp_path / "task.toml")) == task
    assert load_config(tmp_path / "task.toml", Classification) == task


def test_rows_without_classes_are_divided_evenly(tmp_path: Path) -> None:
    (tmp_path / "lines.toml").write_text('kind = "text"\nfield = "line"\n')
    write_rows(tmp_path / "rows.jsonl", triage_rows(0, 60, "train"))
    plan = make_plan(Choices(model="x", task=str(tmp_path / "lines.toml"), data=str(tmp_path / "rows.jsonl")))
    assert [len(rows) for rows in plan.shards] == [12] * 4
    assert len(plan.held_out) == 12


def test_held_out_rows_are_of_every_label(tmp_path: Path) -> None:
    """Rows in turn over five labels: every fifth row is of the first."""
    (tmp_path / "t.toml").write_text('template = "{x} is"\nlabel_words = [" a", " b", " c", " d", " e"]')
    write_rows(tmp_path / "d.jsonl", [{"x": str(number), "label": number % 5} for number in range(100)])
    plan = make_plan(Choices(model="m", task=str(tmp_path / "t.toml"), data=str(tmp_path / "d.jsonl")))
    assert sorted(row["label"] for row in plan.held_out) == sorted([0, 1, 2, 3, 4] * 4)
    assert {row["label"] for shard in plan.shards for row in shard} == {0, 1, 2, 3, 4}
    assert len(plan.held_out) + sum(map(len, plan.shards)) == 100
