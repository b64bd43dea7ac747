"""The house keeps its rules: floors, version, and nothing heavy at the door."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import meerkat_mq

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_floors_hold() -> None:
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == meerkat_mq.__version__ == version("meerkat-mq")


MODULES = ["meerkat_mq.server.__main__", "meerkat_mq.node.__main__", "meerkat_mq.tasks.load"]
CLI = "from meerkat_mq.cli import command_line"


@pytest.mark.parametrize("statement", [*(f"import {module}" for module in MODULES), f"{CLI}; command_line()"])
def test_nothing_imports_torch_before_a_model_is_used(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'safetensors', 'amqtt'}"
    done = run(sys.executable, "-c", f"{statement}; import sys; print(*({heavy} & sys.modules.keys()))")
    assert (done.stdout, done.stderr) == ("\n", "")


def test_a_command_imports_what_it_needs_alone() -> None:
    others = "{'meerkat_mq.simulate', 'meerkat_mq.chaos', 'meerkat_mq.sweep', 'meerkat_mq.server'}"
    done = run(
        sys.executable, "-c", f"{CLI}; command_line('node'); import sys; print(*({others} & sys.modules.keys()))"
    )
    assert (done.stdout, done.stderr) == ("\n", "")
