"""Names that transformers changes as it loads: what an export holds is what loads, whatever the checkpoint calls it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.export import check_export, export_model
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.engines.torch.proof import check_loaded
from meerkat_mq.errors import ModelMismatch, UnsupportedModel
from tests.engines import tiny

Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The same model under other names."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


def dense(folder: Path, method: Any = "dense") -> tuple[Mask, np.ndarray]:
    mask = make_mask(load_model(folder), tiny.TEXTS, method, density=0.1, sequences=4, length=16)
    return mask, mask.theta_0 + np.linspace(-0.1, 0.1, mask.size, dtype=np.float32)


def proven(folder: Path, out: Path, method: Any = "dense") -> Tensors:
    """Masked, exported, and loaded again as base + theta; the exported tensors."""
    mask, theta = dense(folder, method)
    export_model(folder, mask, theta, out)
    check_export(out, folder, mask, theta)
    check_loaded(out, folder, mask, theta, tiny.TASK)
    return load_file(out / "model.safetensors")


def with_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def test_a_stored_copy_of_tied_weights(tmp_path: Path) -> None:
    """A3: one of two tied copies was patched, and the export loaded as another model."""
    base = rewritten(tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "base"), with_head)
    exported = proven(base, tmp_path / "out")
    assert torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    mask, theta = dense(base)
    exported["lm_head.weight"] = load_file(base / "model.safetensors")["lm_head.weight"]
    save_file(exported, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelMismatch, match=r"lm_head\.weight does not load as base and theta give it"):
        check_loaded(tmp_path / "out", base, mask, theta, tiny.TASK)
    with pytest.raises(ModelMismatch, match=r"weight \d+ of lm_head\.weight is not theta's"):
        check_export(tmp_path / "out", base, mask, theta)


def test_copies_in_different_shards(tmp_path: Path) -> None:
    base = rewritten(tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "base"), with_head)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    files = {name: f"model-{2 if name == 'lm_head.weight' else 1}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    mask, theta = dense(base)
    export_model(base, mask, theta, tmp_path / "out")
    check_export(tmp_path / "out", base, mask, theta)
    check_loaded(tmp_path / "out", base, mask, theta, tiny.TASK)


def test_only_the_other_copy_is_stored(tmp_path: Path) -> None:
    """Tied by the configuration, and stored under the head's name alone."""

    def head_alone(tensors: Tensors) -> Tensors:
        return {("lm_head.weight" if "embed" in name else name): value for name, value in tensors.items()}

    base = rewritten(tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "base"), head_alone)
    exported = proven(base, tmp_path / "out")
    assert "model.embed_tokens.weight" not in exported


def test_copies_that_differ_are_not_tied(tmp_path: Path) -> None:
    """Tied by the configuration alone: transformers loads them as two, and so do we."""

    def apart(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    base = rewritten(tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "base"), apart)
    mask, _ = dense(base)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {matrix.name for matrix in mask.matrices}
    proven(base, tmp_path / "out")


def test_copies_in_two_formats(tmp_path: Path) -> None:
    """They are equal now; new values would be rounded apart, and load as two."""

    def halved(tensors: Tensors) -> Tensors:
        exact = tensors["model.embed_tokens.weight"].bfloat16()
        return tensors | {"model.embed_tokens.weight": exact.float(), "lm_head.weight": exact}

    base = rewritten(tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "base"), halved)
    with pytest.raises(UnsupportedModel, match=r"embed_tokens\.weight: its tied copies are stored as BF16 and F32"):
        dense(base)


def test_two_tensors_of_one_name_are_refused_when_the_mask_is_made(tmp_path: Path) -> None:
    """transformers reads both names as the same parameter; which of the two wins, is its own affair."""

    def doubled(tensors: Tensors) -> Tensors:
        copy = tensors["transformer.wte.weight"]
        return tensors | {"wte.weight": copy, "lm_head.weight": copy}

    base = rewritten(tiny.save(tiny.gpt2(), tmp_path / "base"), doubled)
    with pytest.raises(UnsupportedModel, match=r"wte\.weight: is put together from 2 tensors of the checkpoint"):
        dense(base)


def bert_lm() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2, is_decoder=True, architectures=["BertLMHeadModel"],
    )  # fmt: skip
    return BertLMHeadModel(config)


def test_tied_weights_and_biases_of_a_bert(tmp_path: Path) -> None:
    """Its decoder's weight and bias are both copies."""

    def all_copies(tensors: Tensors) -> Tensors:
        return tensors | {
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        }

    exported = proven(rewritten(tiny.save(bert_lm(), tmp_path / "base"), all_copies), tmp_path / "out")
    for one, other in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        assert torch.equal(exported[one], exported[other])


def old_norms(tensors: Tensors) -> Tensors:
    """As in checkpoints from TensorFlow."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }


def prefixed(tensors: Tensors) -> Tensors:
    """As of a model with a head."""
    return {f"bert.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "method"),
    [
        (old_norms, "dense"),
        (prefixed, "lora"),
        (lambda tensors: prefixed(old_norms(tensors)), "dense"),
        (lambda tensors: prefixed(old_norms(tensors)), "sensitivity"),
    ],
)
def test_names_of_older_berts(tmp_path: Path, change: Callable[[Tensors], Tensors], method: str) -> None:
    """A4: mask and run succeeded, and the export failed at the very end."""
    base = rewritten(tiny.save(tiny.bert(), tmp_path / "base"), change)
    exported = proven(base, tmp_path / "out", method)
    assert exported.keys() == load_file(base / "model.safetensors").keys()


def test_fused_experts_are_found_when_the_mask_is_made(tmp_path: Path) -> None:
    """A4: a checkpoint holds each expert, the model all in one parameter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=2,
    )  # fmt: skip
    base = tiny.save(MixtralForCausalLM(config), tmp_path / "base")
    for method in ("dense", "sensitivity"):
        with pytest.raises(UnsupportedModel, match="expert"):
            dense(base, method)


def test_a_text_model_in_a_multimodal_folder(tmp_path: Path) -> None:
    """A4: the language model's names have another prefix in the checkpoint."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=300, boi_token_index=301, eoi_token_index=302,
    )  # fmt: skip
    base = tiny.save(Gemma3ForConditionalGeneration(config), tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in stored)
    exported = proven(base, tmp_path / "out", "sensitivity")
    assert exported.keys() == stored.keys()
    changed = {name for name in stored if not torch.equal(stored[name], exported[name])}
    assert changed
    assert all(name.startswith("language_model.model.layers.") for name in changed)
