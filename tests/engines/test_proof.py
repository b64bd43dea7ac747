"""What an export loads as is base + theta: parameters, outputs, scores and losses; and what is not, is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import BertForMaskedLM

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch import proof
from meerkat_mq.engines.torch.export import check_export, export_model
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.engines.torch.proof import check_loaded
from meerkat_mq.errors import ModelMismatch
from tests.engines import tiny

FAMILIES = ["llama", "llama-bf16", "gpt2", "bert"]


def moved(mask: Mask, size: float = 1) -> np.ndarray:
    return mask.theta_0 + np.linspace(-size, size, mask.size, dtype=np.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_exported_loads(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, name: str) -> None:
    mask, out = masks[name], tmp_path / "out"
    export_model(folders[name], mask, moved(mask), out)
    check_loaded(out, folders[name], mask, moved(mask), tiny.TASK)
    other = moved(mask)
    other[-1] += 1
    with pytest.raises(ModelMismatch, match=r"out: .*weight does not load as base and theta give it; export the model"):
        check_loaded(out, folders[name], mask, other, tiny.TASK)


def test_what_the_checkpoint_lacks_and_nobody_uses_is_no_difference(tmp_path: Path) -> None:
    """A BERT that was saved with another head has no pooler: it is drawn anew at each load."""
    base, out = tiny.save(BertForMaskedLM(tiny.bert().config), tmp_path / "base"), tmp_path / "out"
    mask = make_mask(load_model(base), tiny.TEXTS, density=0.05, sequences=4, length=32)
    export_model(base, mask, moved(mask), out)
    check_loaded(out, base, mask, moved(mask), tiny.TASK)


def test_a_configuration_without_what_a_cache_wants(tmp_path: Path) -> None:
    base, out = tiny.save(tiny.llama(), tmp_path / "base"), tmp_path / "out"
    config(base, layer_types=["full_attention", "sliding_attention"])
    mask = make_mask(load_model(base), tiny.TEXTS, "magnitude-activation", density=0.05, sequences=4, length=32)
    export_model(base, mask, moved(mask), out)
    check_loaded(out, base, mask, moved(mask), tiny.TASK)


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_a_merged_adapter(folders: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(folders[name], dtype="bfloat16" if name.endswith("bf16") else "float32")
    mask = make_mask(loaded, tiny.TEXTS, "lora", rank=2, sequences=4, length=32)
    theta, out = moved(mask, 0.1), tmp_path / "out"
    export_model(folders[name], mask, theta, out)
    check_loaded(out, folders[name], mask, theta, tiny.TASK)
    with pytest.raises(ModelMismatch, match=r"differ by up to .* from what base and theta give"):
        check_loaded(folders[name], folders[name], mask, theta, tiny.TASK)
    monkeypatch.setattr(proof, "MERGED_TOLERANCE", dict.fromkeys(proof.MERGED_TOLERANCE, 0))
    with pytest.raises(ModelMismatch, match="differ by up to"):
        check_loaded(out, folders[name], mask, theta, tiny.TASK)


def config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_scale(folder: Path) -> None:
    config(folder, rms_norm_eps=0.1)


def other_tokenizer(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("other"))
    tiny.tokenizer(start=False).save_pretrained(folder)


def other_heads(folder: Path) -> None:
    config(folder, rope_parameters={"rope_type": "default", "rope_theta": 3.0})


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (
            other_scale,
            r"logits of '.*' differ by up to .* from what base and theta give \(config\.json is not the base's\)",
        ),
        (other_heads, r"logits of '.*' differ by up to"),
        (other_tokenizer, r"its tokenizer gives other ids than the base's \(tokenizer.*\.json is not the base's\)"),
    ],
)
def test_what_the_bytes_do_not_show(
    folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, alter: Callable[[Path], None], words: str
) -> None:
    mask, out = masks["llama"], tmp_path / "out"
    export_model(folders["llama"], mask, moved(mask), out)
    alter(out)
    check_export(out, folders["llama"], mask, moved(mask))
    with pytest.raises(ModelMismatch, match=words):
        check_loaded(out, folders["llama"], mask, moved(mask), tiny.TASK)


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories", "minilm"])
def test_real_models(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    base = request.getfixturevalue(name)
    mask = make_mask(load_model(base), tiny.TEXTS, "magnitude", density=0.01, sequences=2, length=32)
    theta = moved(mask, 0.1)
    export_model(base, mask, theta, tmp_path / "out")
    check_loaded(tmp_path / "out", base, mask, theta, tiny.TASK)
