"""Export: what from_pretrained loads is base + theta, bit for bit; the folder appears whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Model

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch import export
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.export import export_model
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import ModelError, ModelMismatch, ModelNotFound
from tests.engines import tiny

FAMILIES = {
    "llama": AutoModelForCausalLM,
    "llama-bf16": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModel,
}


def moved(mask: Mask) -> np.ndarray:
    return mask.theta_0 + np.linspace(-1, 1, mask.size, dtype=np.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_export_is_base_plus_theta(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, name: str) -> None:
    mask, out = masks[name], tmp_path / "deep" / "out"
    export_model(folders[name], mask, moved(mask), out)
    exported = FAMILIES[name].from_pretrained(out)
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    expected = load_model(folders[name], dtype=str(dtype).removeprefix("torch."))
    TransformersEngine(expected, mask, tiny.TASK).write(moved(mask))
    parameters = dict(expected.model.named_parameters())
    assert {parameter.dtype for parameter in exported.parameters()} == {dtype}
    assert all(torch.equal(parameter, parameters[key]) for key, parameter in exported.named_parameters())
    text = tiny.TEXTS[0]
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == expected.tokenizer(text)["input_ids"]
    assert load_model(out).fingerprint != load_model(folders[name]).fingerprint


def test_export_of_theta_0_is_the_base(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path) -> None:
    export_model(folders["llama"], masks["llama"], masks["llama"].theta_0, tmp_path / "out")
    assert load_model(tmp_path / "out").fingerprint == load_model(folders["llama"]).fingerprint


def mask_of(folder: Path) -> Mask:
    return make_mask(load_model(folder), tiny.TEXTS, "magnitude", density=0.1, sequences=2, length=32)


def test_shards(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "base", max_shard_size="40KB")
    mask = mask_of(folder)
    export_model(folder, mask, moved(mask), tmp_path / "out")
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for matrix, part in mask.slices():
        assert np.array_equal(weights[matrix.name].detach().numpy().flatten()[matrix.indices], moved(mask)[part])


def test_checkpoint_without_the_prefix(tmp_path: Path) -> None:
    """As GPT-2 on the hub: stored names lack the prefix that a model with a head gives them."""
    folder = tiny.save(tiny.gpt2(), tmp_path / "base")
    config = (folder / "config.json").read_bytes()
    GPT2Model.from_pretrained(folder).save_pretrained(folder)
    (folder / "config.json").write_bytes(config)
    mask = mask_of(folder)
    assert mask.matrices[0].name.startswith("transformer.h.0.")
    export_model(folder, mask, moved(mask), tmp_path / "out")
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    first, part = next(mask.slices())
    assert np.array_equal(weights[first.name].detach().numpy().flatten()[first.indices], moved(mask)[part])


def test_stale_weights_and_hidden_files_stay_behind(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "base")
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "onnx/model.onnx", ".gitattributes", "LICENSE", "onnx/notes.txt"):
        (folder / name).write_text("x")
    mask = mask_of(folder)
    export_model(folder, mask, moved(mask), tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert {"config.json", "tokenizer.json", "model.safetensors", "LICENSE", "onnx/notes.txt"} <= names
    assert not names & {"pytorch_model.bin", "onnx/model.onnx", ".gitattributes"}


def test_a_read_only_base_can_be_exported_and_stays_unchanged(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.chmod(0o444)
    before, mask = weights.read_bytes(), mask_of(folder)
    export_model(folder, mask, moved(mask), tmp_path / "out")
    assert weights.read_bytes() == before


def test_an_empty_folder_is_taken(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_model(folders["bert"], masks["bert"], masks["bert"].theta_0, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_stays(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    kept = out / "kept" if kind == "folder" else out
    kept.write_text("mine")
    with pytest.raises(ModelError, match="out: exists and is not an empty folder; name a new folder"):
        export_model(folders["bert"], masks["bert"], masks["bert"].theta_0, out)
    assert kept.read_text() == "mine"


def test_a_failure_leaves_nothing(
    folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_patch", fail)
    with pytest.raises(ModelError, match=r"out: cannot be written \(No space left on device\)"):
        export_model(folders["bert"], masks["bert"], masks["bert"].theta_0, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_base(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="is not the checkpoint that the mask was made on"):
        export_model(folders["llama-bf16"], masks["llama"], masks["llama"].theta_0, tmp_path / "out")
    with pytest.raises(ModelNotFound):
        export_model(tmp_path / "absent", masks["llama"], masks["llama"].theta_0, tmp_path / "out")


def test_theta_of_another_mask(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"theta: has shape \(3,\), the mask \d+ weights"):
        export_model(folders["llama"], masks["llama"], np.zeros(3, np.float32), tmp_path / "out")


def test_theta_0_that_is_not_the_base(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path) -> None:
    first = masks["llama"].matrices[0]
    other = replace(masks["llama"], matrices=(replace(first, theta_0=first.theta_0 + 1),))
    with pytest.raises(ModelMismatch, match=r"down_proj\.weight differs from the mask's theta_0"):
        export_model(folders["llama"], other, other.theta_0, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_real_export(stories: Path, tmp_path: Path) -> None:
    mask = make_mask(load_model(stories), tiny.TEXTS, "magnitude", density=0.01, sequences=2, length=32)
    export_model(stories, mask, moved(mask), tmp_path / "out")
    base, exported = (
        dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (stories, tmp_path / "out")
    )
    changed = sum(int((base[name] != exported[name]).sum()) for name in base)
    assert 0.99 * mask.size < changed <= mask.size
