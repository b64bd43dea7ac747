"""Graphs that compute more and more: refused before the first run, in words. Ours of all families are taken."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.errors import ModelError
from tests.engines import tiny
from tests.engines.onnx.conftest import Bundled
from tests.engines.onnx.test_bundle import vouch


class Hostile:
    """The graph of a bundle, and what somebody adds to it before its output."""

    def __init__(self, bundle: Path) -> None:
        import onnx

        self.model = onnx.load_model_from_string((bundle / "graph.onnx").read_bytes())
        self.output: str = self.model.graph.output[0].name
        self._made = 0

    def op(self, kind: str, *inputs: str, first: bool = False, **attributes: Any) -> str:
        """One more node: the last one, or one of the first."""
        from onnx import helper

        self._made += 1
        node = helper.make_node(kind, inputs, [f"evil.{self._made}"], **attributes)
        self.model.graph.node.insert(self._made - 1 if first else len(self.model.graph.node), node)
        return f"evil.{self._made}"

    def list(self, *numbers: int) -> str:
        import numpy as np
        from onnx import numpy_helper

        name = "evil dims " + " ".join(map(str, numbers))
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def end(self, name: str) -> bytes:
        from onnx import helper

        self.model.graph.ClearField("output")
        self.model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
        made: bytes = self.model.SerializeToString()
        return made


def by_broadcasting(graph: Hostile) -> str:
    """(n, 1) and (1, n) are (n, n), and flat they begin anew."""
    x = graph.output
    for _ in range(30):
        flat = graph.op("Reshape", x, graph.list(-1, 1)), graph.op("Reshape", x, graph.list(1, -1))
        x = graph.op("Add", *flat)
    return x


def by_looking_up(graph: Hostile) -> str:
    x = graph.output
    for _ in range(30):
        x = graph.op("Gather", x, "spread", axis=0)
    return x


def by_products_of_itself(graph: Hostile) -> str:
    x = graph.output
    for _ in range(30):
        x = graph.op("Gemm", x, x, transB=1)
    return x


def by_narrow_weights(graph: Hostile) -> str:
    """Each number alone, times a column of many."""
    x, norm = graph.output, graph.op("Reshape", "model.norm.weight", graph.list(-1, 1))
    for _ in range(30):
        x = graph.op("Gemm", graph.op("Reshape", x, graph.list(-1, 1)), norm, transB=1)
    return x


def by_a_wide_table(graph: Hostile) -> str:
    """A whole weight as one row, for every token."""
    weight = "model.layers.0.mlp.up_proj.weight"
    wide = graph.op("Reshape", weight, graph.list(1, 1536), first=True)
    return graph.op("Gather", wide, "kept", axis=0, first=True)


def by_wide_products(graph: Hostile) -> str:
    """Of two weights."""
    weight = "model.layers.0.mlp.up_proj.weight"
    flat = graph.op("Reshape", weight, graph.list(1536, 1), first=True)
    return graph.op("Gemm", flat, flat, transB=1, first=True)


def by_holding(graph: Hostile) -> str:
    """A thousand results that are all read at the end."""
    held = [graph.op("Sigmoid", graph.output) for _ in range(1000)]
    x = held[0]
    for other in held[1:]:
        x = graph.op("Add", x, other)
    return x


def by_results_of_no_use(graph: Hostile) -> str:
    graph.op("Sigmoid", graph.output)
    return graph.op("Sigmoid", graph.output)


def by_heads(graph: Hostile) -> str:
    """As many as there are numbers: their scores are heads × length × length."""
    x = graph.op("Gather", "embedded", "spread", axis=0, first=True)
    return graph.op("Attention", x, x, x, q_num_heads=32, kv_num_heads=32, first=True)


def by_computed_sizes(graph: Hostile) -> str:
    count = graph.op("Shape", graph.output, start=0, end=1)
    return graph.op("Reshape", graph.output, graph.op("Add", count, count))


def by_wide_numbers(graph: Hostile) -> str:
    return graph.op("Cast", graph.output, to=15)


WAYS: list[Callable[[Hostile], str]] = [
    by_broadcasting, by_looking_up, by_products_of_itself, by_narrow_weights, by_a_wide_table, by_wide_products,
    by_holding, by_results_of_no_use, by_heads, by_computed_sizes, by_wide_numbers,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_that_grows_is_refused_before_it_runs(
    bundled: Bundled, tmp_path: Path, way: Callable[[Hostile], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle
    from meerkat_mq.engines.onnx.session import Session

    _, bundle, mask = bundled("llama")
    monkeypatch.setattr(Session, "run", pytest.fail)
    folder, graph = Path(shutil.copytree(bundle, tmp_path / "bundle")), Hostile(bundle)
    (folder / "graph.onnx").write_bytes(graph.end(way(graph)))
    vouch(folder, "graph.onnx")
    opened = open_bundle(folder)  # of known operations it consists
    with pytest.raises(
        ModelError, match=r"graph\.onnx: is (no graph of a bundle \(.*(evil|of ours)|not taken by ONNX R)"
    ):
        OnnxEngine(opened, mask, tiny.TASK)


def test_what_a_row_alone_adds_is_taken(bundled: Bundled, tmp_path: Path) -> None:
    """A change within the shapes of ours is one of a maker's own; that it is another model is found elsewhere."""
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    _, bundle, mask = bundled("llama")
    folder, graph = Path(shutil.copytree(bundle, tmp_path / "bundle")), Hostile(bundle)
    x = graph.output
    for _ in range(30):
        x = graph.op("Add", x, x)
    (folder / "graph.onnx").write_bytes(graph.end(graph.op("Sigmoid", x)))
    vouch(folder, "graph.onnx")
    OnnxEngine(open_bundle(folder), mask, tiny.TASK)
