"""A check of an export finds any bit that is not base or theta."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch import export
from meerkat_mq.engines.torch.checkpoint import StoredTensor, stored_tensors
from meerkat_mq.engines.torch.export import check_export, export_model
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import ModelMismatch
from tests.engines import tiny

FAMILIES = ["llama", "llama-bf16", "gpt2", "bert"]


def moved(mask: Mask) -> np.ndarray:
    return mask.theta_0 + np.linspace(-1, 1, mask.size, dtype=np.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_exported_passes(
    folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(export, "PIECE", 100)  # several pieces a tensor
    mask = masks[name]
    export_model(folders[name], mask, moved(mask), tmp_path / "out")
    check_export(tmp_path / "out", folders[name], mask, moved(mask))
    other = moved(mask)
    other[-1] += 1
    with pytest.raises(ModelMismatch, match=rf"weight {mask.matrices[-1].indices[-1]} of .* is not theta's"):
        check_export(tmp_path / "out", folders[name], mask, other)


def place(tensors: dict[str, StoredTensor], at: int) -> tuple[str, StoredTensor, int]:
    """The tensor that holds byte `at` of all tensors, and where in its file."""
    for name, tensor in tensors.items():
        if at < tensor.stop - tensor.start:
            return name, tensor, tensor.start + at
        at -= tensor.stop - tensor.start
    raise AssertionError


@pytest.fixture(scope="module")
def exported(folders: dict[str, Path], masks: dict[str, Mask], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flipped") / "out"
    export_model(folders["llama-bf16"], masks["llama-bf16"], moved(masks["llama-bf16"]), out)
    return out


@settings(max_examples=30)
@given(data=st.data())
def test_any_flipped_bit_is_found(
    folders: dict[str, Path], masks: dict[str, Mask], exported: Path, data: st.DataObject
) -> None:
    mask, tensors = masks["llama-bf16"], stored_tensors(exported)
    total = sum(tensor.stop - tensor.start for tensor in tensors.values())
    name, tensor, at = place(tensors, data.draw(st.integers(0, total - 1)))
    good = tensor.file.read_bytes()
    blob = bytearray(good)
    blob[at] ^= 1 << data.draw(st.integers(0, 7))
    tensor.file.write_bytes(blob)
    with pytest.raises(ModelMismatch, match=rf"of {name} is not (theta's|the base's)"):
        check_export(exported, folders["llama-bf16"], mask, moved(mask))
    tensor.file.write_bytes(good)


def test_another_layout(folders: dict[str, Path], masks: dict[str, Mask], tmp_path: Path) -> None:
    mask = masks["llama"]
    for other in (tiny.save(tiny.llama(vocab_size=321), tmp_path / "larger"), folders["llama-bf16"], folders["gpt2"]):
        with pytest.raises(ModelMismatch, match="is not as in the base, by dtype and shape"):
            check_export(other, folders["llama"], mask, mask.theta_0)


def test_shards_may_be_cut_differently(tmp_path: Path) -> None:
    base = tiny.save(tiny.llama(), tmp_path / "base", max_shard_size="40KB")
    mask = make_mask(load_model(base), tiny.TEXTS, "magnitude", density=0.1, sequences=2, length=32)
    whole = tiny.save(tiny.llama(), tmp_path / "whole")
    check_export(whole, base, mask, mask.theta_0)
