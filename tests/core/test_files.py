"""Folders for what a command leaves: new ones, whatever lies there already."""

from pathlib import Path

import pytest

from meerkat_mq.core.files import new_folder
from meerkat_mq.errors import ConfigError


def test_the_default_is_taken_again_under_another_name(tmp_path: Path) -> None:
    default = tmp_path / "runs" / "demo"
    for name in ("demo", "demo-2", "demo-3"):
        folder = new_folder(None, default)
        assert folder == default.with_name(name)
        (folder / "ledger").write_text(name)
    (tmp_path / "runs" / "demo-4").write_text("a file")
    assert new_folder(None, default).name == "demo-5"
    assert new_folder(None, default).name == "demo-5"
    assert [(default.with_name(name) / "ledger").read_text() for name in ("demo", "demo-2")] == ["demo", "demo-2"]


def test_a_chosen_folder_must_be_new(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    assert new_folder(out, tmp_path) == out
    assert new_folder(out, tmp_path) == out
    (out / "ledger").write_text("x")
    with pytest.raises(ConfigError, match=r"^--out .*b: is not empty; name a new folder, or remove what is there$"):
        new_folder(out, tmp_path)
    with pytest.raises(ConfigError, match=r"^--out .*ledger: is no folder; name"):
        new_folder(out / "ledger", tmp_path)
    assert (out / "ledger").read_text() == "x"


def test_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for chosen in (tmp_path / "file" / "demo", None):
        with pytest.raises(ConfigError, match=r"^--out .*demo: cannot be written \(Not a directory\); choose another"):
            new_folder(chosen, tmp_path / "file" / "demo")
