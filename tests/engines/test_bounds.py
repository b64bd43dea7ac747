"""What a folder's JSON asks for is bounded before it is given: memory, time, the terminal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from meerkat_mq.engines.torch import tokenizer_trial
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.scoring import embed, tokenise
from meerkat_mq.errors import ModelError, UnsupportedModel
from tests.engines import tiny

Copy = Callable[[str], Path]
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_labels", 10**6), ("num_labels", -1), ("num_experts", 2**40), ("num_local_experts", 10**6)],
)
def test_counts_of_objects(copy: Copy, key: str, value: int) -> None:
    folder = copy("bert")
    tiny.change(folder / "config.json", **{key: value})
    with pytest.raises(ModelError, match=rf"config\.json: {key}: {value} is no integer from \d to [\d,]+; restore"):
        load_model(folder)


def test_no_labels_are_fine(copy: Copy) -> None:
    folder = copy("bert")
    tiny.change(folder / "config.json", num_labels=0)
    assert load_model(folder).kind == "encoder"


@pytest.mark.parametrize("groups", [[[["global"], 10**9]], [[["global"], 2.0]], [["global", "local"]], {"a": 1}])
def test_attention_types_that_are_written_out(tmp_path: Path, groups: Any) -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=32, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tiny.save(transformers.GPTNeoForCausalLM(config), tmp_path)
    assert load_model(folder).kind == "causal"
    tiny.change(folder / "config.json", attention_types=groups)
    with pytest.raises(ModelError, match=r"config\.json: attention_types: .*restore the model's own config\.json"):
        load_model(folder)


def test_outputs_without_names_are_asked_for_with_names(copy: Copy) -> None:
    folder = copy("llama")
    tiny.change(folder / "config.json", return_dict=False)
    assert load_model(folder).model.config.return_dict is True


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_tokenizer_that_repeats_the_text(copy: Copy, name: str) -> None:
    folder = copy(name)
    again = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "pair": []}
    tiny.change(folder / "tokenizer.json", post_processor=again | {"special_tokens": {}})
    with pytest.raises(ModelError, match="the tokenizer repeats 'The quick brown fox'; put this model's own"):
        load_model(folder)


def test_more_parts_than_the_checkpoint_has_tensors(tmp_path: Path) -> None:
    config = transformers.MobileBertConfig(
        vocab_size=320, hidden_size=32, embedding_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, intra_bottleneck_size=8, max_position_embeddings=64, num_feedforward_networks=2,
    )  # fmt: skip
    folder = tiny.save(transformers.MobileBertModel(config), tmp_path)
    assert load_model(folder).kind == "encoder"
    tiny.change(folder / "config.json", num_feedforward_networks=10**9)
    words = r"config\.json: num_feedforward_networks: cannot be used \(it describes more than [\d,]+ parts"
    with pytest.raises(ModelError, match=words):
        load_model(folder)


def test_buffers_that_no_tensor_of_the_checkpoint_bounds(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(
        vocab_size=320, n_embd=64, n_layer=1, n_head=2, rotary_dim=32, n_positions=64,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tiny.save(transformers.GPTJForCausalLM(config), tmp_path)
    assert load_model(folder).kind == "causal"
    tiny.change(folder / "config.json", n_positions=1 << 24)
    with pytest.raises(
        ModelError, match=r"would take [\d,]{10,} bytes of memory; restore the model's own config\.json"
    ):
        load_model(folder)


@pytest.mark.parametrize("key", ["sub_configs", "use_return_dict"])
def test_what_the_library_logs_is_in_the_refusal_alone(copy: Copy, key: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copy("llama")
    load_model(folder)
    tiny.change(folder / "config.json", **{key: False})
    with pytest.raises(ModelError, match=rf"config\.json: {key}: cannot be used"):
        load_model(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1000},
    ],
)
def test_panics_stay_off_the_terminal(
    copy: Copy, normalizer: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy("llama")
    tiny.change(folder / "tokenizer.json", normalizer=normalizer)
    with pytest.raises(
        ModelError, match=r"tokenizer\.json: the tokenizer cannot be loaded \(.+\); put this model's own"
    ):
        load_model(folder)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_makes_texts_endless(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "_SECONDS", 1)
    folder = copy("llama")
    tiny.change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [DOUBLED] * 40})
    with pytest.raises(
        ModelError, match=r"tokenizer\.json: .*it takes more than 1 s or 1,024 MiB, or ends the process"
    ):
        load_model(folder)


def test_a_tokenizer_is_tried_once(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("llama")
    before = load_model(folder).tokenizer_fingerprint
    monkeypatch.setattr("subprocess.run", pytest.fail)
    assert load_model(folder).tokenizer_fingerprint == before


def test_where_no_process_can_be_started_nothing_is_tried(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent")
    load_model(copy("llama"))


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("tokenizer_config.json", {"bos_token": {"content": "<s>", "colour": "red"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "<s>", "colour": "red"}}}),
        ("special_tokens_map.json", {"bos_token": {"colour": "red"}}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"colour": "red"}]}),
        ("special_tokens_map.json", {"extra_special_tokens": [{"content": "<a>", "colour": "red"}]}),
        ("special_tokens_map.json", {"sp_model_kwargs": {"colour": "red"}}),
        ("special_tokens_map.json", {"added_tokens_decoder": {"colour": {"content": "<far>"}}}),
        ("tokenizer_config.json", {"anything": [[{"__type": "AddedToken", "content": "<s>", "colour": "red"}]]}),
    ],
)
def test_a_token_with_another_key(
    copy: Copy, capfd: pytest.CaptureFixture[str], file: str, keys: dict[str, Any]
) -> None:
    folder = copy("llama")
    (folder / file).touch()
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text() or "{}") | keys))
    with pytest.raises(ModelError, match=rf"{file}: {next(iter(keys))}.*: a token has no 'colour'; remove the key"):
        load_model(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"__type": "AddedToken", "content": "<s>"}}}),
        ("special_tokens_map.json", {"bos_token": {"__type": "AddedToken", "content": "<s>"}}),
    ],
)
def test_a_mark_where_the_library_knows_none(copy: Copy, file: str, keys: dict[str, Any]) -> None:
    folder = copy("llama")
    (folder / file).touch()
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text() or "{}") | keys))
    with pytest.raises(ModelError, match=rf"{file}: {next(iter(keys))}.*: a token has no '__type'; remove the key"):
        load_model(folder)


def test_a_token_that_is_marked_as_one(copy: Copy, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copy("llama")
    marked = {"__type": "AddedToken", "content": "<s>", "lstrip": False}
    tiny.change(folder / "tokenizer_config.json", bos_token=marked, additional_special_tokens=[marked])
    load_model(folder)
    assert capfd.readouterr() == ("", "")


def test_an_added_token_with_another_key(copy: Copy, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copy("llama")
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    tiny.change(folder / "tokenizer.json", added_tokens=[tokens[0] | {"colour": "red"}, *tokens[1:]])
    with pytest.raises(ModelError, match=r"tokenizer\.json: .*a token has no 'colour'"):
        load_model(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [1001, -1, "x", None, [1], 10**9])
@pytest.mark.parametrize("key", ["extra_ids", "offset"])
def test_tokens_that_a_class_adds_one_by_one(copy: Copy, key: str, value: object) -> None:
    folder = copy("llama")
    tiny.change(folder / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer", **{key: value})
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: {key}: .* is no number from 0 to 1000; put this"):
        load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["CanineTokenizer", "CanineTokenizerFast"])
def test_a_class_with_a_token_for_each_character_of_unicode(copy: Copy, file: str, name: str) -> None:
    folder = copy("llama")
    tiny.change(folder / file, tokenizer_class=name)
    with pytest.raises(ModelError, match=rf"/{file}: tokenizer_class: has a token for each character of Unicode"):
        load_model(folder)


@pytest.mark.parametrize("family", ["ibert", "perceiver"])
def test_embeddings_that_are_no_table(copy: Copy, family: str) -> None:
    folder = copy("bert")
    tiny.change(folder / "config.json", model_type=family)
    with pytest.raises(
        UnsupportedModel, match=r"config\.json: model_type: \w+ has no plain table of embeddings; use an"
    ):
        load_model(folder)


def test_numbers_that_a_short_pass_hides(copy: Copy) -> None:
    """Attention over fewer than 16 tokens, on a CPU, leaves NaN out."""
    folder = copy("llama")
    tiny.change(folder / "config.json", rope_parameters={"rope_theta": -10000.0, "rope_type": "default"})
    with pytest.raises(ModelError, match="llama: gives numbers that are not finite"):
        load_model(folder)


@pytest.mark.parametrize("names", [["x"], [], "x", ["attention_mask", "input_ids"], [7]])
def test_inputs_that_are_no_ids(copy: Copy, names: object) -> None:
    folder = copy("bert")
    tiny.change(folder / "tokenizer_config.json", model_input_names=names)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: model_input_names: "):
        load_model(folder)


def test_an_encoder_sees_no_padding_whatever_its_tokenizer_gives(copy: Copy) -> None:
    folder = copy("bert")
    texts = ["The pump", "The pump in the cellar was broken when the farmer came back"]
    vectors = []
    for names in (["input_ids", "attention_mask"], ["input_ids"]):
        tiny.change(folder / "tokenizer_config.json", model_input_names=names)
        loaded = load_model(folder)
        vectors.append(embed(loaded.model, tokenise(loaded, texts, 32)))
    assert torch.equal(*vectors)


def test_a_long_token_is_cut(copy: Copy) -> None:
    folder = copy("llama")
    tiny.change(folder / "tokenizer_config.json", bos_token="x" * 5000)
    with pytest.raises(ModelError, match=r"beyond the 320 embeddings: 'x+") as caught:
        load_model(folder)
    assert len(str(caught.value)) - len(str(folder)) < 400


def test_names_of_thousands_of_characters(copy: Copy, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="File name too long"):
        load_model(tmp_path / ("x" * 5000))
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "x" * 5000 + ".safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"weight_map: 'x+ is no plain file name") as caught:
        load_model(folder)
    assert len(str(caught.value)) - len(str(folder)) < 400
