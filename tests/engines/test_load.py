"""Loading: kinds, dtypes, what is refused and in which words; tokenizer fingerprints; maskable matrices."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from meerkat_mq.engines.torch.load import LoadedModel, linear_layers, load_model, tokenizer_fingerprint
from meerkat_mq.engines.torch.tokenizer_trial import PROBES
from meerkat_mq.errors import ModelError, ModelNotFound, UnsupportedModel
from tests.engines import tiny

Load = Callable[..., LoadedModel]


@pytest.mark.parametrize(("name", "kind"), [("llama", "causal"), ("gpt2", "causal"), ("bert", "encoder")])
def test_kinds(load: Load, name: str, kind: str) -> None:
    loaded = load(name)
    assert loaded.kind == kind
    assert loaded.max_tokens == 64
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_model_that_does_not_fit_its_device_is_said_in_words(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(ModelError, match=r"llama: cannot be moved to cpu \(CUDA out of memory\. .*\); use another"):
        load_model(folders["llama"])


def test_same_folder_same_fingerprints(load: Load) -> None:
    first, second = load("llama"), load("llama", dtype="bfloat16")
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer_fingerprint == second.tokenizer_fingerprint
    assert first.fingerprint != load("gpt2").fingerprint


@pytest.mark.parametrize(
    ("name", "dtype", "exact"),
    [
        ("llama", "float32", True),
        ("llama", "bfloat16", False),
        ("llama-bf16", "float32", True),
        ("llama-bf16", "bfloat16", True),
    ],
)
def test_dtype_and_whether_it_is_exact(load: Load, name: str, dtype: str, exact: bool) -> None:
    loaded = load(name, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.exact is exact


def test_models_are_made_one_at_a_time(folders: dict[str, Path]) -> None:
    """As it makes one, transformers changes for all threads whether weights are tied, and torch's default dtype."""
    before = PreTrainedModel.tie_weights, torch.get_default_dtype()
    try:
        with ThreadPoolExecutor(4) as threads:
            loads = [threads.submit(load_model, folders["llama"], dtype=dtype) for dtype in ("float32", "bfloat16") * 8]
            assert {load.result().fingerprint for load in loads} == {load_model(folders["llama"]).fingerprint}
        assert (PreTrainedModel.tie_weights, torch.get_default_dtype()) == before
    finally:
        PreTrainedModel.tie_weights = before[0]
        torch.set_default_dtype(before[1])


def test_unknown_dtype(load: Load) -> None:
    with pytest.raises(ModelError, match="dtype: 'float8' is unknown; use one of float32, bfloat16, float16"):
        load("llama", dtype="float8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_no_cuda(load: Load) -> None:
    with pytest.raises(ModelError, match="torch finds no CUDA device; use cpu"):
        load("llama", device="cuda")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder; give the folder"):
        load_model(tmp_path / "absent")


def test_hub_id_that_cannot_be_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"^nobody/nothing: is no folder here, and the hub does not give it"):
        load_model("nobody/nothing")


def test_hub_id_from_the_cache(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--somebody--llama"
    shutil.copytree(folders["llama"], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_model("somebody/llama").fingerprint == load_model(folders["llama"]).fingerprint


def test_folder_without_config(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load_model(folder)


@pytest.mark.parametrize("config", ["{", '{"model_type": "no-such-type"}', "[]"])
def test_damaged_config(copy: Callable[[str], Path], config: str) -> None:
    folder = copy("llama")
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json: .*cannot be used"):
        load_model(folder)


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    tiny.save(T5ForConditionalGeneration(config), tmp_path)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is neither a causal LM nor an encoder"):
        load_model(tmp_path)


def test_config_of_another_size(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
    with pytest.raises(ModelError, match=r"the weights lack or misshape model\.layers\.0\.mlp\.down_proj\.weight"):
        load_model(folder)


def test_weights_that_lack_a_layer(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"the weights lack or misshape model\.layers\.2\."):
        load_model(folder)


def test_encoder_without_pooler(tmp_path: Path) -> None:
    model = tiny.bert()
    model.pooler = None
    tiny.save(model, tmp_path)
    assert load_model(tmp_path).kind == "encoder"


@pytest.mark.parametrize("content", [None, "{"])
def test_missing_or_damaged_tokenizer(copy: Callable[[str], Path], content: str | None) -> None:
    folder = copy("llama")
    (folder / "tokenizer.json").unlink() if content is None else (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_model(folder)


def test_tokenizer_of_a_larger_model(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    larger = tiny.tokenizer(vocabulary=330)
    larger.add_tokens([f"{word} " for word in PROBES[-1].split()])
    larger.save_pretrained(folder)
    with pytest.raises(ModelError, match="the tokenizer makes ids beyond the 320 embeddings"):
        load_model(folder)


def test_64_different_probes() -> None:
    assert len(set(PROBES)) == len(PROBES) == 64


def test_tokenizer_fingerprint_tells_tokenizers_apart(load: Load) -> None:
    fingerprints = {
        tokenizer_fingerprint(tiny.tokenizer()),
        tokenizer_fingerprint(tiny.tokenizer(start=False)),
        tokenizer_fingerprint(tiny.tokenizer(vocabulary=300)),
        tokenizer_fingerprint(tiny.tokenizer(), tiny.TASK),
    }
    assert len(fingerprints) == 4
    assert load("llama").tokenizer_fingerprint in fingerprints


def test_label_words_enter_the_fingerprint() -> None:
    tokenizer = tiny.tokenizer()
    other = tiny.TASK.model_copy(update={"label_words": (" broken", " idle")})
    assert tokenizer_fingerprint(tokenizer, tiny.TASK) != tokenizer_fingerprint(tokenizer, other)


def test_padding_and_truncation_in_tokenizer_files_do_not_enter(copy: Callable[[str], Path], load: Load) -> None:
    folder = copy("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    assert load_model(folder).tokenizer_fingerprint == load("llama").tokenizer_fingerprint


def test_matrices_of_llama(load: Load) -> None:
    projections = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    projections += [f"self_attn.{name}_proj" for name in "koqv"]
    expected = [f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in projections]
    assert list(linear_layers(load("llama").model)) == expected


def test_matrices_of_gpt2_are_conv1d(load: Load) -> None:
    model = load("gpt2").model
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(linear_layers(model)) == [f"transformer.h.{i}.{name}.weight" for i in range(2) for name in names]
    assert set(linear_layers(model)) <= dict(model.named_parameters()).keys()


def test_matrices_of_bert_leave_the_pooler_out(load: Load) -> None:
    names = list(linear_layers(load("bert").model))
    assert len(names) == 12
    assert all(name.startswith("encoder.layer.") for name in names)
    assert not any("LayerNorm" in name or name.endswith("bias") for name in names)


def test_fused_experts_are_refused() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"experts\.gate_up_proj: fused 3-D experts are not supported"):
        linear_layers(MixtralForCausalLM(config))


def test_quantised_weights_are_refused(load: Load) -> None:
    model = load("llama").model
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.up_proj\.weight: is quantised"):
        linear_layers(model)


def test_model_without_blocks_is_refused() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = torch.nn.Linear(2, 2)

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(UnsupportedModel, match="Flat: has no linear layers in repeated blocks"):
        linear_layers(Flat())


@pytest.mark.real
def test_real_stories(stories: Path) -> None:
    loaded = load_model(stories)
    assert loaded.kind == "causal"
    assert loaded.max_tokens == 512
    assert len(linear_layers(loaded.model)) == 35


@pytest.mark.real
def test_real_minilm(minilm: Path) -> None:
    loaded = load_model(minilm)
    weights = dict(loaded.model.named_parameters())
    assert sum(weights[name].numel() // 1000 for name in linear_layers(loaded.model)) == 10_596
