"""LoRA: the adapter that a mask's names and shapes speak of, from mask to exported model."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.engines.evaluate import first_order
from meerkat_mq.engines.torch.adapter import adapter_pairs, new_adapter, with_adapter
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.export import check_export, export_model
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import MaskError, MissingExtra, ModelMismatch, UnsupportedModel
from tests.engines import tiny

Load = Callable[..., LoadedModel]
LAYERS = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
    "llama-bf16": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"],
    "bert": ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value"],
}
each_model = pytest.mark.parametrize("name", LAYERS)


def loaded_as_it_is(load: Load, name: str) -> LoadedModel:
    return load(name, dtype="bfloat16" if name.endswith("bf16") else "float32")


@pytest.fixture
def lora(load: Load) -> Callable[..., Mask]:
    return lambda name, rank=3: make_mask(
        loaded_as_it_is(load, name), tiny.TEXTS, "lora", rank=rank, sequences=4, length=32
    )


def moved(mask: Mask) -> np.ndarray:
    return mask.theta_0 + np.linspace(-0.1, 0.1, mask.size, dtype=np.float32)


@each_model
def test_the_mask_is_the_whole_adapter(lora: Callable[..., Mask], name: str) -> None:
    mask = lora(name)
    pairs = adapter_pairs(mask)
    assert len(pairs) == (2 if name == "gpt2" else 4)
    assert set(LAYERS[name]) <= pairs.keys()
    assert {rank for rank, _, _ in pairs.values()} == {3}
    start = 0
    for matrix in mask.matrices:
        assert matrix.indices.size == np.prod(matrix.shape)
        if ".lora_A." in matrix.name:
            z = direction("mk1", 0, start, start + matrix.indices.size)
            assert np.array_equal(matrix.theta_0, z * np.float32((3 * 32) ** -0.5))
            assert not matrix.g_p.any()  # B = 0 lets nothing through
            start += matrix.indices.size
        else:
            assert not matrix.theta_0.any()
            assert matrix.g_p.any()
    assert Mask.from_bytes(mask.to_bytes()).hash == mask.hash


@each_model
def test_an_engine_builds_it_from_the_mask(load: Load, lora: Callable[..., Mask], name: str) -> None:
    mask, loaded = lora(name), loaded_as_it_is(load, name)
    engine = TransformersEngine(loaded, mask, tiny.TASK)
    engine.check(mask)
    plain = TransformersEngine(loaded, make_mask(loaded, tiny.TEXTS, "magnitude", density=0.1, length=32), tiny.TASK)
    batch = engine.prepare(tiny.ROWS[:4])
    before = plain.losses(batch)
    np.testing.assert_array_equal(engine.losses(batch), before)
    engine.write(moved(mask))
    assert not np.array_equal(engine.losses(batch), before)
    np.testing.assert_array_equal(plain.losses(batch), before)  # the weights are shared, the adapter is not
    assert not any("lora" in key for key, _ in loaded.model.named_parameters())
    assert TransformersEngine(engine.loaded, mask, tiny.TASK).loaded is engine.loaded
    with pytest.raises(ModelMismatch, match="differ from theta_0"):
        engine.check(mask)


def test_bfloat16_rounds_no_perturbation_of_an_adapter(load: Load, lora: Callable[..., Mask]) -> None:
    mask = lora("llama-bf16")
    engine = TransformersEngine(load("llama-bf16", dtype="bfloat16"), mask, tiny.TASK)
    assert engine.surviving_share(mask.theta_0, direction("mk1", 1, 0, mask.size), 1e-3).kept > 0.999


@each_model
def test_export_is_merged(
    folders: dict[str, Path], load: Load, lora: Callable[..., Mask], tmp_path: Path, name: str
) -> None:
    mask, out = lora(name), tmp_path / "out"
    theta = moved(mask)
    export_model(folders[name], mask, theta, out)
    check_export(out, folders[name], mask, theta)
    family = AutoModel if name == "bert" else AutoModelForCausalLM
    exported, base = (dict(family.from_pretrained(folder).named_parameters()) for folder in (out, folders[name]))
    assert {key.removesuffix(".weight") for key in base if not torch.equal(base[key], exported[key])} == set(
        adapter_pairs(mask)
    )
    merged = TransformersEngine(
        replace(loaded_as_it_is(load, name), model=family.from_pretrained(out).eval()), mask, tiny.TASK
    )
    merged.write(mask.theta_0)
    adapted = TransformersEngine(loaded_as_it_is(load, name), mask, tiny.TASK)
    adapted.write(theta)
    batch = adapted.prepare(tiny.ROWS[:4])
    np.testing.assert_allclose(merged.losses(batch), adapted.losses(batch), atol=3e-2 if name == "llama-bf16" else 1e-5)


def test_an_altered_merge_is_found(folders: dict[str, Path], lora: Callable[..., Mask], tmp_path: Path) -> None:
    mask = lora("llama")
    theta = moved(mask)
    export_model(folders["llama"], mask, theta, tmp_path / "out")
    theta[-1] += 1
    with pytest.raises(
        ModelMismatch, match=r"weight \d+ of model\.layers\.1\.self_attn\.v_proj\.weight is not theta's"
    ):
        check_export(tmp_path / "out", folders["llama"], mask, theta)


def test_first_order_trains_the_adapter(load: Load, lora: Callable[..., Mask]) -> None:
    mask = lora("llama", 2)
    engine = TransformersEngine(load("llama"), mask, tiny.TASK)
    batch = engine.prepare(tiny.ROWS)
    before = engine.losses(batch).mean()
    trained = first_order(engine, mask.theta_0, tiny.ROWS, steps=20, lr=1e-2)
    assert trained.size == mask.size
    assert engine.losses(batch).mean() < before


@pytest.mark.parametrize("rank", [0, 257])
def test_rank_out_of_range(load: Load, rank: int) -> None:
    with pytest.raises(MaskError, match=rf"rank: {rank} is outside 1…256; 8 is common"):
        new_adapter(load("llama"), rank)


def test_without_peft(load: Load, lora: Callable[..., Mask], monkeypatch: pytest.MonkeyPatch) -> None:
    mask = lora("llama")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(MissingExtra, match=r"peft is not installed; pip install 'meerkat-mq\[lora\]'"):
        TransformersEngine(load("llama"), mask, tiny.TASK)


def test_no_projection_of_a_known_name(load: Load) -> None:
    loaded = load("llama")
    for layer in loaded.model.model.layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="its layers are down_proj, gate_proj, up_proj; use another method"):
        new_adapter(loaded, 8)


def altered(mask: Mask, place: int, **changes: Any) -> Mask:
    matrices = list(mask.matrices)
    matrices[place] = replace(matrices[place], **changes)
    return replace(mask, matrices=tuple(matrices))


def of_shape(name: str, *shape: int) -> MaskedMatrix:
    count = int(np.prod(shape))
    zeros = np.zeros(count, np.float32)
    return MaskedMatrix(name, shape, np.arange(count, dtype=np.uint32), zeros, zeros)


def test_masks_that_fit_no_adapter(load: Load, lora: Callable[..., Mask]) -> None:
    """A mask comes over the network: nothing is built before names and shapes fit."""
    loaded, mask = load("llama"), lora("llama")
    huge = altered(
        mask, 0, shape=(2**20, 32), indices=np.array([0], np.uint32),
        theta_0=np.zeros(1, np.float32), g_p=np.zeros(1, np.float32),
    )  # fmt: skip
    layer = LAYERS["llama"][0]
    other = [of_shape(f"{layer}.lora_A.default.weight", 2, 31), of_shape(f"{layer}.lora_B.default.weight", 32, 2)]
    unequal = [*mask.matrices[:2], *lora("llama", 2).matrices[2:]]
    for wrong, words in [
        (huge, "holds no whole adapter: model.layers.0.self_attn.q_proj.lora_A"),
        (replace(mask, matrices=mask.matrices[:1]), r"A \(3, 32\) and B \(0, 0\) of .*q_proj do not fit"),
        (replace(mask, matrices=(*mask.matrices, of_shape("z", 2))), "holds no whole adapter: z"),
        (replace(mask, matrices=tuple(other)), f"has no layer {layer} for the mask's adapter"),
        (replace(mask, matrices=tuple(unequal)), r"the mask's adapter has ranks \[2, 3\]"),
    ]:
        with pytest.raises(ModelMismatch, match=words):
            with_adapter(loaded, wrong)


def test_config_says_nothing_of_peft(folders: dict[str, Path], lora: Callable[..., Mask], tmp_path: Path) -> None:
    mask = lora("llama")
    export_model(folders["llama"], mask, mask.theta_0, tmp_path / "out")
    assert "peft" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("adapter*"))
