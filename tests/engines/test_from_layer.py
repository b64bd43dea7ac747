"""`meerkat mask --from-layer`: nothing that the hidden state before that block depends on is masked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.blocks import Layer, blocks_of, body_pass, number_of, trial
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import METHODS, make_mask
from meerkat_mq.errors import MaskError
from tests.engines import tiny
from tests.support.command import Meerkat

Load = Callable[..., LoadedModel]
SMALL: dict[str, Any] = {"density": 0.05, "sequences": 4, "length": 32}
FIRST = {"llama": "model.layers.0.", "gpt2": "transformer.h.0.", "bert": "encoder.layer.0."}
EMBEDDINGS = {
    "llama": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "bert": {"embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"},
}
ABOVE = {"llama": {"model.norm.weight", "lm_head.weight"}, "gpt2": {"transformer.ln_f.weight"}, "bert": set[str]()}


def names(mask: Mask) -> set[str]:
    return {matrix.name for matrix in mask.matrices}


def state_before_the_second_block(loaded: LoadedModel) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = blocks_of(loaded)[1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].clone()))
    with torch.inference_mode():
        body_pass(loaded, trial(loaded))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FIRST)
def test_the_state_before_the_block_does_not_depend_on_the_mask(load: Load, name: str, method: Any) -> None:
    loaded = load(name)
    whole = make_mask(loaded, tiny.TEXTS, method, **SMALL)
    mask = make_mask(loaded, tiny.TEXTS, method, from_layer=1, **SMALL)
    assert names(mask) < names(whole)
    assert not any(matrix.startswith(FIRST[name]) for matrix in names(mask))
    assert not names(mask) & EMBEDDINGS[name]
    if method == "dense":
        assert names(mask) >= ABOVE[name]
    if method == "lora":
        return
    before, parameters = state_before_the_second_block(loaded), dict(loaded.model.named_parameters())
    with torch.no_grad():
        for matrix in mask.matrices:
            parameters[matrix.name] += 1
    assert torch.equal(state_before_the_second_block(loaded), before)


@pytest.mark.parametrize("name", FIRST)
def test_what_is_masked_above_is_what_a_whole_mask_has_there(load: Load, name: str) -> None:
    whole, mask = (make_mask(load(name), tiny.TEXTS, from_layer=layer, **SMALL) for layer in (0, 0.5))
    of = {matrix.name: matrix for matrix in whole.matrices}
    for matrix in mask.matrices:
        assert np.array_equal(matrix.indices, of[matrix.name].indices)
        np.testing.assert_allclose(matrix.g_p, of[matrix.name].g_p, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_left_out(tmp_path: Path, tied: bool) -> None:
    loaded = load_model(tiny.save(tiny.llama(tie_word_embeddings=tied), tmp_path / "model"))
    mask = make_mask(loaded, tiny.TEXTS, "dense", from_layer=1, sequences=4, length=32)
    assert ("lm_head.weight" in names(mask)) is not tied
    assert "model.embed_tokens.weight" not in names(mask)


@pytest.mark.parametrize(
    ("layer", "count", "number"), [(0, 6, 0), (5, 6, 5), (0.5, 6, 3), (0.75, 6, 5), (0.75, 30, 23), (0.1, 6, 1)]
)
def test_a_block_by_number_or_share(layer: Layer, count: int, number: int) -> None:
    assert number_of(layer, count) == number


@pytest.mark.parametrize("layer", [-1, 2, 1.0, 0.0, 0.05, 0.95, 1.5, -0.5, float("nan")])
def test_no_such_block(load: Load, layer: Layer) -> None:
    with pytest.raises(MaskError, match=r"^from-layer: \S+ is no block; the model has 2 blocks: give 0 to 1, or a sha"):
        make_mask(load("llama"), tiny.TEXTS, "magnitude", from_layer=layer, **SMALL)


def test_command(meerkat: Meerkat, tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(tiny.TEXTS))
    command = ("mask", "--model", folders["llama"], "--text", tmp_path / "t.txt", "--out", tmp_path / "m.mkm")
    short = ("--sequences", 2, "--length", 16, "--density", 0.1, "--method", "magnitude")
    assert "in 7 matrices" in meerkat(*command, *short, "--from-layer", "0.5").out
    assert all(matrix.startswith("model.layers.1.") for matrix in names(Mask.load(tmp_path / "m.mkm")))
    meerkat(*command, *short, "--from-layer", "2").failed(4, "from-layer: 2 is no block; the model has 2 blocks")
    meerkat(*command, *short, "--from-layer", "half").failed(2, "--from-layer: 'half' is no number; give a block's")
