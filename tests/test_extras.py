"""Without an extra, a command says in one line which one it wants; the same packages and versions as pyproject.toml."""

import importlib.util
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from meerkat_mq import extras
from meerkat_mq.broker import embedded
from meerkat_mq.errors import MissingExtra
from meerkat_mq.extras import PACKAGES, Extra, importing, missing, need
from tests.support.command import Meerkat

ROOT = Path(__file__).parents[1]

Block = Callable[..., None]


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Block:
    """Make packages look as if they were not installed."""
    find = importlib.util.find_spec

    def absent(*names: str) -> None:
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name in names else find(name, *rest)
        )

    return absent


def test_the_table_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, packages in PACKAGES.items():
        lines = project["optional-dependencies"][extra]
        assert packages == dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(lines), re.MULTILINE))
        assert len(packages) == len(lines)


@pytest.mark.parametrize(("extra", "package"), [(extra, name) for extra in PACKAGES for name in PACKAGES[extra]])
def test_what_is_not_installed(block: Block, extra: Extra, package: str) -> None:
    if lacking := missing(extra):
        pytest.skip(f"{lacking}: pip install 'meerkat-mq[{extra}]'")
    need(extra, "x")
    block(package)
    with pytest.raises(MissingExtra) as raised:
        need(extra, "x")
    problem = f"needs the extra '{extra}', but {package} is not installed"
    assert str(raised.value) == f"x: {problem}; pip install 'meerkat-mq[{extra}]'"
    assert raised.value.exit_code == 4


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ("4.57.1", "transformers 4.57.1 is installed, and 5 or newer is needed"),
        ("5.0.0rc1", None),
        ("10.1+cpu", None),
        ("unknown", "torch unknown is installed, and 2.6 or newer is needed"),
    ],
)
def test_what_is_too_old(monkeypatch: pytest.MonkeyPatch, found: str, problem: str | None) -> None:
    monkeypatch.setattr(extras, "version", lambda package: found)
    assert missing("model") == problem


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers"), "tokenizers is not installed"),
        (OSError("libcudart.so.12: cannot open"), "its packages cannot be imported (libcudart.so.12: cannot open)"),
        (
            ImportError("cannot import name 'x' from 'transformers'\nmore", name="transformers"),
            "cannot import name 'x'",
        ),
    ],
)
def test_what_is_damaged(error: Exception, words: str) -> None:
    with pytest.raises(MissingExtra, match=re.escape(words)) as raised, importing("model", "x"):
        raise error
    assert "\n" not in str(raised.value)


def test_a_fault_of_our_own_is_not_hidden() -> None:
    with pytest.raises(ImportError), importing("model", "x"):
        raise ImportError("cannot import name 'y'", name="meerkat_mq.engines.torch.load")


# --- commands; in an environment without the packages: tests/test_wheel.py ---


def toml(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_commands_that_need_a_model(meerkat: Meerkat, block: Block, tmp_path: Path) -> None:
    block("torch")
    out, broker = tmp_path / "out", '[broker]\nurl = "mqtt://127.0.0.1:1"\n'
    node = f'federation = "f"\nid = "n"\nstate_dir = "{out}"\nmodel = "m"\ndata = "d.jsonl"\n{broker}'
    server = f'federation = "f"\nstate_dir = "{out}"\nmask = "m.mkm"\ntask = "sst2"\n[model]\nsource = "m"\n'
    server += f'[evaluation]\ndata = "d.jsonl"\n{broker}'
    plan = 'rounds = 1\nlr = [0.1]\n[[methods]]\nname = "m"\n'
    for arguments in (
        ("demo", "--out", out),
        ("mask", "--model", "m", "--text", "t.txt", "--out", out),
        ("export", "--model", "m", "--difference", "d.mkd", "--out", out),
        ("verify", tmp_path, "--model", "m", "--base", "b"),
        ("node", "--config", toml(tmp_path / "node.toml", node)),
        ("server", "--config", toml(tmp_path / "server.toml", server)),
        ("sweep", toml(tmp_path / "plan.toml", plan), "--out", out),
    ):
        meerkat(*arguments).failed(4, "the extra 'model'", "torch is not installed", "pip install 'meerkat-mq[model]'")
        assert not out.exists()


def test_what_needs_another_extra(
    meerkat: Meerkat, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block("peft", "datasets", "amqtt")
    monkeypatch.setattr(embedded, "_mosquitto", lambda: None)
    mask = ("mask", "--model", "m", "--text", "t.txt", "--out", tmp_path / "m.mkm", "--method", "lora")
    meerkat(*mask).failed(4, "--method lora: needs the extra 'lora'", "pip install 'meerkat-mq[lora]'")
    partition = ("partition", "hf:imdb:train", "--out", tmp_path / "s", "--nodes", 2, "--task", "sst2")
    meerkat(*partition).failed(4, "hf:imdb:train: needs the extra 'datasets'", "pip install 'meerkat-mq[datasets]'")
    for arguments in (("broker", "--port", 0), ("demo", "--out", tmp_path / "out")):
        meerkat(*arguments).failed(4, "neither mosquitto nor amqtt is installed", "pip install 'meerkat-mq[embedded]'")
    assert not (tmp_path / "out").exists()
