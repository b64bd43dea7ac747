"""`meerkat doctor`: each step of the look, what is wrong, and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.engines import tiny
from tests.support.command import Meerkat

Copy = Callable[[str], Path]


def test_doctor_finds_nothing_wrong(meerkat: Meerkat, folders: dict[str, Path], tmp_path: Path) -> None:
    task = tmp_path / "state.toml"
    task.write_text('template = "{line} It is"\nlabel_words = [" broken", " running"]\n')
    done = meerkat("doctor", "--model", folders["llama"], "--task", task)
    assert done.code == 0, done
    assert [line.partition(":")[0] for line in done.out.splitlines()] == [
        f"✓ {step}" for step in ("folder", "weights", "kind", "tokenizer", "names", "dtype", "trial", "mask", "task")
    ]


def test_doctor_names_what_is_wrong_and_the_remedy(meerkat: Meerkat, copy: Copy) -> None:
    folder = copy("bert")
    tiny.change(folder / "config.json", pad_token_id=320)
    done = meerkat("doctor", "--model", folder)
    assert done.code == 4
    lines = done.out.splitlines()
    assert lines[2].startswith("✗ kind: ")
    assert "pad_token_id" in lines[2]
    assert lines[-1] == "– mask: not looked at"
    found = [json.loads(line) for line in meerkat("doctor", "--model", folder, "--json").out.splitlines()]
    assert [step["good"] for step in found] == [True, True, False, None, None, None, None, None]
    assert found[2]["remedy"]


def test_doctor_of_a_task_that_does_not_fit(meerkat: Meerkat, folders: dict[str, Path], tmp_path: Path) -> None:
    task = tmp_path / "state.toml"
    task.write_text('template = "{line} It is"\nlabel_words = [" broken", " broken"]\n')
    done = meerkat("doctor", "--model", folders["llama"], "--task", task)
    assert done.code in {3, 4}
    assert "Traceback" not in done.err
