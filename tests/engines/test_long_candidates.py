"""Candidates from anybody, as many and as long as a task allows: passes stay bounded, and scores are the same."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.step import Row
from meerkat_mq.engines import prompts
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.tasks.choice import Choice
from meerkat_mq.tasks.classification import Classification
from tests.engines import tiny

MakeEngine = Callable[..., TransformersEngine]

LIMIT = 64
WORDS = ("pump", "valve", "motor", "fan")
MANY = tuple(" " + " ".join(words) for words in product(WORDS, repeat=4))
LABELS = tiny.TASK.model_copy(update={"label_words": MANY, "descriptions": MANY})
OPTIONS = Choice(name="o", fields=("line",), template="{line} It is", options=("options",), max_tokens=56)
ROWS: list[Row] = [{"line": text, "label": number} for number, text in enumerate(tiny.TEXTS[:3])]
CHOICES: list[Row] = [
    {"line": tiny.TEXTS[0], "options": ["broken", "running", "on"], "label": 0},
    {"line": "A fan.", "options": [" ".join(words) for words in product(WORDS, repeat=3)], "label": 40},
    {"line": tiny.TEXTS[7], "options": ["red", "running on Monday and on " + " and ".join(tiny.TEXTS[3].split())],
     "label": 1},
]  # fmt: skip
TASKS: dict[str, tuple[Classification | Choice, Sequence[Row]]] = {
    "labels": (LABELS, ROWS), "options": (OPTIONS, CHOICES),
}  # fmt: skip


def found(engine: Any, theta: Any, rows: Sequence[Row]) -> tuple[Any, Any]:
    engine.write(theta)
    batch = engine.prepare(rows)
    return engine.scores(batch)[0], engine.losses(batch)


@pytest.mark.parametrize("name", TASKS)
def test_passes_are_bounded_and_scores_are_those_of_one_pass(
    engine: MakeEngine, masks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    task, rows = TASKS[name]
    made, theta = engine("llama", task), masks["llama"].theta_0
    whole = found(made, theta, rows)
    (before, _) = made.gradient(made.prepare(rows))
    monkeypatch.setattr("meerkat_mq.engines.torch.engine._PASS_TOKENS", {"cpu": LIMIT})
    batch = made.prepare(rows)
    assert max(one.ids.numel() for one in batch.passes) <= prompts.WORTH * LIMIT
    assert max(len(one.ids) for one in batch.passes) < 16
    scores, losses = found(made, theta, rows)
    np.testing.assert_allclose(scores, whole[0], rtol=0, atol=2e-5)  # minus infinity where a row has no candidate
    np.testing.assert_allclose(losses, whole[1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(made.gradient(batch)[0], before, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "rows"), [("llama", tiny.ROWS), ("gpt2", tiny.ROWS[:5])])
def test_rows_of_ordinary_tasks_are_read_as_before(engine: MakeEngine, name: str, rows: Sequence[Row]) -> None:
    made = engine(name)
    batch = made.prepare(rows)
    assert batch.column is None
    assert sorted(batch.line.tolist()) == list(range(len(rows)))
    assert {one.token.ndim for one in batch.passes} == {2}


def test_long_words_of_classes_count_where_passes_are_filled(engine: MakeEngine, load: Any) -> None:
    """Two labels of 30 tokens, rows of a few: by the rows' own tokens alone, a pass had held ten times as many."""
    words = tuple(" " + " ".join([word] * 5) for word in WORDS[:2])
    task = tiny.TASK.model_copy(update={"label_words": words})
    made = engine("llama", task)
    rows: list[Row] = [{"line": "A fan.", "label": 0}] * 100
    assert max(one.ids.numel() for one in made.prepare(rows).passes) <= 768


def test_descriptions_are_read_in_bounded_passes(
    engine: MakeEngine, masks: dict[str, Any], load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = masks["bert"].theta_0
    whole = found(engine("bert", LABELS), theta, ROWS)
    shapes = list[tuple[int, ...]]()
    monkeypatch.setattr(prompts, "TOGETHER", LIMIT)
    made = engine("bert", LABELS)
    made.loaded.model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores, losses = found(made, theta, ROWS)
    assert sum(count for count, _ in shapes[:-2]) > 256
    assert max(count * length for count, length in shapes) <= 768
    np.testing.assert_allclose(scores, whole[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(losses, whole[1], rtol=0, atol=2e-5)
