"""What is found out about a model before it is used: kinds, names, ids, what a tokenizer or a library adds."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import processors

from meerkat_mq.engines.prompts import prompt_ids
from meerkat_mq.engines.torch.checkpoint import fingerprint
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.folder import find_folder
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import ModelError, ModelNotFound, UnsupportedModel
from tests.engines import tiny

Copy = Callable[[str], Path]


# --- kinds ---


@pytest.mark.parametrize("names", [["FSDPLlamaForCausalLM"], ["Unheard"], [], None])
def test_the_configuration_decides_and_not_a_name(copy: Copy, names: list[str] | None) -> None:
    folder = copy("llama")
    tiny.change(folder / "config.json", architectures=names)
    assert load_model(folder).kind == "causal"


def test_an_encoder_with_another_head(tmp_path: Path) -> None:
    tiny.save(transformers.BertForSequenceClassification(tiny.bert().config), tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.kind == "encoder"
    assert any("classifier.weight" in note for note in loaded.notes)


@pytest.mark.parametrize("family", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_causal_model_without_its_head_is_refused(tmp_path: Path, family: str) -> None:
    tiny.save(getattr(transformers, family)(tiny.llama().config), tmp_path)
    with pytest.raises(
        ModelError, match=rf"config\.json: architectures: {family} is loaded as LlamaForCausalLM, whose "
    ):
        load_model(tmp_path)


def test_a_dropped_head_is_said(tmp_path: Path) -> None:
    model = transformers.LlamaForSequenceClassification(tiny.llama(tie_word_embeddings=True).config)
    loaded = load_model(tiny.save(model, tmp_path))
    assert loaded.kind == "causal"
    assert any("score.weight" in note for note in loaded.notes)


def test_bert_is_a_causal_model_only_as_a_decoder(tmp_path: Path) -> None:
    config = tiny.bert().config
    config.is_decoder = True
    folder = tiny.save(transformers.BertLMHeadModel(config), tmp_path)
    assert load_model(folder).kind == "causal"
    tiny.change(folder / "config.json", is_decoder=False)
    with pytest.raises(
        UnsupportedModel, match=r"architectures: BertLMHeadModel is a causal LM, but is_decoder is false"
    ):
        load_model(folder)


@pytest.mark.parametrize("name", ["BertForCausalLM", "FSDPBertLMHeadModel"])
def test_a_causal_model_by_a_name_that_nobody_knows_is_no_encoder(copy: Copy, name: str) -> None:
    folder = copy("bert")
    tiny.change(folder / "config.json", architectures=[name])
    with pytest.raises(UnsupportedModel, match=f"architectures: {name} is a causal LM, but is_decoder is false"):
        load_model(folder)


def test_a_model_that_sees_later_tokens_is_no_causal_model(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(
        vocab_size=320, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.2
    )
    tiny.save(transformers.XLNetLMHeadModel(config), tmp_path)
    with pytest.raises(UnsupportedModel, match=r"XLNetLMHeadModel sees later tokens, .*; use a causal LM"):
        load_model(tmp_path)


def test_a_model_that_gives_no_gradients_is_an_error_in_words(tmp_path: Path) -> None:
    """An XLM keeps what its layers computed, which a second computation then finds."""
    config = transformers.XLMConfig(
        vocab_size=320, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, pad_index=2
    )
    loaded = load_model(tiny.save(transformers.XLMModel(config), tmp_path))
    with pytest.raises(ModelError, match=r"gives no gradients \(.*\); use another model"):
        make_mask(loaded, tiny.TEXTS, **tiny.SMALL)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json"])
def test_the_damaged_one_of_the_tokenizers_files_is_named(copy: Copy, name: str) -> None:
    folder = copy("llama")
    (folder / name).write_text("{")
    with pytest.raises(ModelError, match=f"{name}: the tokenizer cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize("family", ["T5ForConditionalGeneration", "T5EncoderModel"])
def test_parts_of_encoder_decoders_are_refused(tmp_path: Path, family: str) -> None:
    config = transformers.T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    config.is_encoder_decoder = family != "T5EncoderModel"
    tiny.save(getattr(transformers, family)(config), tmp_path)
    with pytest.raises(
        UnsupportedModel, match=rf"architectures: {family} is neither .*; give a causal LM .* or an encoder"
    ):
        load_model(tmp_path)


def test_a_type_that_is_neither(copy: Copy) -> None:
    folder = copy("llama")
    tiny.change(folder / "config.json", model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"])
    with pytest.raises(ModelError, match=r"config\.json: architectures: Qwen2_5_VLForConditionalGeneration is neither"):
        load_model(folder)


# --- what a tokenizer adds ---


def with_template(folder: Path, single: str) -> Path:
    tokenizer = tiny.tokenizer()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("single", ["<s> $A </s>", "<s> <s> $A", "<s> <s> $A </s> </s>"])
def test_prompts_end_in_text_and_start_once(copy: Copy, load: Callable[..., LoadedModel], single: str) -> None:
    plain, changed = load("llama"), load_model(with_template(copy("llama"), single))
    assert changed.tokenizer(["text"])["input_ids"][0] != plain.tokenizer(["text"])["input_ids"][0]
    assert changed.notes
    masks = [make_mask(loaded, tiny.TEXTS, density=0.1, **tiny.SMALL) for loaded in (plain, changed)]
    assert masks[0].theta_0.tobytes() == masks[1].theta_0.tobytes()
    assert masks[0].g_p.tobytes() == masks[1].g_p.tobytes()
    scores = []
    for loaded, mask in zip((plain, changed), masks, strict=True):
        engine = TransformersEngine(loaded, mask, tiny.TASK)
        scores.append(engine.scores(engine.prepare(tiny.ROWS[:8]))[0])
    assert np.array_equal(scores[0], scores[1])


def test_a_start_token_in_the_template_is_not_doubled(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    assert prompt_ids(loaded, ["<s>text", "<s><s>text"]) == prompt_ids(loaded, ["text"]) * 2


def test_only_the_last_of_two_start_tokens_is_looked_for(copy: Copy) -> None:
    loaded = load_model(with_template(copy("llama"), "</s> <s> $A"))
    assert loaded.start == (1, 0)
    assert prompt_ids(loaded, ["text"])[0][:2] == [1, 0]


def test_an_encoder_keeps_its_marks(copy: Copy) -> None:
    loaded = load_model(with_template(copy("bert"), "<s> $A </s>"))
    assert loaded.notes == ()
    assert loaded.tokenizer(["text"])["input_ids"][0][-1] == 1


@pytest.mark.real
def test_real_prompts_are_as_before(stories: Path) -> None:
    loaded = load_model(stories)
    assert prompt_ids(loaded, tiny.TEXTS) == loaded.tokenizer(tiny.TEXTS)["input_ids"]


# --- ids and positions ---


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_without_an_embedding(copy: Copy, special: bool) -> None:
    folder = copy("llama")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<more>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"ids beyond the 320 embeddings: '<more>' is 320; .* resize_token_embeddings"):
        load_model(folder)


def test_a_pad_token_without_an_embedding(copy: Copy) -> None:
    folder = copy("bert")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<nothing>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="ids beyond the 320 embeddings: '<nothing>' is 320"):
        load_model(folder)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_pad_id_beyond_the_embeddings(copy: Copy, name: str) -> None:
    folder = copy(name)
    tiny.change(folder / "config.json", pad_token_id=320)
    with pytest.raises(ModelError, match=r"config\.json: pad_token_id: 320 is no id of the 320"):
        load_model(folder)


def test_an_encoder_without_a_pad_token(copy: Copy) -> None:
    folder = copy("bert")
    tiny.change(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: pad_token: "):
        load_model(folder)


def test_positions_behind_the_padding_index(tmp_path: Path) -> None:
    """RoBERTa's first position is its padding index + 1."""
    config = transformers.RobertaConfig(**tiny.SIZES | {"max_position_embeddings": 66}, pad_token_id=1)
    folder = tiny.save(transformers.RobertaModel(config), tmp_path)
    tiny.change(folder / "tokenizer_config.json", model_max_length=1000)
    loaded = load_model(folder)
    assert loaded.max_tokens == 64
    loaded.model(input_ids=torch.full((1, 64), 5))


@pytest.mark.parametrize(
    ("file", "keys", "words"),
    [
        ("config.json", {"max_position_embeddings": 5}, "positions hold 5 tokens"),
        ("tokenizer_config.json", {"model_max_length": 0}, "model_max_length: 0 tokens hold no text"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is no integer from 1 to 21"),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads: 0 is no integer from 1"),
        ("config.json", {"hidden_size": "x"}, "hidden_size: 'x' is no integer"),
        ("config.json", {"rms_norm_eps": "x"}, "rms_norm_eps: "),
        ("config.json", {"hidden_act": "wave"}, "hidden_act: "),
        ("config.json", {"architectures": 5}, "architectures: 5 is no list of names"),
        ("config.json", {"model_type": None}, "model_type: is missing"),
        ("config.json", {"vocab_size": 10**9}, r"config\.json: vocab_size: the weights lack or misshape lm_head"),
        ("config.json", {"num_hidden_layers": 1}, r"config\.json: num_hidden_layers: leaves out model\.layers\.1\."),
        ("config.json", {"num_hidden_layers": 3}, r"config\.json: num_hidden_layers: the weights lack or misshape"),
        ("config.json", {"rope_parameters": {"rope_theta": "x"}}, r"config\.json: rope_parameters: cannot be used"),
        ("config.json", {"num_key_value_heads": 3}, r"config\.json: "),
        (
            "tokenizer_config.json",
            {"model_max_length": "x"},
            r"tokenizer_config\.json: model_max_length: 'x' cannot be",
        ),
        ("tokenizer_config.json", {"tokenizer_class": 5}, r"tokenizer_config\.json: tokenizer_class: 5 cannot be used"),
        ("tokenizer_config.json", {"pad_token": [1]}, r"tokenizer_config\.json: pad_token: \[1\] cannot be used"),
        ("tokenizer.json", {"model": 5}, r"tokenizer\.json: the tokenizer cannot be loaded"),
        ("tokenizer.json", {"post_processor": {"type": "?"}}, r"tokenizer\.json: the tokenizer cannot be loaded"),
    ],
)
def test_values_that_cannot_be(copy: Copy, file: str, keys: dict[str, Any], words: str) -> None:
    folder = copy("llama")
    tiny.change(folder / file, **keys)
    with pytest.raises(ModelError, match=words):
        load_model(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "\ufeff{}", "\x00", '"x"'])
def test_json_without_end_or_sense(copy: Copy, content: str) -> None:
    folder = copy("llama")
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: "):
        find_folder(folder)


def test_json_files_have_a_largest_size(copy: Copy) -> None:
    folder = copy("llama")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelError, match=r"config\.json: has 1,073,741,824 bytes; 16,777,216 are the most"):
        find_folder(folder)


# --- what a library would pick up ---


def test_an_adapter_beside_a_model(copy: Copy) -> None:
    folder = copy("llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    with pytest.raises(ModelError, match=r"adapter_config\.json: is an adapter beside a whole model.*; take its files"):
        find_folder(folder)


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    with pytest.raises(
        ModelError, match=r"is an adapter \(of 'somebody/base'\), not a model; give the model alone, and the adapter"
    ):
        find_folder(tmp_path)


def test_other_weights_in_the_folder(copy: Copy) -> None:
    folder = copy("llama")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    tiny.change(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(ModelError, match="transformers_weights: names weights of its own"):
        find_folder(folder)
    tiny.change(folder / "config.json", transformers_weights=None)
    (folder / "other.safetensors").rename(folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match="is a part of a distributed checkpoint"):
        find_folder(folder)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"bits": 4}, "4"),
    ],
)
def test_quantised_weights(copy: Copy, settings: dict[str, Any], method: str) -> None:
    folder = copy("llama")
    tiny.change(folder / "config.json", quantization_config=settings)
    with pytest.raises(
        UnsupportedModel, match=rf"quantization_config: its weights are quantised \({method}\); give the "
    ):
        find_folder(folder)


def test_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(
        ModelNotFound, match=r"is a GGUF file \(of llama\.cpp\), not a folder; give .* it was made from"
    ):
        find_folder(file)
    with pytest.raises(
        ModelNotFound, match=r"has no config\.json \(it holds GGUF files .*: model\.gguf\); give .* made"
    ):
        find_folder(tmp_path)


def test_a_model_in_a_folder_of_the_folder(folders: dict[str, Path]) -> None:
    inner = folders["llama"]
    with pytest.raises(ModelNotFound, match=rf"has no config\.json \(it holds a model in .*\); give {inner.parent}"):
        find_folder(inner.parent)


def test_quantised_weights_of_which_the_configuration_says_nothing(copy: Copy) -> None:
    folder = copy("llama")
    tiny.rename(folder, lambda name: name.replace("up_proj.weight", "up_proj.qweight"))
    with pytest.raises(UnsupportedModel, match=r"up_proj\.qweight: is quantised .*; give the original"):
        load_model(folder)
    weights = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    changed = {"model.layers.0.mlp.down_proj.weight": weights.to(torch.float8_e4m3fn)}
    tiny.rename(folder, lambda name: name.replace("qweight", "weight"), **changed)
    with pytest.raises(UnsupportedModel, match=r"down_proj\.weight: is quantised \(F8_E4M3\)"):
        load_model(folder)


def test_a_head_that_is_neither_tied_nor_there(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path)
    tiny.change(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"tie_word_embeddings: is False, and the weights hold no lm_head\.weight"):
        load_model(folder)


def test_a_user_without_a_home(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    folder = copy("llama")
    assert fingerprint(folder) == fingerprint(folder)
