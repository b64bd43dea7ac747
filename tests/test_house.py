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


@pytest.mark.parametrize(
    "module", ["meerkat_mq.cli", "meerkat_mq.server.__main__", "meerkat_mq.node.__main__", "meerkat_mq.tasks.load"]
)
def test_nothing_imports_torch_before_a_model_is_used(module: str) -> None:
    heavy = "{'torch', 'transformers', 'safetensors', 'amqtt'}"
    done = run(sys.executable, "-c", f"import sys, {module}; print(*({heavy} & sys.modules.keys()))")
    assert (done.stdout, done.stderr) == ("\n", "")
