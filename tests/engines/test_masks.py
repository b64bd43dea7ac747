"""Masks: the scores are what they claim, the choice is deterministic, the model stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.protocol import Method
from meerkat_mq.engines.torch.adapter import adapter_weights, new_adapter
from meerkat_mq.engines.torch.calibration import CalibrationBatch, calibration_batches, calibration_loss, each_gradient
from meerkat_mq.engines.torch.load import LoadedModel, linear_layers, load_model
from meerkat_mq.engines.torch.masks import METHODS, _candidates, _counts, best, make_mask
from meerkat_mq.errors import MaskError
from meerkat_mq.tasks.data import read_texts
from tests.engines import tiny

Load = Callable[..., LoadedModel]
SMALL: dict[str, Any] = {"density": 0.05, "sequences": 6, "length": 32}
BATCH = {"llama": 1, "gpt2": 1, "bert": 16}


def batches_of(loaded: LoadedModel, name: str) -> list[CalibrationBatch]:
    return calibration_batches(loaded, tiny.TEXTS, seed=0, sequences=6, length=32, batch_size=BATCH[name])


def gradients(loaded: LoadedModel, name: str, method: Method = "sensitivity") -> list[dict[str, torch.Tensor]]:
    """By hand: the gradient of each matrix for each calibration batch."""
    loaded = new_adapter(loaded, 8) if method == "lora" else loaded
    weights = adapter_weights(loaded.model) if method == "lora" else _candidates(loaded, method)
    for weight in weights.values():
        weight.requires_grad_(True)
    found = []
    for batch in batches_of(loaded, name):
        loss = loss_by_hand(loaded, batch)
        found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    return found


def loss_by_hand(loaded: LoadedModel, batch: CalibrationBatch) -> torch.Tensor:
    if not isinstance(batch, torch.Tensor):
        return calibration_loss(loaded, batch)
    loss: torch.Tensor = loaded.model(input_ids=batch, labels=batch).loss
    return loss


def lowest_kept_and_highest_left(scores: torch.Tensor, indices: np.ndarray) -> tuple[float, float]:
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[torch.from_numpy(indices.astype(np.int64))] = True
    return float(scores.flatten()[kept].min()), float(scores.flatten()[~kept].max())


@pytest.mark.parametrize("name", BATCH)
def test_sensitivity_is_the_mean_of_squared_gradients(load: Load, name: str) -> None:
    mask, by_hand = make_mask(load(name), tiny.TEXTS, **SMALL), gradients(load(name), name)
    for matrix in mask.matrices:
        scores = torch.stack([batch[matrix.name].square() for batch in by_hand]).mean(dim=0)
        kept, left = lowest_kept_and_highest_left(scores, matrix.indices)
        assert kept >= left * 0.999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BATCH)
def test_g_p_is_the_mean_signed_gradient(load: Load, name: str, method: Any) -> None:
    mask, by_hand = make_mask(load(name), tiny.TEXTS, method, **SMALL), gradients(load(name), name, method)
    for matrix in mask.matrices:
        mean = torch.stack([batch[matrix.name] for batch in by_hand]).mean(dim=0).flatten()
        np.testing.assert_allclose(matrix.g_p, mean[matrix.indices.astype(np.int64)], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", BATCH)
def test_magnitude(load: Load, name: str) -> None:
    mask, weights = make_mask(load(name), tiny.TEXTS, "magnitude", **SMALL), dict(load(name).model.named_parameters())
    for matrix in mask.matrices:
        kept, left = lowest_kept_and_highest_left(weights[matrix.name].abs(), matrix.indices)
        assert kept >= left


def input_squares(loaded: LoadedModel, name: str) -> dict[str, torch.Tensor]:
    """By hand, document by document, so that there is no padding: squared inputs of each layer."""
    sums: dict[str, torch.Tensor] = {}

    def hook_for(key: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[key] = sums.get(key, torch.tensor(0.0)) + inputs[0].flatten(0, -2).square().sum(dim=0)

        return hook

    for key, layer in linear_layers(loaded.model).items():
        layer.register_forward_pre_hook(hook_for(key))
    with torch.inference_mode():
        for batch in batches_of(loaded, name):
            if isinstance(batch, torch.Tensor):
                loaded.model(input_ids=batch)
            else:
                for half in batch:
                    for ids, real in zip(half["input_ids"], half["attention_mask"], strict=True):
                        loaded.model(input_ids=ids[real.bool()][None])
    return sums


@pytest.mark.parametrize("name", BATCH)
def test_magnitude_activation(load: Load, name: str) -> None:
    mask, squares = make_mask(load(name), tiny.TEXTS, "magnitude-activation", **SMALL), input_squares(load(name), name)
    weights = dict(load(name).model.named_parameters())
    for matrix in mask.matrices:
        norms = squares[matrix.name].sqrt()
        scores = weights[matrix.name].abs() * (norms[:, None] if name == "gpt2" else norms)
        kept, left = lowest_kept_and_highest_left(scores, matrix.indices)
        assert kept >= left * 0.999


def test_random_differs_by_seed_and_by_matrix(load: Load) -> None:
    first, again, other = (make_mask(load("llama"), tiny.TEXTS, "random", seed=seed, **SMALL) for seed in (1, 1, 2))
    assert first.hash == again.hash
    assert not all(np.array_equal(a.indices, b.indices) for a, b in zip(first.matrices, other.matrices, strict=True))
    by_name = {matrix.name.split(".", 3)[3]: matrix.indices for matrix in first.matrices[:7]}
    assert not np.array_equal(by_name["mlp.gate_proj.weight"], by_name["mlp.up_proj.weight"])


def test_methods_choose_differently(load: Load) -> None:
    assert len({make_mask(load("llama"), tiny.TEXTS, method, **SMALL).hash for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_was(load: Load, method: Any) -> None:
    loaded = load("llama")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    make_mask(loaded, tiny.TEXTS, method, **SMALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_gradients_do_not_pile_up(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("llama")
    alive: list[int] = []

    def count(visit: Callable[[str, torch.Tensor], None]) -> Callable[[str, torch.Tensor], None]:
        def counting(name: str, gradient: torch.Tensor) -> None:
            alive.append(sum(parameter.grad is not None for parameter in loaded.model.parameters()))
            visit(name, gradient)

        return counting

    monkeypatch.setattr(
        "meerkat_mq.engines.torch.masks.each_gradient",
        lambda model, batches, weights, visit, tick: each_gradient(model, batches, weights, count(visit), tick),
    )
    make_mask(loaded, tiny.TEXTS, **SMALL)
    assert len(alive) == 2 * 6 * 14
    assert max(alive) == 1


def test_what_the_mask_holds(load: Load) -> None:
    loaded = load("llama")
    mask = make_mask(loaded, tiny.TEXTS, **SMALL)
    weights = dict(loaded.model.named_parameters())
    assert mask.fingerprint == loaded.fingerprint
    assert mask.tokenizer_fingerprint == loaded.tokenizer_fingerprint
    for matrix in mask.matrices:
        assert matrix.indices.dtype == np.uint32
        assert matrix.indices.size == weights[matrix.name].numel() * 5 // 100
        expected = weights[matrix.name].flatten()[matrix.indices.astype(np.int64)].numpy()
        assert matrix.theta_0.tobytes() == expected.tobytes()
    assert Mask.from_bytes(mask.to_bytes()).hash == mask.hash


@pytest.mark.parametrize(("density", "count"), [(0.29, 29), (0.07, 7), (1e-2, 1), (0.999, 99)])
def test_counts_are_exact_floors_of_decimals(density: float, count: int) -> None:
    """0.29 · 100 is below 29 in floats."""
    assert _counts({"blocks.0.weight": torch.empty(10, 10)}, density) == {"blocks.0.weight": count}


def test_density_one_is_dense(load: Load) -> None:
    mask = make_mask(load("bert"), tiny.TEXTS, **(SMALL | {"density": 1}))
    assert mask.size == mask.covered


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_density_out_of_range(load: Load, density: float) -> None:
    with pytest.raises(MaskError, match=rf"^density: {density} is outside \(0, 1\]; "):
        make_mask(load("llama"), tiny.TEXTS, density=density)


def test_matrices_that_keep_nothing_are_left_out(load: Load) -> None:
    mask = make_mask(load("llama"), tiny.TEXTS, "magnitude", density=1 / 1500, sequences=2, length=32)
    assert [matrix.shape for matrix in mask.matrices] == [(32, 48), (48, 32), (48, 32)] * 2
    assert mask.size == 6


def test_nothing_left(load: Load) -> None:
    with pytest.raises(MaskError, match=r"density: 0\.0001 of 1536 weights keeps none; raise the density"):
        make_mask(load("llama"), tiny.TEXTS, density=1e-4)


def test_unknown_method(load: Load) -> None:
    with pytest.raises(MaskError, match="mask method: 'best' is unknown; use one of sensitivity, "):
        make_mask(load("llama"), tiny.TEXTS, "best")  # type: ignore[arg-type]


def test_inexact_dtype(load: Load) -> None:
    with pytest.raises(MaskError, match="bfloat16 rounds this checkpoint's weights; load it in float32"):
        make_mask(load("llama", dtype="bfloat16"), tiny.TEXTS)


def test_exact_bfloat16_has_the_same_theta_0(load: Load) -> None:
    masks = [
        make_mask(load("llama-bf16", dtype=dtype), tiny.TEXTS, "magnitude", **SMALL)
        for dtype in ("float32", "bfloat16")
    ]
    assert masks[0].theta_0.tobytes() == masks[1].theta_0.tobytes()


def test_too_little_text(load: Load) -> None:
    with pytest.raises(MaskError, match=r"text: \d+ tokens make no sequence of 64"):
        make_mask(load("llama"), tiny.TEXTS[:1], density=0.1)
    with pytest.raises(MaskError, match="text: 1 documents in batches of 16; contrast needs two"):
        make_mask(load("bert"), ["one two", "three"], density=0.1)


def test_scores_that_are_not_finite(load: Load) -> None:
    loaded = load("llama")
    loaded.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(MaskError, match=rf"{loaded.folder}: model\.\S+: a score is not finite"):
        make_mask(loaded, tiny.TEXTS, **SMALL)


def test_a_gradient_that_is_not_finite_names_the_folder(load: Load) -> None:
    loaded = load("llama")
    loaded.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(MaskError, match=rf"{loaded.folder}: model\.\S+: theta_0 or g_p is not finite"):
        make_mask(loaded, tiny.TEXTS, **SMALL | {"method": "magnitude"})


@pytest.mark.parametrize(("method", "passes"), [("sensitivity", 2), ("magnitude-activation", 2), ("magnitude", 1)])
def test_progress(load: Load, method: Any, passes: int) -> None:
    seen: list[tuple[int, int]] = []
    make_mask(load("llama"), tiny.TEXTS, method, progress=lambda done, total: seen.append((done, total)), **SMALL)
    assert seen == [(done, 6 * passes) for done in range(1, 6 * passes + 1)]


def test_packed_sequences(load: Load) -> None:
    loaded = load("llama")
    batches = calibration_batches(loaded, tiny.TEXTS, seed=0, sequences=5, length=32, batch_size=2)
    assert [tuple(batch.shape) for batch in batches if isinstance(batch, torch.Tensor)] == [(2, 32), (2, 32), (1, 32)]
    tokens = torch.cat([batch.flatten() for batch in batches if isinstance(batch, torch.Tensor)]).tolist()
    assert tokens[0] == loaded.tokenizer.bos_token_id
    assert tokens[tokens.index(loaded.tokenizer.eos_token_id) + 1] == loaded.tokenizer.bos_token_id
    text = loaded.tokenizer.decode(tokens[1 : tokens.index(loaded.tokenizer.eos_token_id)])
    assert text in tiny.TEXTS
    other = calibration_batches(loaded, tiny.TEXTS, seed=1, sequences=5, length=32, batch_size=2)
    assert not torch.equal(torch.as_tensor(batches[0]), torch.as_tensor(other[0]))


def test_halves(load: Load) -> None:
    loaded = load("bert")
    (first, second), *_ = calibration_batches(loaded, tiny.TEXTS, seed=0, sequences=6, length=64, batch_size=4)
    decode = loaded.tokenizer.batch_decode
    for a, b in zip(decode(first["input_ids"], True), decode(second["input_ids"], True), strict=True):
        assert f"{a} {b}" in tiny.TEXTS


scores = hnp.arrays(np.float32, st.integers(1, 60), elements=st.integers(0, 5).map(float))


@given(scores=scores, data=st.data())
def test_best_takes_the_highest_and_of_equals_the_first(scores: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, scores.size))
    expected = sorted(sorted(range(scores.size), key=lambda place: (-scores[place], place))[:count])
    assert best(scores, count).tolist() == expected


@pytest.mark.real
def test_real_mask_of_a_causal_model(shared: Path, stories: Path) -> None:
    texts = read_texts(shared / "data" / "text" / "c4_sample.jsonl")
    loaded = load_model(stories)
    mask = make_mask(loaded, texts, density=0.01, sequences=8, length=128)
    assert mask.size == sum(layer.weight.numel() // 100 for layer in linear_layers(loaded.model).values())
    assert np.count_nonzero(mask.g_p) > 0.99 * mask.size


@pytest.mark.real
def test_real_mask_of_an_encoder(shared: Path, minilm: Path) -> None:
    texts = read_texts(shared / "data" / "text" / "c4_sample.jsonl")
    mask = make_mask(load_model(minilm), texts, sequences=8, length=64, batch_size=8)
    assert (mask.size, len(mask.matrices)) == (10_596, 36)
    assert np.count_nonzero(mask.g_p) > 0.99 * mask.size
