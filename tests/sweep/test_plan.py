import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import Section, check_config
from meerkat_mq.errors import ConfigError
from meerkat_mq.sweep.plan import MethodPlan, SweepPlan, TaskPlan

PAGE = Path(__file__).parents[2] / "docs/sweep.md"
METHOD = {"name": "MEERKAT", "lr": 0.1}
FIRST_ORDER = {"optimiser": "first-order"}
LEAST = {"model": "demo", "passes": 8, "methods": [METHOD]}


def check(**changes: Any) -> SweepPlan:
    return check_config(LEAST | changes, SweepPlan, where="plan.toml")


def test_one_learning_rate_is_an_axis_of_one() -> None:
    assert check().methods[0].rates("any task") == (0.1,)


def test_learning_rates_by_task() -> None:
    method = check(methods=[METHOD | {"lr": {"sst2": [1e-3, 1e-2], "rte": 0.5}}]).methods[0]
    assert [method.rates(task) for task in ("sst2", "rte", "wic")] == [(1e-3, 1e-2), (0.5,), ()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"passes": None}, "needs either passes or rounds"),
        ({"rounds": 3}, "needs either passes or rounds"),
        ({"methods": []}, "plan.toml: methods"),
        ({"methods": [METHOD, METHOD]}, "methods have a name twice"),
        ({"methods": [{"name": "x"}]}, 'needs lr, unless mask = "none"'),
        ({"methods": [METHOD | {"mask": "sensitivty"}]}, "plan.toml: methods.0.mask"),
        ({"methods": [METHOD | {"directions": 9}]}, "9 directions for 8 nodes"),
        (
            {"methods": [METHOD | {"optimiser": "first-order", "early_stopping": {"by": "vpcs"}}]},
            "early_stopping needs",
        ),
        ({"methods": [METHOD | {"lr": 0}]}, "plan.toml: methods.0.lr: must be a number above 0, a list of such"),
        ({"methods": [METHOD | {"lr": {"rte": ["x"]}}]}, "plan.toml: methods.0.lr.rte.0"),
        ({"methods": [METHOD | {"lr": True}]}, "plan.toml: methods.0.lr: must be"),
        ({"methods": [METHOD | {"lr": []}]}, "plan.toml: methods.0.lr: must be"),
        ({"methods": [METHOD | {"lr": {"rte": True}}]}, "plan.toml: methods.0.lr.rte.0"),
        ({"nodes": True}, "plan.toml: nodes: input should be a valid integer, not True"),
        ({"methods": [METHOD | {"mask": "dense", "density": 0.1}]}, 'density does nothing with mask = "dense"'),
        ({"methods": [METHOD | {"rank": 8}]}, 'rank does nothing with mask = "sensitivity"'),
        ({"methods": [METHOD | FIRST_ORDER | {"eps": 0.1}]}, 'eps does nothing with optimiser = "first-order"'),
        ({"methods": [METHOD | FIRST_ORDER | {"directions": 1}]}, "directions does nothing"),
        ({"methods": [{"name": "x", "mask": "none", "text": "task"}]}, 'text does nothing with mask = "none"'),
        ({"methods": [{"name": "x", "mask": "none", "from_layer": 1}]}, 'from_layer does nothing with mask = "none"'),
        ({"methods": [METHOD | FIRST_ORDER], "passes": None, "rounds": 9}, "has no rounds: it needs passes"),
        ({"methods": [METHOD | FIRST_ORDER], "passes": 2}, "it needs passes, 3 at least"),
        ({"splits": [{"how": "iid", "alpha": 0.5}]}, 'alpha does nothing with how = "iid", only with "dirichlet"'),
        ({"splits": [{"how": "one-label", "nodes": 1}]}, "nodes does nothing"),
        ({"splits": [{"how": "field"}]}, 'how = "field" needs field, the name of a field of the rows'),
        ({"splits": [{"how": "iid", "field": "a"}]}, 'field does nothing with how = "iid", only with "field"'),
        ({"splits": [{"how": "dirichlet", "exclusive": False}]}, "exclusive does nothing"),
        ({"evaluate_on": "tuning"}, "needs tune_rows"),
        ({"evaluate_on": "tuning", "tune_rows": 9, "eval_rows": 10}, "eval_rows = 10 are more than tune_rows = 9"),
        ({"tasks": [{"name": "sst2", "train": "hf:x", "validation": "v"}]}, "tasks.0.train: must be hf:"),
        ({"model": "some/model"}, "needs [[tasks]]"),
        ({"splits": [{"how": "extreme", "nodes": 9}]}, "9 extreme nodes of 8"),
        ({"local_stpes": [1]}, "plan.toml: local_stpes: is unknown"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check(**changes)


def test_rows_from_a_data_set_in_the_plans_folder(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    task = {"name": "sst2", "train": "hf:local:train", "validation": "hf:some/set:test"}
    made = check_config(LEAST | {"tasks": [task]}, SweepPlan, where="plan.toml", folder=tmp_path)
    assert made.tasks[0].train == f"hf:{tmp_path / 'local'}:train"
    assert made.tasks[0].validation == "hf:some/set:test"


def test_a_mask_needs_text() -> None:
    task = {"name": "sst2", "train": "t.jsonl", "validation": "v.jsonl"}
    with pytest.raises(ConfigError, match="MEERKAT needs text"):
        check(model="some/model", tasks=[task])
    check(model="some/model", tasks=[task], methods=[METHOD | {"text": "task"}])


def test_the_page_has_every_key_and_a_valid_example() -> None:
    text = PAGE.read_text(encoding="utf-8")
    plan, method = text.split("\n## The plan\n")[1].split("\n## ")[0].split("\n**A method**:\n")
    documented = set(
        re.findall(r"`(?:\[\[)?([a-z_]+)(?:\]\])?`", "\n".join(re.findall(r"^\|([^|]+)\|", plan, re.MULTILINE)))
    )
    assert documented == set(SweepPlan.model_fields)
    keys: type[Section]
    for part, keys in ((method, MethodPlan), (plan, TaskPlan)):
        assert set(keys.model_fields) <= set(re.findall(r"`([a-z_]+)`", part))
    (example,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    check_config(tomllib.loads(example), SweepPlan, where="docs/sweep.md")
