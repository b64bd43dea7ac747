"""Evaluation equals its plain definition; the first-order bound moves only what the mask holds."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.evaluate import evaluate, first_order
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.tasks.classification import TASKS
from meerkat_mq.tasks.data import read_rows
from tests.engines import tiny

MakeEngine = Callable[..., TransformersEngine]
UNEVEN = [*tiny.ROWS[:9], {"line": "Broken.", "label": 0}, {"line": tiny.TEXTS[3] * 2, "label": 0}]


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation(engine: MakeEngine, name: str, batch_size: int) -> None:
    made = engine(name)
    batches = [made.prepare([row]) for row in UNEVEN]
    losses = [float(made.losses(batch)[0]) for batch in batches]
    right = sum(int(made.scores(batch)[0].argmax()) == row["label"] for batch, row in zip(batches, UNEVEN, strict=True))
    found = evaluate(made, UNEVEN, batch_size)
    zeros = sum(row["label"] == 0 for row in UNEVEN)
    assert found.rows == 11
    assert found.loss == pytest.approx(math.fsum(losses) / 11, rel=1e-4)
    assert found.accuracy == right / 11
    assert found.figures["majority"] == max(zeros, 11 - zeros) / 11


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_first_order_learns_on_the_mask_alone(
    engine: MakeEngine, load: Callable[..., LoadedModel], masks: dict[str, Mask], name: str
) -> None:
    made, mask = engine(name), masks[name]
    steps: list[tuple[int, int]] = []
    made.write(mask.theta_0)
    before = evaluate(made, tiny.ROWS)
    theta = first_order(
        made, mask.theta_0, tiny.ROWS, steps=30, lr=1e-2, progress=lambda done, total: steps.append((done, total))
    )
    after = evaluate(made, tiny.ROWS)
    assert after.loss < before.loss / 2
    assert after.accuracy > 0.9
    assert steps == [(step, 30) for step in range(1, 31)]
    assert theta.dtype == np.float32
    assert not np.shares_memory(theta, mask.matrices[0].theta_0)
    made.write(mask.theta_0)
    fresh = dict(load(name).model.named_parameters())
    for parameter_name, parameter in made.loaded.model.named_parameters():
        assert torch.equal(parameter, fresh[parameter_name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_first_order_is_deterministic_by_seed(engine: MakeEngine, masks: dict[str, Mask]) -> None:
    theta = masks["llama"].theta_0
    first, again, other = (
        first_order(engine("llama"), theta, tiny.ROWS, steps=3, seed=seed, batch_size=4) for seed in (1, 1, 2)
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.real
@pytest.mark.timeout(240)
def test_real_encoder_beats_the_majority_untrained(shared: Path, minilm: Path) -> None:
    task = TASKS["agnews"]
    loaded = load_model(minilm)
    mask = make_mask(loaded, tiny.TEXTS, "magnitude", sequences=4, length=32, batch_size=4)
    found = evaluate(
        TransformersEngine(loaded, mask, task), read_rows(shared / "data/agnews/validation.jsonl", task)[:200]
    )
    assert found.figures["majority"] < 0.35
    assert found.accuracy > found.figures["majority"] + 0.3
