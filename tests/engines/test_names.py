"""Which tensors of a checkpoint hold which parameter, and which of them a mask may take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from meerkat_mq.engines.torch.checkpoint import stored_tensors
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.engines.torch.names import stored_copies
from meerkat_mq.errors import UnsupportedModel
from tests.engines import tiny

Copy = Callable[[str], Path]


def test_tied_copies_are_all_found(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tiny.rename(folder, str, **{"lm_head.weight": embeddings.clone()})
    stored = stored_tensors(folder)
    copies = stored_copies(folder)
    assert copies["model.embed_tokens.weight"] == (stored["model.embed_tokens.weight"], stored["lm_head.weight"])
    assert "lm_head.weight" not in copies
    tiny.rename(folder, str, **{"lm_head.weight": embeddings + 1})
    assert stored_copies(folder).keys() == dict(load_model(folder).model.named_parameters()).keys()


def test_only_the_head_is_stored(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path)
    tiny.rename(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
    assert stored_copies(folder)["model.embed_tokens.weight"] == (stored_tensors(folder)["lm_head.weight"],)


def test_names_of_old_norms(copy: Copy) -> None:
    folder = copy("bert")
    tiny.rename(
        folder, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")
    )
    mask = make_mask(load_model(folder), tiny.TEXTS, "dense", **tiny.SMALL)
    copies = stored_copies(folder)
    assert {matrix.name for matrix in mask.matrices} <= copies.keys()
    assert copies["embeddings.LayerNorm.weight"] == (stored_tensors(folder)["embeddings.LayerNorm.gamma"],)


def mixtral(folder: Path) -> Path:
    config = transformers.MixtralConfig(**tiny.SIZES, num_key_value_heads=2, num_local_experts=2)
    return tiny.save(transformers.MixtralForCausalLM(config), folder)


def test_what_cannot_be_written_back_is_refused_before_scoring(tmp_path: Path) -> None:
    loaded = load_model(mixtral(tmp_path))
    with pytest.raises(UnsupportedModel, match=r"experts\.down_proj: is put together from 2 tensors of the checkpoint"):
        make_mask(loaded, tiny.TEXTS, "dense", **tiny.SMALL, progress=lambda *_: pytest.fail("scored"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multimodal Gemma 3."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=tiny.SIZES | {"num_key_value_heads": 2, "head_dim": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return tiny.save(transformers.Gemma3ForConditionalGeneration(config), tmp_path_factory.mktemp("gemma"))


@pytest.mark.parametrize("method", ["sensitivity", "magnitude-activation", "magnitude", "random", "dense", "lora"])
def test_weights_outside_the_loss_are_left_out(gemma: Path, method: Any) -> None:
    said: list[str] = []
    mask = make_mask(load_model(gemma), tiny.TEXTS, method, density=0.1, rank=2, say=said.append, **tiny.SMALL)
    assert all(".language_model." in matrix.name for matrix in mask.matrices)
    assert "get no gradient from text and are left out" in said[0]
    if method != "lora":
        assert {matrix.name for matrix in mask.matrices} <= stored_copies(gemma).keys()
        assert all(matrix.g_p.any() for matrix in mask.matrices)
