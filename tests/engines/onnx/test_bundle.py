"""A bundle from anybody: looked at before it is loaded; and what `meerkat bundle` refuses to make."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.onnx.graph_check import check_graph
from meerkat_mq.engines.onnx.protobuf import field
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import MeerkatError, ModelError, ModelMismatch, ModelNotFound, UnsupportedModel
from tests.engines import tiny
from tests.engines.onnx.conftest import Bundled

FILES = ["bundle.json", "graph.onnx", "tokenizer.json", "weights.safetensors"]


@pytest.fixture
def copy(bundled: Bundled, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled("llama", "int8")[1], tmp_path / "bundle"))


def look(folder: Path) -> None:
    from meerkat_mq.engines.onnx.manifest import open_bundle

    open_bundle(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads((folder / "bundle.json").read_text())
    change(table)
    (folder / "bundle.json").write_text(json.dumps(table))


def vouch(folder: Path, name: str) -> None:
    """Let the manifest say of a file what it is."""
    from meerkat_mq.engines.onnx.bundle import _facts

    rewrite(folder, lambda table: table["files"].update({name: _facts(folder / name)}))


def test_a_bundle_holds_four_files_and_no_more_is_needed(copy: Path) -> None:
    assert sorted(path.name for path in copy.iterdir()) == FILES
    look(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_a_link_or_a_folder(copy: Path, tmp_path: Path, name: str) -> None:
    file = copy / name
    file.rename(tmp_path / name)
    with pytest.raises(ModelNotFound, match=name):
        look(copy)
    file.symlink_to(tmp_path / name)
    with pytest.raises(ModelError, match="is a link out of the model folder"):
        look(copy)
    file.unlink()
    file.mkdir()
    with pytest.raises(ModelError, match="is no regular file"):
        look(copy)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(ModelError, match="is no regular file"):
        look(copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_that_is_not_the_manifest_s(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ModelError, match=rf"{name}: is not the file that bundle\.json describes, by size or SHA-256"):
        look(copy)
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(ModelError, match="by size or SHA-256"):
        look(copy)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.update(format=3), "is of format 3, not 2; make the bundle again"),
        (lambda table: table.update(end=-1), r"bundle\.json: end"),
        (lambda table: table.update(chat={"asked": "x"}), r"bundle\.json: chat"),
        (lambda table: table.update(chat={"asked": "x" * 70_000, "whole": ""}), r"bundle\.json: chat"),
        (lambda table: table.update(code="import os"), r"bundle\.json: code: is unknown"),
        (lambda table: table.update(weights="int2"), r"bundle\.json: weights"),
        (lambda table: table.update(fingerprint="no"), r"bundle\.json: fingerprint"),
        (lambda table: table.update(positions=10**9), r"bundle\.json: positions"),
        (lambda table: table.update(embed_scale=float("nan")), r"bundle\.json: embed_scale"),
        (lambda table: table.update(head=None), r"bundle\.json: head: is there for causal"),
        (lambda table: table["files"].pop("graph.onnx"), r"bundle\.json: files: does not name graph\.onnx"),
        (lambda table: table["files"].update({"../x": table["files"]["graph.onnx"]}), r"bundle\.json: files"),
        (lambda table: table["files"]["graph.onnx"].update(bytes=-1), r"bundle\.json: files"),
        (lambda table: table.update(matrices={}), r"bundle\.json: matrices"),
        (lambda table: table.clear(), r"bundle\.json: \w+: "),
    ],
)
def test_a_manifest_that_says_anything_else(copy: Path, change: Callable[[Any], Any], problem: str) -> None:
    rewrite(copy, change)
    with pytest.raises(ModelError, match=problem):
        look(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"format": 1e999}', "\0"])
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / "bundle.json").write_text(text)
    with pytest.raises(ModelError, match=r"bundle\.json"):
        look(copy)


def test_a_tokenizer_that_gives_other_ids(copy: Path) -> None:
    table = json.loads((copy / "tokenizer.json").read_text())
    table["post_processor"] = None
    (copy / "tokenizer.json").write_text(json.dumps(table))
    vouch(copy, "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json: gives other ids than the manifest says"):
        look(copy)


def test_weights_that_the_graph_does_not_find(copy: Path, bundled: Bundled) -> None:
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    file, mask = copy / "weights.safetensors", bundled("llama", "int8")[2]
    whole = file.read_bytes()
    for old, new in ((b"model.norm.weight", b"model.norm.wxight"), (b'"I8"', b'"U8"')):
        file.write_bytes(whole.replace(old, new, 1))
        vouch(copy, file.name)
        with pytest.raises(ModelError, match=r"weights\.safetensors: .*(is missing|is U8)"):
            OnnxEngine(open_bundle(copy), mask, tiny.TASK)


def test_a_graph_that_onnx_runtime_does_not_take(copy: Path, bundled: Bundled) -> None:
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    file = copy / "graph.onnx"
    file.write_bytes(file.read_bytes().replace(b"Sigmoid", b"Reshape"))
    vouch(copy, file.name)
    with pytest.raises(ModelError, match=r"graph\.onnx: is not taken by ONNX Runtime"):
        OnnxEngine(open_bundle(copy), bundled("llama", "int8")[2], tiny.TASK)


def test_graphs_with_more_than_ours_have(bundled: Bundled) -> None:
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_model_from_string((bundled("llama")[1] / "graph.onnx").read_bytes())
    check_graph(model.SerializeToString(), "graph")

    def with_node(*args: Any, **settings: Any) -> Any:
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        changed.graph.node.append(helper.make_node(*args, **settings))
        return changed

    elsewhere = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = elsewhere.graph.initializer.add(name="x", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    function = onnx.ModelProto.FromString(model.SerializeToString())
    function.functions.add(name="f", domain="x")
    opsets = onnx.ModelProto.FromString(model.SerializeToString())
    opsets.opset_import.add(domain="com.example", version=1)
    inner = helper.make_graph([], "inner", [], [])
    for graph, problem in (
        (with_node("Loop", ["a"], ["b"], body=inner), "operation 'Loop' is none of ours"),
        (with_node("Add", ["a"], ["b"], body=inner), "an attribute holds a graph"),
        (with_node("Add", ["a"], ["b"], domain="com.example"), "operations of 'com.example'"),
        (elsewhere, "a constant holds data in another file"),
        (function, "the model holds functions"),
        (opsets, "operations of 'com.example'"),
        (onnx.ModelProto(), "is no graph of a bundle"),
    ):
        with pytest.raises(ModelError, match=problem):
            check_graph(graph.SerializeToString() or b"\x3a\x00", "graph")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_graph(data: bytes) -> None:
    with pytest.raises(ModelError, match="is no graph of a bundle"):
        check_graph(b"\x3a" + bytes([len(data) & 127]) + data, "graph")


THETA = "theta:model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "element", "dims", "problem"),
    [
        (THETA, 1, [2**28], "is a tensor.float. .268435456., and there is 153 × float32"),
        (THETA, 1, ["a", "b"], "and there is 153 × float32"),
        (THETA, 7, ["a"], "is a tensor.int64. ..a.., and there is 153 × float32"),
        ("theta:of.none", 1, [2**40], "and there is 0 × float32"),
        (THETA.replace("theta", "indices"), 1, ["a"], "and there is 153 × int64"),
        (NORM, 7, [32], "is a tensor.int64. .32., and there is 32 × float32"),
        (NORM, 1, [2**33, "n"], "and there is a tensor of the weights file, whose shape is known"),
        (NORM, 1, None, "is F32 .32,., not F32 .."),
        (NORM, 8, [32], "is a tensor.string. .32., and there is 32 × float32"),
    ],
)
def test_a_graph_that_would_read_beyond_what_there_is(
    bundled: Bundled, tmp_path: Path, name: str, element: int, dims: Any, problem: str
) -> None:
    """The runtime is told where an array lies, and reads as far as the graph says: the process ended by SIGSEGV."""
    import onnx
    from onnx import helper

    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    _, bundle, mask = bundled("llama")
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    model = onnx.load_model_from_string((folder / "graph.onnx").read_bytes())
    model.graph.ClearField("node")
    model.graph.ClearField("output")
    model.graph.node.append(helper.make_node("Shape", [name], ["out"]))
    model.graph.output.append(helper.make_tensor_value_info("out", 7, ["rank"]))
    for known in [known for known in model.graph.input if known.name == name]:
        model.graph.input.remove(known)
    model.graph.input.append(helper.make_tensor_value_info(name, element, dims))
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    vouch(folder, "graph.onnx")
    with pytest.raises(ModelError, match=problem):
        OnnxEngine(open_bundle(folder), mask, tiny.TASK)


TWICE = field(1, field(1, b"wanted") * 2 + field(2, b"twice") + field(4, b"Add"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data.replace(b"\x05batch", b"\x05\xff\xfftch"), "is not taken by ONNX Runtime"),
        (lambda data: data + field(7, TWICE + field(12, field(1, b"twice"))), "has 2 outputs, not one"),
    ],
)
def test_names_that_are_no_text_and_more_outputs(
    bundled: Bundled, tmp_path: Path, change: Callable[[bytes], bytes], problem: str
) -> None:
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    _, bundle, mask = bundled("llama")
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (folder / "graph.onnx").write_bytes(change((folder / "graph.onnx").read_bytes()))
    vouch(folder, "graph.onnx")
    with pytest.raises(ModelError, match=problem):
        OnnxEngine(open_bundle(folder), mask, tiny.TASK)


def test_an_id_behind_the_table_of_embeddings(bundled: Bundled, tmp_path: Path) -> None:
    """What lies there are the numbers of another tensor."""
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    _, bundle, mask = bundled("llama")
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    rewrite(folder, lambda table: table.update(start=[table["embedding"]["shape"][0]]))
    engine = OnnxEngine(open_bundle(folder), mask, tiny.TASK)
    with pytest.raises(ModelError, match=r"has \d+ rows, and the tokenizer gives id \d+; make the bundle again"):
        engine.losses(engine.prepare(tiny.ROWS[:2]))


# --- what is not made ---


def made(base: Path, mask: Mask, weights: Any, out: Path) -> None:
    from meerkat_mq.engines.onnx.bundle import make_bundle

    make_bundle(str(base), mask, weights, out, lambda _: None)


@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
def test_weights_that_do_not_hold_the_base(bundled: Bundled, tmp_path: Path, weights: str) -> None:
    base, _, mask = bundled("llama")
    with pytest.raises(
        ModelError, match=r"has values that \w+ does not hold: .*; make that model the run's base: `meer"
    ):
        made(base, mask, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_and_masks_without_a_graph(bundled: Bundled, folders: dict[str, Path], tmp_path: Path) -> None:
    base, _, mask = bundled("llama")
    dense = make_mask(load_model(base), tiny.TEXTS, "dense", **tiny.SMALL)
    with pytest.raises(UnsupportedModel, match="the mask has weights that a bundle does not train: "):
        made(base, dense, "float32", tmp_path / "out")
    gpt2 = make_mask(load_model(folders["gpt2"]), tiny.TEXTS, "magnitude", density=0.1, **tiny.SMALL)
    with pytest.raises(UnsupportedModel, match=r"config\.json: model_type: gpt2 has no graph yet; these have: bert, "):
        made(folders["gpt2"], gpt2, "float32", tmp_path / "out")
    with pytest.raises(ModelMismatch, match="is not the model that the mask was made on"):
        made(folders["bert"], mask, "float32", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_act": "relu"}, "hidden_act: 'relu' has no graph"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters: positions"),
    ],
)
def test_configurations_without_a_graph(
    bundled: Bundled, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    bundled("llama")  # skips
    base = tiny.save(tiny.llama(**changes), tmp_path / "base")
    mask = make_mask(load_model(base), tiny.TEXTS, "magnitude", density=0.1, **tiny.SMALL)
    with pytest.raises(UnsupportedModel, match=problem):
        made(base, mask, "float32", tmp_path / "out")


def test_a_graph_that_differs_from_the_model_is_found(
    bundled: Bundled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, mask = bundled("gemma2")
    monkeypatch.setattr("meerkat_mq.engines.onnx.families._plus_one", lambda values: values)
    with pytest.raises(ModelError, match=r"the graph's losses differ from the model's by"):
        made(base, mask, "float32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something(bundled: Bundled, tmp_path: Path) -> None:
    base, _, mask = bundled("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        made(base, mask, "float32", tmp_path / "out")


def test_a_base_is_its_own_base(bundled: Bundled, tmp_path: Path) -> None:
    from meerkat_mq.engines.onnx.bundle import publish_base

    for weights in ("int8", "int4", "float16"):
        base = bundled("llama-tied", weights)[0]
        again = tmp_path / weights
        publish_base(str(base), weights, again)
        assert load_model(again).fingerprint == load_model(base).fingerprint
        names = {path.name for path in base.iterdir()}
        assert names == {path.name for path in again.iterdir()}
    with pytest.raises(MeerkatError, match="float32 holds every model as it is"):
        publish_base(str(base), "float32", tmp_path / "none")


def test_a_number_that_is_longer_than_ten_bytes() -> None:
    for data in (b"\xff" * 11, b"\x3a", b"\x3a\xff", struct.pack("<B", 0x3B)):
        with pytest.raises(ModelError, match="is no graph of a bundle"):
            check_graph(data, "graph")
