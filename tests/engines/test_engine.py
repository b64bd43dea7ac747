"""The engine: theta is the truth and leaves no trace; the wrong model is refused in words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import projected_gradient
from meerkat_mq.engines.prompts import Prompt, passes_of
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import ModelMismatch
from meerkat_mq.tasks.classification import TASKS
from tests.engines import tiny

MakeEngine = Callable[..., TransformersEngine]
Load = Callable[..., LoadedModel]
VARIANTS = [("llama", "float32"), ("gpt2", "float32"), ("bert", "float32"), ("llama-bf16", "bfloat16")]


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.clone().view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}


def z_of(mask: Mask, seed: int) -> np.ndarray:
    return direction("mk1", seed, 0, mask.size)


def take_a_thousand_steps(engine: TransformersEngine, mask: Mask, eps: float, batch: Any) -> None:
    """All write what a local step writes; passes, which take the time, are made in each twentieth."""
    for step in range(1000):
        z = z_of(mask, step)
        if step % 20 == 0:
            projected_gradient(engine, mask.theta_0, z, eps, batch)
        else:
            for end in (mask.theta_0 + np.float32(eps) * z, mask.theta_0 - np.float32(eps) * z):
                engine.write(np.asarray(end, np.float32))


@pytest.mark.parametrize(("name", "dtype"), VARIANTS)
def test_a_thousand_steps_leave_no_trace(load: Load, masks: dict[str, Mask], name: str, dtype: str) -> None:
    loaded, mask = load(name, dtype=dtype), masks[name]
    before = bits(loaded.model)
    engine = TransformersEngine(loaded, mask, tiny.TASK)
    take_a_thousand_steps(engine, mask, 1e-2, engine.prepare(tiny.ROWS[:1]))
    assert bits(loaded.model) != before
    engine.write(mask.theta_0)
    assert bits(loaded.model) == before


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousand_steps_leave_no_trace_on_real_weights(stories: Path, dtype: str) -> None:
    mask = make_mask(load_model(stories), tiny.TEXTS, "magnitude", density=0.01, sequences=2, length=32)
    loaded = load_model(stories, dtype=dtype)
    before = bits(loaded.model)
    engine = TransformersEngine(loaded, mask, TASKS["sst2"])
    engine.check(mask)
    batch = engine.prepare([{"sentence": "Lily was sad.", "label": 0}])
    take_a_thousand_steps(engine, mask, 1e-3, batch)
    assert bits(loaded.model) != before
    engine.write(mask.theta_0)
    assert bits(loaded.model) == before


@pytest.mark.parametrize(("name", "dtype"), VARIANTS)
def test_write_puts_theta_where_the_mask_says(load: Load, masks: dict[str, Mask], name: str, dtype: str) -> None:
    loaded, mask = load(name, dtype=dtype), masks[name]
    expected = {key: tensor.clone() for key, tensor in loaded.model.named_parameters()}
    theta = z_of(mask, 5)
    TransformersEngine(loaded, mask, tiny.TASK).write(theta)
    for matrix, part in mask.slices():
        flat = expected[matrix.name].flatten()
        flat[torch.from_numpy(matrix.indices.astype(np.int64))] = torch.tensor(theta[part]).to(flat.dtype)
        expected[matrix.name] = flat.view(matrix.shape)
    assert all(torch.equal(parameter, expected[key]) for key, parameter in loaded.model.named_parameters())


def test_write_takes_read_only_theta_and_keeps_no_reference(engine: MakeEngine, masks: dict[str, Mask]) -> None:
    made, theta = engine("llama"), masks["llama"].theta_0
    theta.flags.writeable = False
    made.write(theta)
    batch = made.prepare(tiny.ROWS[:2])
    losses = made.losses(batch)
    theta.flags.writeable = True
    theta += 1
    assert (made.losses(batch) == losses).all()


@pytest.mark.parametrize("theta", [np.zeros(3, np.float32), np.float32(1), np.zeros((1, 1), np.float32)])
def test_write_refuses_another_shape(engine: MakeEngine, theta: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not float32"):
        engine("llama").write(theta)


def test_write_refuses_another_dtype(engine: MakeEngine, masks: dict[str, Mask]) -> None:
    with pytest.raises(ValueError, match="theta is float64"):
        engine("llama").write(masks["llama"].theta_0.astype(np.float64))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_losses_are_cross_entropy_of_scores(engine: MakeEngine, name: str) -> None:
    made = engine(name)
    batch = made.prepare(tiny.ROWS[:6])
    scores = made.scores(batch)[0].astype(np.float64)
    labels = np.array([row["label"] for row in tiny.ROWS[:6]])
    expected = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(6), labels]
    losses = made.losses(batch)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_projected_gradient_is_the_slope_along_z(engine: MakeEngine, masks: dict[str, Mask], name: str) -> None:
    made, mask = engine(name), masks[name]
    batch, z = made.prepare(tiny.ROWS[:8]), (z_of(mask, 1) / np.sqrt(mask.size)).astype(np.float32)
    found, _ = projected_gradient(made, mask.theta_0, z, 1e-2, batch)
    made.write(mask.theta_0)
    gradient, _ = made.gradient(batch)
    assert found == pytest.approx(float(gradient @ z), rel=0.02, abs=1e-4)


@pytest.mark.parametrize(("name", "dtype"), VARIANTS)
def test_the_gradient_is_autograds_on_the_mask(load: Load, masks: dict[str, Mask], name: str, dtype: str) -> None:
    mask, loaded, other = masks[name], load(name, dtype=dtype), load(name)  # passes are float32 whatever is stored
    made, theta = TransformersEngine(loaded, mask, tiny.TASK), (mask.theta_0 + 0.1 * z_of(mask, 1)).astype(np.float32)
    batch = made.prepare(tiny.ROWS[:8])
    made.write(theta)
    before = bits(loaded.model)
    gradient, loss = made.gradient(batch)
    assert bits(loaded.model) == before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.model.parameters())
    assert loss == pytest.approx(float(made.losses(batch).mean()), rel=1e-5)

    plain = TransformersEngine(other, mask, tiny.TASK)
    plain.write(theta)
    other.model.requires_grad_(True)
    batch = plain.prepare(tiny.ROWS[:8])
    torch.autograd.backward(torch.nn.functional.cross_entropy(plain.class_scores(batch), batch.labels))
    grads = {key: parameter.grad for key, parameter in other.model.named_parameters()}
    expected = [grads[matrix.name].flatten()[matrix.indices.astype(np.int64)].float() for matrix in mask.matrices]
    assert gradient.dtype == np.float32
    np.testing.assert_array_equal(gradient, torch.cat(expected).numpy())
    assert gradient.any()


def test_a_gradient_that_fails_leaves_no_parameter_open(engine: MakeEngine) -> None:
    made = engine("llama")
    batch = made.prepare(tiny.ROWS[:2])
    with pytest.raises(IndexError):
        made.gradient(replace(batch, labels=batch.labels + 100))
    assert not any(parameter.requires_grad for parameter in made.loaded.model.parameters())


def test_encoder_descriptions_see_the_perturbation_too(engine: MakeEngine, masks: dict[str, Mask]) -> None:
    made, mask = engine("bert"), masks["bert"]
    descriptions = [{"line": text, "label": label} for label, text in enumerate(tiny.TASK.descriptions)]
    made.write(mask.theta_0 + z_of(mask, 0))
    np.testing.assert_allclose(np.diag(made.scores(made.prepare(descriptions))[0]), tiny.TASK.scale, rtol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [*VARIANTS, ("llama", "bfloat16"), ("llama-bf16", "float32")])
def test_check_takes_the_right_model_in_any_dtype(
    engine: MakeEngine, masks: dict[str, Mask], name: str, dtype: str
) -> None:
    engine(name, dtype=dtype).check(masks[name])


def test_check_names_another_tokenizer(load: Load, masks: dict[str, Mask]) -> None:
    loaded = replace(load("llama"), tokenizer_fingerprint=bytes(32))
    with pytest.raises(ModelMismatch, match=r"another tokenizer: fingerprint 0000000000000000…, not .*; give the base"):
        TransformersEngine(loaded, masks["llama"], tiny.TASK).check(masks["llama"])


def test_check_names_another_checkpoint(load: Load, masks: dict[str, Mask]) -> None:
    loaded = load("llama-bf16")
    with pytest.raises(ModelMismatch, match="another checkpoint: fingerprint"):
        TransformersEngine(loaded, masks["llama"], tiny.TASK).check(masks["llama"])


def test_check_names_the_matrix_that_differs(engine: MakeEngine, masks: dict[str, Mask]) -> None:
    made, mask = engine("llama"), masks["llama"]
    theta = mask.theta_0
    theta[-2:] += 1
    made.write(theta)
    with pytest.raises(
        ModelMismatch, match=rf": 2 of \d+ masked weights of {mask.matrices[-1].name} differ from theta_0"
    ):
        made.check(mask)


def test_mask_of_another_architecture(load: Load, masks: dict[str, Mask]) -> None:
    with pytest.raises(ModelMismatch, match=r"the mask's encoder\.layer\.0.* the model has no matrix of this name"):
        TransformersEngine(load("llama"), masks["bert"], tiny.TASK)


def test_mask_of_another_size(load: Load, masks: dict[str, Mask]) -> None:
    first = masks["llama"].matrices[0]
    taller = replace(masks["llama"], matrices=(replace(first, shape=(first.shape[0] + 1, first.shape[1])),))
    with pytest.raises(ModelMismatch, match=r"has shape \(33, 48\), the model has shape \(32, 48\)"):
        TransformersEngine(load("llama"), taller, tiny.TASK)


def test_float32_keeps_the_whole_perturbation(engine: MakeEngine, masks: dict[str, Mask]) -> None:
    mask = masks["llama"]
    survival = engine("llama").surviving_share(mask.theta_0, z_of(mask, 0), 1e-3)
    assert survival.kept == pytest.approx(1, abs=1e-4)
    assert survival.moved > 0.999
    assert survival.error < 1e-3


def test_bfloat16_swallows_what_is_below_its_steps(load: Load) -> None:
    """Of a matrix that is trained whole: no copy of it is kept."""
    loaded = load("llama-bf16", dtype="bfloat16")
    mask = make_mask(loaded, tiny.TEXTS, "magnitude", density=1, sequences=2, length=32)
    made = TransformersEngine(loaded, mask, tiny.TASK)
    theta = np.ones(mask.size, np.float32)
    ones = np.ones(mask.size, np.float32)
    swallowed = made.surviving_share(theta, ones, 2**-10)
    assert (swallowed.kept, swallowed.moved, swallowed.error) == (0.0, 0.0, 1.0)
    whole = made.surviving_share(theta, ones, 2**-7)
    assert (whole.kept, whole.moved, whole.error) == (1.0, 1.0, 0.0)
    half = made.surviving_share(theta, np.where(np.arange(mask.size) % 2, ones, ones / 8), 2**-7)
    assert half.moved == pytest.approx(0.5, abs=1e-3)
    assert half.kept == pytest.approx(64 / 65, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_passes_are_bounded_and_keep_the_order_of_rows(
    engine: MakeEngine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(name)
    rows = [{"line": " ".join(["pump"] * count), "label": 0} for count in (9, 1, 30, 4, 4, 17)]
    alone = [made.scores(made.prepare([row]))[0][0] for row in rows]
    monkeypatch.setattr("meerkat_mq.engines.torch.engine._PASS_TOKENS", {"cpu": 64})
    batch = made.prepare(rows)
    shapes = [(part["input_ids"] if name == "bert" else part.ids).shape for part in batch.passes]
    assert len(shapes) >= 3
    assert sum(count for count, _ in shapes) == len(rows)
    assert all(count == 1 or count * length <= 64 for count, length in shapes)
    assert max(count for count, _ in shapes) > 1
    np.testing.assert_allclose(made.scores(batch)[0], alone, rtol=0, atol=2e-5)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), limit=st.integers(1, 60))
def test_parts_lose_nothing_and_stay_within_the_limit(lengths: list[int], limit: int) -> None:
    prompts = [Prompt([index] * length) for index, length in enumerate(sorted(lengths))]
    parts = list(passes_of(prompts, limit))
    assert [prompt for part in parts for prompt in part] == prompts
    assert all(len(part) == 1 or len(part) * part[-1].size <= limit for part in parts)
