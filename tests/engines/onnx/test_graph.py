"""A user's own model as an ONNX file: PyTorch's losses at every theta, and what is wrong with a file in one line."""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from meerkat_mq.config import ServerConfig, check_config
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.step import Engine, Row, projected_gradient
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import make_engine, usable
from meerkat_mq.errors import ConfigError, MeerkatError, ModelError, ModelMismatch, ModelNotFound
from meerkat_mq.extras import missing
from tests.engines.test_own import write_files

NEEDS_ONNX = pytest.mark.skipif(
    bool(missing("onnx") or missing("bundle")), reason="needs pip install 'meerkat-mq[onnx,bundle]'"
)
pytestmark = NEEDS_ONNX
CLOSE = 1e-6
RNG = np.random.default_rng(3)
ROWS: list[Row] = [{"window": RNG.normal(size=32).round(3).tolist(), "kind": k % 3} for k in range(24)]


@pytest.fixture
def page(tmp_path: Path) -> ModuleType:
    return module_of_page(tmp_path)


def module_of_page(folder: Path) -> ModuleType:
    """windows.py of docs/engines.md."""
    write_files(folder, 1)
    spec = spec_from_file_location("windows", folder / "windows.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graph(network: Any) -> Any:
    """What an exporter makes of the page's network, by hand; tests/engines/test_own.py has PyTorch's own file."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Unsqueeze", ["window", "axis"], ["wide"]),
        helper.make_node("Conv", ["wide", "filters.weight", "filters.bias"], ["found"], strides=[4]),
        helper.make_node("Relu", ["found"], ["seen"]),
        helper.make_node("Flatten", ["seen"], ["flat"]),
        helper.make_node("Gemm", ["flat", "kinds.weight", "kinds.bias"], ["scores"], transB=1),
        helper.make_node("SoftmaxCrossEntropyLoss", ["scores", "kind"], ["losses"], reduction="none"),
    ]
    inputs = [
        helper.make_tensor_value_info("window", TensorProto.FLOAT, ["rows", 32]),
        helper.make_tensor_value_info("kind", TensorProto.INT64, ["rows"]),
    ]
    outputs = [helper.make_tensor_value_info("losses", TensorProto.FLOAT, ["rows"])]
    weights = {name: weight.detach().numpy() for name, weight in network.named_parameters()}
    constants = [numpy_helper.from_array(array, name) for name, array in (weights | {"axis": np.array([1])}).items()]
    made = helper.make_graph(nodes, "windows", inputs, outputs, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def both(page: ModuleType, folder: Path, mask: Mask | None = None) -> tuple[Engine[Any], Engine[Any], Mask]:
    """The engine of the file, and the page's own."""
    mask = mask or page.Windows.mask()
    (folder / "windows.onnx").write_bytes(graph(page.Network()).SerializeToString())
    made = make_engine("graph", Setup(mask, model=str(folder / "windows.onnx"), threads=1), "a test")
    return made, page.Windows(Setup(mask, threads=1)), mask


def losses(engine: Engine[Any], theta: Float32Array) -> Float32Array:
    engine.write(theta)
    return engine.losses(engine.prepare(ROWS))


def test_losses_and_projected_gradients_are_those_of_pytorch(page: ModuleType, tmp_path: Path) -> None:
    ours, theirs, mask = both(page, tmp_path)
    assert usable(ours, ROWS) == ROWS
    for seed in range(20):
        z = direction("mk1", seed, 0, mask.size)
        theta = mask.theta_0 + np.float32(0.1) * direction("mk1", seed + 100, 0, mask.size)
        np.testing.assert_allclose(losses(ours, theta), losses(theirs, theta), rtol=0, atol=CLOSE)
        found, wanted = (
            projected_gradient(engine, theta, z, 1e-3, engine.prepare(ROWS[:16]))[0] for engine in (ours, theirs)
        )
        assert found == pytest.approx(wanted, abs=1e-4)


def test_what_is_written_is_never_ignored(page: ModuleType, tmp_path: Path) -> None:
    """ONNX Runtime keeps copies of initialisers: it would go on with theta_0, and say nothing."""
    ours, theirs, mask = both(page, tmp_path)
    before = losses(ours, mask.theta_0)
    for matrix, part in mask.slices():
        theta = mask.theta_0
        theta[part.start] += np.float32(0.5)
        found = losses(ours, theta)
        assert np.abs(found - before).max() > 1e-3, matrix.name
        np.testing.assert_allclose(found, losses(theirs, theta), rtol=0, atol=CLOSE, err_msg=matrix.name)
        theta[:] = 0  # the caller uses the array again
        np.testing.assert_array_equal(ours.losses(ours.prepare(ROWS)), found)
    np.testing.assert_array_equal(losses(ours, mask.theta_0), before)  # and nothing is left of it


def test_weights_that_are_not_in_the_mask_stay_as_they_are_in_the_file(page: ModuleType, tmp_path: Path) -> None:
    whole = page.Windows.mask()
    matrix = next(matrix for matrix in whole.matrices if matrix.name == "kinds.weight")
    few = np.arange(0, 72, 7, dtype=np.uint32)
    part = MaskedMatrix(matrix.name, matrix.shape, few, matrix.theta_0[few], matrix.g_p[few])
    mask = Mask((part,), bytes(32), bytes(32))
    ours, _, _ = both(page, tmp_path, mask)
    theirs = page.Windows(Setup(whole))
    theta, moved = mask.theta_0 + np.float32(0.3), whole.theta_0
    place = next(place for known, place in whole.slices() if known.name == matrix.name)
    moved[place.start + few] = theta
    np.testing.assert_allclose(losses(ours, theta), losses(theirs, moved), rtol=0, atol=CLOSE)


def test_rows_that_the_graph_does_not_take_are_left_out(page: ModuleType, tmp_path: Path) -> None:
    ours, _, _ = both(page, tmp_path)
    window = ROWS[0]["window"]
    wrong: list[Row] = [
        {"window": window}, {"window": window, "kind": 1.5}, {"window": window, "kind": "1"},
        {"window": window, "kind": 3}, {"window": window[1:], "kind": 1}, {"window": [window], "kind": 1},
        {"window": [*window[1:], None], "kind": 1}, {"window": [*window[1:], [1.0]], "kind": 1},
        {"window": [*window[1:], float("nan")], "kind": 1},
    ]  # fmt: skip
    whole_numbers: Row = {"window": [1] * 32, "kind": True}
    assert usable(ours, [*wrong, ROWS[0], whole_numbers, *wrong]) == [ROWS[0], whole_numbers]
    with pytest.raises(ValueError, match=r"^field window has the shape \(31,\), not \(32,\)$"):
        ours.prepare([wrong[4]])


def _only(model: Any, kind: str, *inputs: str, **attributes: Any) -> None:
    """Another operation that makes the losses."""
    from onnx import helper

    del model.graph.node[-1]
    model.graph.node.append(helper.make_node(kind, inputs, ["losses"], **attributes))


def _remove(model: Any, name: str) -> None:
    model.graph.initializer.remove(next(one for one in model.graph.initializer if one.name == name))


def _elsewhere(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="/etc/passwd")


def _constant(model: Any) -> None:
    """A tensor in an operation's attribute that lies in another file."""
    from onnx import helper

    node = helper.make_node("Constant", [], ["more"], value=helper.make_tensor("x", 1, [1], [1.0]))
    node.attribute[0].t.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.insert(0, node)


def _fixed(model: Any) -> None:
    for wanted in model.graph.input:
        wanted.type.tensor_type.shape.dim[0].dim_value = 2


def _empty_loop(model: Any) -> None:
    from onnx import helper

    _only(model, "Loop", "scores", body=helper.make_graph([], "inner", [], []))


def _folded(model: Any) -> None:
    """As if an exporter had worked with a copy: theta would be written, and read by nobody."""
    copy = model.graph.initializer.add()
    copy.CopyFrom(next(one for one in model.graph.initializer if one.name == "kinds.weight"))
    copy.name = "folded"
    model.graph.node[4].input[1] = "folded"


def _half(model: Any) -> None:
    model.graph.initializer[0].data_type = 16
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[::2]


def _other_start(model: Any) -> None:
    raw = bytearray(model.graph.initializer[1].raw_data)
    raw[2:4] = b"\x80\x3f"
    model.graph.initializer[1].raw_data = bytes(raw)


@pytest.mark.parametrize(
    ("change", "kind", "problem"),
    [
        (_empty_loop, ModelError, "is no ONNX file that a node computes with (operation 'Loop' is none of ours)"),
        (lambda m: _only(m, "RandomNormalLike", "scores"), ModelError, "operation 'RandomNormalLike' is none of ours"),
        (lambda m: _only(m, "Identity", "scores", value=b"x"), ModelError, "is not taken by ONNX Runtime"),
        (lambda m: _only(m, "Relu", "scores", domain="com.example"), ModelError, "operations of 'com.example'"),
        (_elsewhere, ModelError, "a constant holds data in another file"),
        (_constant, ModelError, "a constant holds data in another file"),
        (lambda m: m.functions.add(name="f", domain="x"), ModelError, "the model holds functions"),
        (lambda m: m.graph.ClearField("output"), ModelError, "has no output 'losses' in float32, but {}"),
        (lambda m: m.graph.ClearField("node"), ModelError, "is no ONNX file that a node computes with (0 operations)"),
        (lambda m: _remove(m, "axis"), ModelError, "is not taken by ONNX Runtime"),
        (
            lambda m: _remove(m, "kinds.bias"),
            ModelMismatch,
            "has no float32 weight of this name that an operation reads: the mask's kinds.bias",
        ),
        (_folded, ModelMismatch, "that an operation reads: the mask's kinds.weight (3, 24)"),
        (
            _half,
            ModelMismatch,
            "has no float32 weight of this name that an operation reads: the mask's filters.weight (4, 1, 9)",
        ),
        (_other_start, ModelMismatch, "1 of 4 masked weights of filters.bias differ from theta_0"),
        (_fixed, ModelError, "input window: has the shape [2, 32], and the first number is that of the rows, any"),
    ],
)
def test_a_file_that_is_wrong_or_hostile(
    page: ModuleType, tmp_path: Path, change: Callable[[Any], Any], kind: type[MeerkatError], problem: str
) -> None:
    model = graph(page.Network())
    change(model)
    refused(page, tmp_path, model.SerializeToString(), kind, problem)


def refused(page: ModuleType, folder: Path, data: bytes, kind: type[MeerkatError], problem: str) -> None:
    (folder / "windows.onnx").write_bytes(data)
    with pytest.raises(kind) as caught:
        make_engine("graph", Setup(page.Windows.mask(), model=str(folder / "windows.onnx")), "a test")
    assert type(caught.value) is kind
    assert problem in str(caught.value)
    assert str(folder / "windows.onnx") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_losses_that_are_not_of_each_row(page: ModuleType, tmp_path: Path) -> None:
    model = graph(page.Network())
    model.graph.node[-1].attribute[0].s = b"mean"
    model.graph.output[0].type.tensor_type.shape.ClearField("dim")
    (tmp_path / "windows.onnx").write_bytes(model.SerializeToString())
    engine = make_engine("graph", Setup(page.Windows.mask(), model=str(tmp_path / "windows.onnx")), "a test")
    with pytest.raises(ModelError, match=r"gives losses \(\) for 24 rows, not \(24,\); export the loss of each row"):
        engine.losses(engine.prepare(ROWS))


def test_what_is_no_file_of_an_exporter(page: ModuleType, tmp_path: Path) -> None:
    for data in (b"", b"PK\x03\x04 a zip", b"\x3a\x05ab", b"\x0b" * 40, b"\x80" * 40):
        refused(page, tmp_path, data, ModelError, "is no ONNX file that a node computes with")
    with pytest.raises(ModelNotFound, match=r"none\.onnx: is missing; name the file that was exported"):
        make_engine("graph", Setup(page.Windows.mask(), model=str(tmp_path / "none.onnx")), "a test")
    with pytest.raises(ModelError, match="cannot be read"):
        make_engine("graph", Setup(page.Windows.mask(), model=str(tmp_path)), "a test")


def test_what_a_file_of_ones_own_does_not_go_with(page: ModuleType, tmp_path: Path) -> None:
    mask, file = page.Windows.mask(), str(tmp_path / "windows.onnx")
    for setup, problem in (
        (Setup(mask), "^model: is missing; name the ONNX file of the run's model"),
        (Setup(mask, model=file, device="cuda"), "^device: 'cuda': ONNX Runtime computes on the CPU here"),
        (Setup(mask, model=file, adapter="lora"), "^adapter: is given, and an ONNX file takes none"),
    ):
        with pytest.raises(ConfigError, match=problem):
            make_engine("graph", setup, "a test")
    table = {"federation": "f", "state_dir": "s", "engine": "graph"}
    with pytest.raises(ConfigError, match=r'engine.*"graph" is for nodes; name the engine that the file was exported'):
        check_config(table, ServerConfig, where="federation.toml")
