"""Exports of what training changed: what the card's own lines load is the exported model; PEFT loads the adapters."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.differences import check_difference, export_delta, export_peft
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.export import export_model
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import ModelError, ModelMismatch, ModelNotFound, UnsupportedModel
from meerkat_mq.observe.model_card import Exported, model_card
from tests.engines import tiny

FAMILIES = {
    "llama": AutoModelForCausalLM,
    "llama-bf16": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModel,
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks",  # PEFT's sums are of sparse tensors
    "ignore:`is_gradient_checkpointing` is deprecated",  # which PEFT looks at
)


def moved(mask: Mask) -> np.ndarray:
    return mask.theta_0 + np.linspace(-1, 1, mask.size, dtype=np.float32)


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): value.detach() for name, value in model.named_parameters()}


def exported(family: Any, source: Path, mask: Mask, out: Path) -> dict[str, torch.Tensor]:
    export_model(source, mask, moved(mask), out)
    return parameters(family.from_pretrained(out))


def lines_of(card: str, base: Path, folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found[1].replace("BASE_MODEL", str(base)).replace("FOLDER_OF_THIS_EXPORT", str(folder))


def card_of(name: str, kind: Any) -> Callable[[str], str]:
    facts = Exported("base", "", "00", "00", "00", "00", name == "bert", "some", 1, None)
    return lambda said: model_card(kind, facts, said)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cards_lines_load_a_delta(
    folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, name: str
) -> None:
    mask = masks[name]
    export_delta(folders[name], mask, moved(mask), tmp_path / "out", card_of(name, "delta"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "delta.safetensors"}
    known: dict[str, Any] = {}
    exec(lines_of((tmp_path / "out" / "README.md").read_text(), folders[name], tmp_path / "out"), known)
    expected = exported(FAMILIES[name], folders[name], mask, tmp_path / "whole")
    assert all(torch.equal(value, expected[key]) for key, value in parameters(known["model"]).items())


@pytest.mark.parametrize("name", ["llama", "llama-bf16", "bert"])
def test_peft_adds_single_values(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, name: str) -> None:
    mask = masks[name]
    said = export_peft(folders[name], mask, moved(mask), tmp_path / "out", card_of(name, "peft"))
    known: dict[str, Any] = {}
    exec(lines_of((tmp_path / "out" / "README.md").read_text(), folders[name], tmp_path / "out"), known)
    texts = torch.arange(12)[None]
    with torch.inference_mode():
        adapted = known["model"].eval()(input_ids=texts)[0]
        merged = known["model"].merge_and_unload()
        assert torch.allclose(merged.eval()(input_ids=texts)[0], adapted, atol=0.02 if name == "llama-bf16" else 1e-5)
    expected, found = exported(FAMILIES[name], folders[name], mask, tmp_path / "whole"), parameters(merged)
    assert found.keys() == expected.keys()
    apart = sum(int((found[key] != expected[key]).sum()) for key in expected)
    assert f"all {mask.size:,} trained weights bit for bit" in said or f"{mask.size - apart:,} of {mask.size:,}" in said
    assert apart == 0 or "all" not in said
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-7


def test_peft_loads_a_trained_adapter_bit_for_bit(
    folders: dict[str, Path], load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    for name in ("llama", "gpt2", "bert"):
        mask = make_mask(load(name), tiny.TEXTS, "lora", rank=3, sequences=4, length=32)
        theta = mask.theta_0 + np.linspace(-0.1, 0.1, mask.size, dtype=np.float32)
        said = export_peft(folders[name], mask, theta, tmp_path / name, card_of(name, "peft"))
        assert said == "It is a LoRA adapter, and holds the trained A and B bit for bit."
        base = FAMILIES[name].from_pretrained(folders[name])
        model = PeftModel.from_pretrained(base, tmp_path / name)
        assert not [name for name in model.peft_config["default"].target_modules if not name]
        engine = TransformersEngine(load(name), mask, tiny.TASK)
        engine.write(theta)
        expected, found = dict(engine.loaded.model.named_parameters()), parameters(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


Write = Callable[[Path], object]


def tensors_changed(change: Callable[[dict[str, Any]], object]) -> Write:
    def write(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return write


def setting(key: str, value: object) -> Write:
    def write(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return write


def first(tensors: dict[str, Any], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


CHANGES: list[tuple[str, Write, str]] = [
    ("delta", tensors_changed(lambda t: t[first(t, ".values")].__setitem__(0, 9.0)), ".values is not what base and"),
    ("delta", tensors_changed(lambda t: t[first(t, ".indices")].__setitem__(0, 9)), ".indices is not what base and"),
    ("delta", tensors_changed(lambda t: t.pop(first(t, ".values"))), ".values is missing"),
    ("delta", tensors_changed(lambda t: t.update(more=torch.zeros(1))), "more is no tensor of such an export"),
    ("delta", tensors_changed(lambda t: t.update({n: v.double() for n, v in t.items()})), "is not stored as I32 ("),
    ("delta", lambda folder: (folder / "model.safetensors").write_bytes(b""), "holds model.safetensors, which no"),
    ("delta", lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds adapter_config.json, which no"),
    ("peft", tensors_changed(lambda t: t[first(t, "_weight")].__setitem__(0, 9.0)), "shira_weight is not what base"),
    ("peft", setting("r", 99), "adapter_config.json: r is not what the run gives"),
    ("peft", setting("modules_to_save", ["lm_head"]), "modules_to_save is not what the run gives"),
    ("peft", lambda folder: (folder / "adapter_model.bin").write_bytes(b""), "holds adapter_model.bin, which no"),
]


@pytest.mark.parametrize(("kind", "change", "words"), CHANGES, ids=[words for _, _, words in CHANGES])
def test_what_training_changed_is_compared_bit_for_bit(
    folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, kind: str, change: Write, words: str
) -> None:
    base, mask, out = folders["llama"], masks["llama"], tmp_path / "out"
    write = export_delta if kind == "delta" else export_peft
    write(base, mask, moved(mask), out, card_of("llama", kind))
    if kind == "peft":
        setting("base_model_name_or_path", "elsewhere")(out)
    assert check_difference(out, base, mask, moved(mask))
    with pytest.raises(ModelMismatch, match=r"out: .* is not what base and theta give; export the model again"):
        check_difference(out, base, mask, mask.theta_0)
    with pytest.raises(ModelMismatch, match="is not the checkpoint that the mask was made on"):
        check_difference(out, folders["gpt2"], mask, moved(mask))
    change(out)
    with pytest.raises(ModelMismatch, match="out: .*" + re.escape(words)):
        check_difference(out, base, mask, moved(mask))


def test_a_trained_adapter_is_compared_and_a_whole_model_is_another_s_business(
    folders: dict[str, Path], load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    mask = make_mask(load("llama"), tiny.TEXTS, "lora", rank=3, sequences=4, length=32)
    export_peft(folders["llama"], mask, moved(mask), tmp_path / "out", card_of("llama", "peft"))
    assert check_difference(tmp_path / "out", folders["llama"], mask, moved(mask))
    with pytest.raises(ModelMismatch, match=r"lora_A.weight is not what base and theta give"):
        check_difference(tmp_path / "out", folders["llama"], mask, mask.theta_0)
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"adapter_model.safetensors: is missing"):
        check_difference(tmp_path / "out", folders["llama"], mask, moved(mask))
    for folder in (folders["llama"], tmp_path / "nowhere"):
        assert not check_difference(folder, folders["llama"], mask, moved(mask))


def test_what_no_form_holds_is_refused(
    folders: dict[str, Path], masks: dict[str, Mask], load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    def refused(name: str, mask: Mask, *words: str, write: Any = export_peft, error: Any = UnsupportedModel) -> None:
        with pytest.raises(error) as raised:
            write(folders[name], mask, moved(mask), tmp_path / "out", card_of(name, "peft"))
        assert all(word in str(raised.value) for word in words)
        assert not (tmp_path / "out").exists()

    def made(name: str, method: Any, **more: Any) -> Mask:
        return make_mask(load(name), tiny.TEXTS, method, sequences=2, length=32, **more)

    refused("gpt2", masks["gpt2"], "is a Conv1D", "for linear layers only", "--as model")
    refused("llama", made("llama", "dense"), "is a Embedding", "--as model")
    refused("llama", made("llama", "magnitude", density=0.99), "has no room for", "--as model")
    lora = made("llama", "lora")
    refused("llama", lora, "no sparse difference", "--as peft", write=export_delta, error=ModelError)
    refused("bert", masks["llama"], "not the checkpoint", error=ModelMismatch)


@pytest.mark.real
def test_a_real_model_as_peft(smollm2: Path, tmp_path: Path) -> None:
    mask = make_mask(load_model(smollm2), tiny.TEXTS, "magnitude", density=1e-3, sequences=2, length=32)
    theta = mask.theta_0 + np.float32(1e-3)
    said = export_peft(smollm2, mask, theta, tmp_path / "out", card_of("smollm2", "peft"))
    assert "bit for bit" in said
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    export_model(smollm2, mask, theta, tmp_path / "whole")
    expected, found = parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), parameters(merged)
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-7
