"""Where an export is written: whole or not at all, and nothing else is touched."""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.export import export_model
from meerkat_mq.errors import ModelError, ModelNotFound
from tests.engines import tiny


def test_a_full_disk(masks: dict[str, Mask], model: Path) -> None:
    """As in the services' tests: no file may be longer than the limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ModelError, match=r"out: cannot be written \(File too large\) at .*; free some space"):
            export_model(model, masks["llama"], masks["llama"].theta_0, model.parent / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_file_that_cannot_be_read(
    masks: dict[str, Mask], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Root can read everything: so the kernel's answer is ours here."""
    (model / "notes.txt").write_text("x")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "notes.txt" and access(path, mode))
    with pytest.raises(ModelNotFound, match=r"notes\.txt: cannot be read \(Permission denied\); let this user read it"):
        export_model(model, masks["llama"], masks["llama"].theta_0, tmp_path / "out")


def test_a_folder_that_comes_in_the_way(
    masks: dict[str, Mask], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from meerkat_mq.engines.torch import export

    patch, out = export._patch, tmp_path / "out"

    def meanwhile(*given: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("mine")
        patch(*given)

    monkeypatch.setattr(export, "_patch", meanwhile)
    with pytest.raises(ModelError, match="out: exists and is not an empty folder; name a new folder"):
        export_model(model, masks["llama"], masks["llama"].theta_0, out)
    assert tiny.snapshot(out).keys() == {str(out / "mine")}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model"}


def test_a_folder_that_cannot_be_replaced(
    masks: dict[str, Mask], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where a disk is mounted."""

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(ModelError, match=r"out: cannot be written \(Device or resource busy\); choose another folder"):
        export_model(model, masks["llama"], masks["llama"].theta_0, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model"}


def test_out_is_a_link(masks: dict[str, Mask], model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    export_model(model, masks["llama"], masks["llama"].theta_0, tmp_path / "out")
    assert (tmp_path / "elsewhere" / "config.json").is_file()
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        export_model(model, masks["llama"], masks["llama"].theta_0, tmp_path / "out")


def test_out_within_the_base(masks: dict[str, Mask], model: Path) -> None:
    before = tiny.snapshot(model)
    with pytest.raises(ModelError, match="lies in the base model's folder; name a folder elsewhere"):
        export_model(model, masks["llama"], masks["llama"].theta_0, model / "tuned")
    assert tiny.snapshot(model) == before


def test_modes_are_those_of_new_files(masks: dict[str, Mask], model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        file.chmod(0o6755 if file.suffix == ".json" else 0o400)
    export_model(model, masks["llama"], masks["llama"].theta_0, tmp_path / "out")
    (tmp_path / "new").write_text("")
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_moved_weights_are_in_the_copy_alone(masks: dict[str, Mask], model: Path, tmp_path: Path) -> None:
    """Also where the base's weights are a hard link to a file elsewhere."""
    os.link(model / "model.safetensors", tmp_path / "hard")
    before = (tmp_path / "hard").read_bytes()
    export_model(model, masks["llama"], masks["llama"].theta_0 + np.float32(1), tmp_path / "out")
    assert (tmp_path / "hard").read_bytes() == before
