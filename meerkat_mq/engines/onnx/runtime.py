"""ONNX Runtime: a graph becomes a session, whatever bytes it is made of; and products of matrices.

NumPy's products are computed by a library with threads of its own (BLAS), as many as there are cores, which burn CPU
time while they wait for each other. A node's `threads` says nothing to them. So large products are made here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnxruntime

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.engines.onnx.protobuf import field
from meerkat_mq.errors import ModelError, reason

VERSION: Final = onnxruntime.__version__
FLOAT: Final = 1  # of onnx.proto's TensorProto.DataType


class Value(NamedTuple):
    """An input or an output of a graph; of its shape, what varies is a name or None."""

    name: str
    type: str
    shape: Sequence[int | str | None]


def opened(graph: bytes, threads: int | None, file: Path, remedy: str) -> tuple[Any, list[Value], list[Value]]:
    """A session of ONNX Runtime that runs a graph as it is written, its inputs and its outputs.

    Raises:
        ModelError: ONNX Runtime does not take the graph; `file` is where it is from.
    """
    try:
        session = onnxruntime.InferenceSession(
            graph, _options(threads), providers=["CPUExecutionProvider"], enable_fallback=0
        )
        inputs, outputs = (
            [Value(found.name, found.type, found.shape) for found in values]
            for values in (session.get_inputs(), session.get_outputs())
        )
    except Exception as error:
        raise not_taken(file, error, remedy) from error
    return session, inputs, outputs


def product_of(threads: int | None) -> Callable[[Float32Array, Float32Array], Float32Array]:
    """What makes a @ b.T, float32 (m, n), of (m, k) and (n, k): ONNX Runtime, on so many threads."""
    transposed = (
        field(1, b"transB") + field(3, 1) + field(20, 2)
    )  # an attribute: name, value, and that it is an integer
    node = field(1, b"a") + field(1, b"b") + field(2, b"product") + field(4, b"Gemm") + field(5, transposed)
    graph = field(1, node) + field(2, b"product") + field(11, value("a")) + field(11, value("b"))
    graph += field(12, value("product"))
    opset = field(2, 13)
    session = onnxruntime.InferenceSession(
        field(1, 8) + field(7, graph) + field(8, opset), _options(threads), providers=["CPUExecutionProvider"]
    )

    def product(a: Float32Array, b: Float32Array) -> Float32Array:
        found: Float32Array = session.run(None, {"a": a, "b": b})[0]
        return found

    return product


def value(name: str, shape: Sequence[int] | None = None) -> bytes:
    """An input or output, float32, as a graph's bytes have it: `{name, type.tensor_type {elem_type, shape.dim …}}`."""
    dims = b"" if shape is None else field(2, b"".join(field(1, field(1, size)) for size in shape))
    return field(1, name.encode()) + field(2, field(1, field(1, FLOAT) + dims))


def not_taken(file: Path, error: Exception, remedy: str) -> ModelError:
    """What to say of a graph that ONNX Runtime does not load or run; it has no common base of its errors."""
    problem = f"is not taken by ONNX Runtime {VERSION} ({reason(error)})"
    return ModelError(str(file), problem, f"update onnxruntime, or {remedy}")


def _options(threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would undo the order
    options.enable_mem_pattern = False  # inputs are never of the same length
    options.log_severity_level = 4
    options.inter_op_num_threads = 1
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # the file's, as all have one priority
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting takes no CPU time
    return options
