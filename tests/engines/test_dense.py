"""Full-parameter ZO: theta is every parameter that passes use; and float16, and what scoring holds at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.evaluate import first_order
from meerkat_mq.engines.torch import calibration
from meerkat_mq.engines.torch.calibration import calibration_batches, calibration_loss, each_gradient
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.export import check_export, export_model
from meerkat_mq.engines.torch.load import LoadedModel, all_weights, linear_layers, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import MaskError
from tests.engines import tiny

Load = Callable[..., LoadedModel]
each_model = pytest.mark.parametrize("name", ["llama", "llama-bf16", "gpt2", "bert"])


def dtype_of(name: str) -> str:
    return "bfloat16" if name.endswith("bf16") else "float32"


@pytest.fixture
def dense(load: Load) -> Callable[[str], Mask]:
    return lambda name: make_mask(load(name, dtype=dtype_of(name)), tiny.TEXTS, "dense", sequences=4, length=32)


def moved(mask: Mask) -> np.ndarray:
    return mask.theta_0 + np.linspace(-0.1, 0.1, mask.size, dtype=np.float32)


@each_model
def test_the_mask_is_the_whole_model(load: Load, dense: Callable[[str], Mask], name: str) -> None:
    mask, model = dense(name), load(name, dtype=dtype_of(name)).model
    expected = {key: weight for key, weight in model.named_parameters() if "pooler" not in key}
    assert [matrix.name for matrix in mask.matrices] == sorted(expected)
    assert mask.size == mask.covered == sum(weight.numel() for weight in expected.values())
    for matrix in mask.matrices:
        assert matrix.shape == tuple(expected[matrix.name].shape)
        assert np.array_equal(matrix.theta_0, expected[matrix.name].float().flatten().numpy())
    assert Mask.from_bytes(mask.to_bytes()).hash == mask.hash


def test_tied_weights_are_one(tmp_path: Path) -> None:
    loaded = load_model(tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "tied"))
    names = list(all_weights(loaded.model))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@each_model
def test_a_write_replaces_every_weight(load: Load, dense: Callable[[str], Mask], name: str) -> None:
    mask = dense(name)
    engine = TransformersEngine(load(name, dtype=dtype_of(name)), mask, tiny.TASK)
    engine.check(mask)
    assert all(target.indices is None for target in engine.targets)
    theta = moved(mask)
    theta.flags.writeable = False
    engine.write(theta)
    weights = dict(engine.loaded.model.named_parameters())
    for matrix, part in mask.slices():
        expected = torch.tensor(theta[part]).to(weights[matrix.name].dtype)
        assert torch.equal(weights[matrix.name].flatten(), expected)
    assert engine.surviving_share(theta, direction("mk1", 1, 0, mask.size), 1e-1).moved > 0.9


@each_model
def test_export_is_theta(folders: dict[str, Path], dense: Callable[[str], Mask], tmp_path: Path, name: str) -> None:
    mask, out = dense(name), tmp_path / "out"
    export_model(folders[name], mask, moved(mask), out)
    check_export(out, folders[name], mask, moved(mask))
    family = AutoModel if name == "bert" else AutoModelForCausalLM
    weights = dict(family.from_pretrained(out).named_parameters())
    for matrix, part in mask.slices():
        assert torch.equal(
            weights[matrix.name].flatten(), torch.tensor(moved(mask)[part]).to(weights[matrix.name].dtype)
        )


def test_first_order_trains_all_of_it(load: Load, dense: Callable[[str], Mask]) -> None:
    mask = dense("bert")
    engine = TransformersEngine(load("bert"), mask, tiny.TASK)
    batch = engine.prepare(tiny.ROWS)
    before = engine.losses(batch).mean()
    trained = first_order(engine, mask.theta_0, tiny.ROWS, steps=5, lr=1e-3)
    assert np.count_nonzero(trained != mask.theta_0) > 0.5 * mask.size
    assert engine.losses(batch).mean() < before


def test_more_weights_than_a_run_holds(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_mq.engines.torch.masks.MAX_RUN_WEIGHTS", 1000)
    with pytest.raises(MaskError, match=r"mask: [\d,]+ weights, and a run holds 1,000 at most; lower the density"):
        make_mask(load("llama"), tiny.TEXTS, "dense", sequences=4, length=32)


# --- float16 ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["sensitivity", "magnitude-activation", "dense", "lora"])
def test_float16(tmp_path: Path, name: str, method: Any) -> None:
    """On the CPU: mask, passes, export."""
    model = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}[name]()
    folder = tiny.save(model, tmp_path / "half", dtype=torch.float16)
    loaded = load_model(folder, dtype="float16")
    assert loaded.exact
    mask = make_mask(loaded, tiny.TEXTS, method, density=0.1, sequences=4, length=32)
    assert mask.g_p.any()
    engine = TransformersEngine(loaded, mask, tiny.TASK)
    engine.check(mask)
    wide = TransformersEngine(load_model(folder), mask, tiny.TASK)
    rows = tiny.ROWS[:4]
    engine.write(moved(mask))
    wide.write(moved(mask))
    np.testing.assert_allclose(engine.losses(engine.prepare(rows)), wide.losses(wide.prepare(rows)), atol=2e-2)
    export_model(folder, mask, moved(mask), tmp_path / "out")
    check_export(tmp_path / "out", folder, mask, moved(mask))
    assert load_model(tmp_path / "out", dtype="float16").exact


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float16"), ("llama-bf16", "float16")])
def test_float16_that_would_round(load: Load, name: str, dtype: str) -> None:
    with pytest.raises(MaskError, match="float16 rounds this checkpoint's weights; load it in float32 for masks"):
        make_mask(load(name, dtype=dtype), tiny.TEXTS)


# --- what scoring holds ---


class LargestTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sizes of the tensors that operations made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.sizes += [tensor.numel() for tensor in torch.utils._pytree.tree_leaves(made) if torch.is_tensor(tensor)]
        return made


def test_logits_are_made_in_slices(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_SLICE", 5)
    loaded = load("llama")
    batch = calibration_batches(loaded, tiny.TEXTS, seed=0, sequences=1, length=64, batch_size=1)
    weights = {name: layer.weight for name, layer in linear_layers(loaded.model).items()}
    with LargestTensors() as made:
        each_gradient(loaded, batch, weights, lambda *_: None, lambda: None)
    assert 5 * tiny.VOCABULARY in made.sizes
    assert max(made.sizes) <= tiny.VOCABULARY * 32  # the head's own weight, transposed; all logits are twice that


@pytest.mark.parametrize("size", [1, 5, 31, 64])
def test_slices_do_not_change_the_loss(load: Load, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(calibration, "_SLICE", size)
    for name in ("llama", "gpt2"):
        loaded = load(name)
        (ids,) = calibration_batches(loaded, tiny.TEXTS, seed=0, sequences=2, length=32, batch_size=2)
        assert isinstance(ids, torch.Tensor)
        by_hand = loaded.model(input_ids=ids, labels=ids).loss
        assert float(calibration_loss(loaded, ids)) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_blocks_keep_their_inputs_only(load: Load, name: str) -> None:
    """Between the two ways, autograd holds no activation of a feed-forward layer, whose width is like no other's."""
    loaded = load(name)
    width = {"llama": 48, "bert": 64}[name]
    batches = calibration_batches(loaded, tiny.TEXTS, seed=0, sequences=4, length=30, batch_size=4)
    weights = {key: layer.weight for key, layer in linear_layers(loaded.model).items()}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with (
        calibration.trainable(weights.values()),
        calibration._recomputing(loaded.model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        calibration_loss(loaded, batches[0])
    assert not [shape for shape in kept if len(shape) == 3 and shape[2] == width]
    assert not any("forward" in vars(module) for module in loaded.model.modules())
