"""ONNX Runtime: a graph becomes a session, whatever bytes it is made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime

from meerkat_mq.errors import ModelError, reason


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


def not_taken(file: Path, error: Exception, remedy: str) -> ModelError:
    """What to say of a graph that ONNX Runtime does not load or run; it has no common base of its errors."""
    problem = f"is not taken by ONNX Runtime {onnxruntime.__version__} ({reason(error)})"
    return ModelError(str(file), problem, f"update onnxruntime, or {remedy}")


def _options(threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would undo the order
    options.enable_mem_pattern = False  # inputs are never of the same length
    options.log_severity_level = 4
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting takes no CPU time
    return options
