"""The node's state folder."""

from pathlib import Path

import pytest

from meerkat_mq.core.toy import toy_mask
from meerkat_mq.errors import ConfigError
from meerkat_mq.node.state import NodeState


def test_steps_go_on_where_the_last_process_stopped_and_start_again_with_a_run(tmp_path: Path) -> None:
    with NodeState(tmp_path) as state:
        assert [state.take_steps("a", 3), state.take_steps("a", 2)] == [0, 3]
    with NodeState(tmp_path) as state:
        assert state.take_steps("a", 1) == 5
        assert state.take_steps("b", 1) == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"run": "a"}', '{"run": "a", "steps": null}', "\x00"])
def test_a_damaged_counter_starts_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "steps.json").write_text(damage)
    with NodeState(tmp_path) as state:
        assert [state.take_steps("a", 1), state.take_steps("a", 1)] == [0, 1]


def test_only_the_newest_mask_is_kept(tmp_path: Path) -> None:
    with NodeState(tmp_path) as state:
        for size in (3, 4):
            state.keep_mask(toy_mask(size))
        assert state.load_mask(toy_mask(3).hash) is None
        kept = state.load_mask(toy_mask(4).hash)
    assert kept is not None
    assert kept.size == 4
    assert len(list(tmp_path.glob("mask-*"))) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"state_dir .*file/state: cannot be used \(Not a directory\); name a folder"),
        NodeState(tmp_path / "file" / "state"),
    ):
        pass


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with NodeState(folder) as state:
        (folder / "lock").unlink()
        folder.rmdir()
        with pytest.raises(ConfigError, match="cannot be used"):
            state.take_steps("a", 1)


def test_one_process_holds_the_folder(tmp_path: Path) -> None:
    with NodeState(tmp_path), pytest.raises(ConfigError, match="is in use"), NodeState(tmp_path):
        pass
    with NodeState(tmp_path):
        pass
