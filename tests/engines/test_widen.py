"""Half-precision weights, float32 passes: what a float32 model of the same rounded weights computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import projected_gradient
from meerkat_mq.engines.torch import load, widen
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import UnsupportedModel
from tests.engines import tiny

MODELS: dict[str, Callable[[], Any]] = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
each_half = pytest.mark.parametrize("dtype", HALVES)
each_model = pytest.mark.parametrize("name", MODELS)

Pair = tuple[Path, Mask]


@pytest.fixture
def rounded(tmp_path: Path) -> Callable[..., Pair]:
    """The folder of a model that is stored in half precision, and a mask of it."""

    def make(name: str, dtype: str, **settings: Any) -> Pair:
        folder = tiny.save(MODELS[name](), tmp_path / "half", dtype=HALVES[dtype])
        chosen: dict[str, Any] = {"method": "magnitude", "density": 0.02, "sequences": 2, "length": 32} | settings
        return folder, make_mask(load_model(folder), tiny.TEXTS, **chosen)

    return make


def engine_of(pair: Pair, dtype: str) -> TransformersEngine:
    return TransformersEngine(load_model(pair[0], dtype=dtype), pair[1], tiny.TASK)


def gradients(pair: Pair, dtype: str, eps: float = 1e-3, directions: int = 20) -> Float32Array:
    """g along some directions."""
    made, mask = engine_of(pair, dtype), pair[1]
    batch = made.prepare(tiny.ROWS[:8])
    zs = (direction("mk1", seed, 0, mask.size) for seed in range(directions))
    return np.array([projected_gradient(made, mask.theta_0, z, eps, batch)[0] for z in zs], np.float32)


def correlation(a: Float32Array, b: Float32Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@each_half
@each_model
def test_projected_gradients_are_those_of_float32(rounded: Callable[..., Pair], name: str, dtype: str) -> None:
    pair = rounded(name, dtype)
    expected, found = gradients(pair, "float32"), gradients(pair, dtype)
    assert correlation(found, expected) >= 0.99
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * float(np.abs(expected).max()))


def test_half_precision_passes_would_be_noise(rounded: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    pair = rounded("llama", "bfloat16")
    expected = gradients(pair, "float32")
    monkeypatch.setattr(load, "widen", lambda _: None)
    assert correlation(gradients(pair, "bfloat16"), expected) < 0.9


@each_half
@each_model
def test_losses_and_gradients_at_another_theta(rounded: Callable[..., Pair], name: str, dtype: str) -> None:
    pair = rounded(name, dtype)
    theta = pair[1].theta_0 + np.float32(1e-3) * direction("mk1", 7, 0, pair[1].size)
    made = [engine_of(pair, kind) for kind in ("float32", dtype)]
    losses, slopes = list[Float32Array](), list[Float32Array]()
    for one in made:
        one.check(pair[1])
        one.write(theta)
        batch = one.prepare(tiny.ROWS[:4])
        losses.append(one.losses(batch))
        slopes.append(one.gradient(batch)[0])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-3, atol=1e-5 * float(np.abs(slopes[0]).max()))
    survival = made[1].surviving_share(theta, direction("mk1", 1, 0, theta.size), 1e-3)
    assert survival.kept == pytest.approx(1, abs=1e-4)
    assert survival.moved > 0.999


@each_model
def test_memory_stays_that_of_the_stored_type(rounded: Callable[..., Pair], name: str) -> None:
    pair = rounded(name, "bfloat16")
    made = engine_of(pair, "bfloat16")
    made.write(pair[1].theta_0)
    made.losses(made.prepare(tiny.ROWS[:2]))
    model = made.loaded.model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    known = {id(parameter) for parameter in model.parameters()} | {id(buffer) for buffer in model.buffers()}
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert not [value for value in held if id(value) not in known]


def test_pieces_of_a_large_matrix(rounded: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = rounded("llama", "bfloat16")
    whole = gradients(pair, "bfloat16", directions=3)
    monkeypatch.setattr(widen, "PIECE", 100)  # three rows
    np.testing.assert_allclose(gradients(pair, "bfloat16", directions=3), whole, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("settings", [{"method": "dense"}, {"method": "lora", "rank": 2}, {"density": 1.0}])
def test_masks_of_whole_matrices(rounded: Callable[..., Pair], settings: dict[str, Any]) -> None:
    """Of an adapter, which is float32, all survives; of a matrix that is trained whole, what its format holds."""
    pair = rounded("llama", "bfloat16", **settings)
    expected, found = gradients(pair, "float32"), gradients(pair, "bfloat16")
    assert correlation(found, expected) >= (0.99 if "rank" in settings else 0.9)


def test_sensitivity_masks_agree(rounded: Callable[..., Pair]) -> None:
    folder, mask = rounded("llama", "bfloat16", method="sensitivity")
    other = make_mask(load_model(folder, dtype="bfloat16"), tiny.TEXTS, density=0.02, sequences=2, length=32)
    same = [
        np.intersect1d(ours.indices, theirs.indices).size
        for ours, theirs in zip(mask.matrices, other.matrices, strict=True)
    ]
    assert sum(same) >= 0.98 * mask.size
    assert correlation(mask.g_p, other.g_p) > 0.98 or sum(same) < mask.size


def test_two_engines_on_one_model(rounded: Callable[..., Pair]) -> None:
    """What was written last holds, as of a model in float32."""
    folder, mask = rounded("llama", "bfloat16")
    loaded = load_model(folder, dtype="bfloat16")
    first, second = (TransformersEngine(loaded, mask, tiny.TASK) for _ in range(2))
    batch = first.prepare(tiny.ROWS[:2])
    first.write(mask.theta_0)
    before = first.losses(batch)
    second.write(mask.theta_0 + 1)
    assert not np.array_equal(second.losses(batch), before)
    first.write(mask.theta_0)
    np.testing.assert_array_equal(first.losses(batch), before)


class Casts(nn.Module):
    """A layer that rounds activations to the format of the weights after it, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.bfloat16)

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.layer(hidden.to(self.layer.weight.dtype))


def test_rounded_activations_are_refused() -> None:
    model = Casts()
    widen.widen(model)
    with pytest.raises(
        UnsupportedModel, match='rounds activations to half precision before its Linear; use dtype = "f'
    ):
        model(torch.zeros(2, 3))
    assert model.layer.weight.dtype == torch.bfloat16


def test_weights_are_put_back_after_an_error() -> None:
    model = nn.Sequential(nn.LayerNorm(3, dtype=torch.bfloat16))
    widen.widen(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 4))
    assert model[0].weight.dtype == torch.bfloat16
    assert model(torch.zeros(2, 3)).dtype == torch.float32
