"""Engines by name: those of this package, a user's own, and what is wrong with one, in one line."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.config import NodeConfig, ServerConfig
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import ENGINES, check_named, entry_of, make_engine, own_mask, try_out, usable
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.errors import ConfigError, DataError, ModelMismatch, RunMismatch
from meerkat_mq.node.state import NodeState
from meerkat_mq.node.work import Work
from meerkat_mq.server.run import prepare_run

MASK = toy_mask(4)
GOOD = """
import numpy as np
from meerkat_mq.core.mask import Mask

class Line:
    def __init__(self, setup):
        self.theta = setup.mask.theta_0
    def write(self, theta):
        self.theta = theta.copy()
    def prepare(self, rows):
        return np.array([row["x"] for row in rows])
    def losses(self, batch):
        return (self.theta[0] - batch).astype(np.float32) ** 2
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module of a user's own; returns the engine's name."""
    (tmp_path / "path").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def written(code: str) -> str:
        (tmp_path / "path" / "ours.py").write_text(code)
        monkeypatch.delitem(sys.modules, "ours", raising=False)
        return "ours:Line"

    return written


def test_the_engines_of_this_package() -> None:
    assert sorted(ENGINES) == ["graph", "onnx", "toy", "transformers"]
    assert isinstance(make_engine("toy", Setup(MASK), "a test"), QuadraticEngine)
    with pytest.raises(ConfigError, match=r"^engine: 'tpu' is unknown; use graph, onnx, toy, transformers, or"):
        entry_of("tpu")


def test_an_engine_of_ones_own(write: Write) -> None:
    name = write(GOOD)
    engine = make_engine(name, Setup(MASK), "a test")
    rows = usable(engine, [{"x": 1.0}, {"y": 2.0}, {"x": 3.0}])
    assert rows == [{"x": 1.0}, {"x": 3.0}]
    try_out(name, engine, MASK.theta_0, rows)
    assert own_mask(name, 4) is None
    with pytest.raises(DataError, match=r"a row: cannot be prepared \(KeyError: 'x'\)"):
        usable(engine, [{"y": 2.0}])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            None,
            "ours:Line: ModuleNotFoundError: No module named 'ours'; install it, or set PYTHONPATH",
        ),
        ("x = (", r"ours:Line: SyntaxError: '\(' was never closed .*; see docs/engines.md"),
        (
            "import nothing_of_this_name",
            r"ours:Line: ModuleNotFoundError: No module named 'nothing_of_this_name' \(ours.py, line 1\)",
        ),
        ("", "ours has no attribute 'Line'; see docs/engines.md"),
        ("Line = 3", "ours has an attribute 'Line', which cannot be called"),
        ("def Line(): pass", "ours:Line: TypeError: too many positional arguments"),
        ("def Line(setup): return 3", "ours:Line gives an object of type int, without a method write"),
        (
            "def Line(setup):\n    raise ValueError('no\\nway')",
            r"ours:Line: ValueError: no \(ours.py, line 2\); mend it",
        ),
        (GOOD.replace("losses", "loss"), "ours:Line gives an object of type Line, without a method losses"),
        (GOOD + "    def check(self, mask): raise OSError('gone')\n", "ours:Line: OSError: gone"),
    ],
)
def test_what_is_no_engine_is_said_in_one_line(write: Write, code: str | None, words: str) -> None:
    name = "ours:Line" if code is None else write(code)
    sys.modules.pop("ours", None)
    with pytest.raises(ConfigError, match=f"^engine: {words}") as caught:
        make_engine(name, Setup(MASK), "a test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ("(self.theta[0] - batch) ** 2", r"losses of 2 rows are float64 \(2,\), not a NumPy array, float32 \(2,\)"),
        ("np.float32(1)", "losses of 2 rows are of type float32, not"),
        ("np.ones((2, 1), np.float32)", r"losses of 2 rows are float32 \(2, 1\), not"),
        ("[1.0, 2.0]", "losses of 2 rows are of type list, not"),
        ("batch / self", r"TypeError: unsupported operand .* \(ours.py, line 13\); mend it; see docs/engines.md"),
    ],
)
def test_losses_of_another_kind_are_refused_before_a_run_depends_on_them(write: Write, losses: str, words: str) -> None:
    name = write(GOOD.replace("(self.theta[0] - batch).astype(np.float32) ** 2", losses))
    engine = make_engine(name, Setup(MASK), "a test")
    with pytest.raises(ConfigError, match=f"^engine: ours:Line: {words}"):
        try_out(name, engine, MASK.theta_0, [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}])


def test_errors_of_our_own_tree_pass(write: Write) -> None:
    check = "from meerkat_mq.errors import ModelMismatch\n"
    method = "    def check(self, mask): raise ModelMismatch('here', 'is another model', 'give the run its own')\n"
    with pytest.raises(ModelMismatch, match=r"^here: is another model; give the run its own$"):
        make_engine(write(check + GOOD + method), Setup(MASK), "a test")


def test_a_mask_that_the_engine_brings_along(write: Write) -> None:
    name = write(GOOD + "    @staticmethod\n    def mask(): return Mask.whole({'b': [2.0], 'a': [[0.0, 1.0]]})\n")
    mask = own_mask(name, 1000)
    assert mask is not None
    assert ([matrix.name for matrix in mask.matrices], mask.theta_0.tolist()) == (["a", "b"], [0.0, 1.0, 2.0])
    with pytest.raises(ConfigError, match=r"^engine: ours:Line: mask\(\) returns an object of type int, not a Mask"):
        own_mask(write(GOOD + "    @staticmethod\n    def mask(): return 3\n"), 1000)


def test_a_server_with_a_mask_file_imports_no_engine(tmp_path: Path) -> None:
    MASK.save(tmp_path / "mask.mkm")
    config = ServerConfig(federation="f", state_dir=tmp_path, engine="not_there:Engine", mask=tmp_path / "mask.mkm")
    assert prepare_run(config).descriptor.engine == "not_there:Engine"
    with pytest.raises(ConfigError, match=r"^engine: not_there:Engine: ModuleNotFoundError"):
        prepare_run(config.model_copy(update={"mask": None}))


# --- a node imports what its own file names, and nothing else ---


@pytest.mark.parametrize(
    ("run", "named", "words"),
    [
        (
            "ours:Line",
            None,
            "the run computes with 'ours:Line', and this file names none; .* set engine = \"ours:Line\"",
        ),
        ("ours:Line", "theirs:Line", "the run computes with 'ours:Line', and this file names 'theirs:Line'"),
        ("os:system", None, "the run computes with 'os:system', and this file names none"),
        ("toy", "ours:Line", "the run computes with 'toy', and this file names 'ours:Line'"),
        ("onnx", None, "the run computes with 'onnx', which this version does not have; install the server's version"),
    ],
)
def test_a_run_whose_engine_the_file_does_not_name_is_refused(run: str, named: str | None, words: str) -> None:
    with pytest.raises(RunMismatch, match=f"^engine: {words}"):
        check_named(run, named)


@pytest.mark.parametrize(("run", "named"), [("toy", None), ("toy", "toy"), ("transformers", None), ("a.b:c", "a.b:c")])
def test_a_run_whose_engine_it_names_is_not(run: str, named: str | None) -> None:
    check_named(run, named)


def test_values_mode_wants_a_gradient(write: Write, tmp_path: Path) -> None:
    MASK.save(tmp_path / "mask.mkm")
    (tmp_path / "rows.jsonl").write_text('{"x": 1.0}\n')
    name = write(GOOD)
    run = prepare_run(
        ServerConfig(federation="f", state_dir=tmp_path, engine=name, mask=tmp_path / "mask.mkm")
    ).descriptor
    config = NodeConfig(id="a", federation="f", data=tmp_path / "rows.jsonl", state_dir=tmp_path / "a", engine=name)
    with NodeState(tmp_path / "a") as state:
        work = Work(config, run, MASK, state)
        assert np.array_equal(work.place[0], MASK.theta_0)
        with pytest.raises(ConfigError, match=r'^uplink: is "values", and the engine ours:Line has no method gradient'):
            Work(config.model_copy(update={"uplink": "values"}), run, MASK, state)
