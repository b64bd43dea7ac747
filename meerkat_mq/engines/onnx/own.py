"""A user's own model as an ONNX file: its weights take theta, fields of rows are its inputs, losses come out.

One engine serves every such file: so a node needs none of the user's code, and each file is checked in the same way.

The file is what an exporter writes: operations, and each weight beside them under its name (an *initialiser*). ONNX
Runtime takes initialisers for constants. It keeps copies of constants in a layout of its own ("prepacking"), and what
is written into the original later is silently ignored. An initialiser that is also an input of the graph is none: each
run reads the array that it is given. So the mask's weights become inputs, in bytes that are appended to the file.

The file may come from anybody: it is checked before ONNX Runtime reads it (`graph_check`), and that runtime compares
type and shape of every array with what the graph says.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.foreign import read_regular
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.step import Row
from meerkat_mq.engines.onnx.graph_check import EXPORT_AGAIN, GRAPH_CONSTANT, GRAPH_NODE, MODEL_GRAPH, check_own
from meerkat_mq.engines.onnx.protobuf import field, fields, message
from meerkat_mq.engines.onnx.runtime import FLOAT, Value, not_taken, opened, value
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.errors import ConfigError, ModelError, ModelMismatch, ModelNotFound, cut, reason
from meerkat_mq.tasks.data import usable_rows

LOSSES: Final = "losses"  # the output
_MOST: Final = 1 << 28  # bytes of a file
_ANOTHER: Final = "give a file that was exported from the run's own model"
_TYPES: Final[dict[str, Any]] = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}  # fmt: skip

# Fields of onnx.proto by message.
_GRAPH_INPUT, _NODE_INPUT = 11, 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 8, 9

Batch = dict[str, npt.NDArray[Any]]


class OwnEngine:
    """Implements `core.step.Engine` and, of what `engines.protocol` adds, check and usable.

    Raises:
        ModelNotFound, ModelError: the file is missing, or no graph that a node can compute with.
        ModelMismatch: the mask has weights that are not in it.
    """

    def __init__(self, file: Path, mask: Mask, threads: int | None = None) -> None:
        self._file, self._mask = file, mask
        graph, stored = _read(file)
        self._weights = {matrix.name: self._weight(matrix, stored.get(matrix.name)) for matrix in mask.matrices}
        inputs = [field(_GRAPH_INPUT, value(matrix.name, matrix.shape)) for matrix in mask.matrices]
        graph += field(MODEL_GRAPH, b"".join(inputs))
        self._session, fed, outputs = opened(graph, threads, file, EXPORT_AGAIN)
        self._inputs = [wanted for wanted in fed if wanted.name not in self._weights]
        self._check_outputs(outputs)
        self._check_inputs()

    def _weight(self, matrix: MaskedMatrix, stored: Float32Array | None) -> Float32Array:
        if stored is not None and stored.shape == matrix.shape:
            return stored
        found = "no float32 weight of this name that an operation reads" if stored is None else f"one of {stored.shape}"
        raise ModelMismatch(str(self._file), f"has {found}: the mask's {matrix.name} {matrix.shape}", _ANOTHER)

    def _check_outputs(self, outputs: Sequence[Value]) -> None:
        types = {output.name: output.type for output in outputs}
        if types.get(LOSSES) != "tensor(float)":
            problem = f"has no output {LOSSES!r} in float32, but {cut(str(types))}"
            raise ModelError(str(self._file), problem, EXPORT_AGAIN)

    def _check_inputs(self) -> None:
        if not self._inputs:
            raise ModelError(str(self._file), "has no input: nothing of a row goes in", EXPORT_AGAIN)
        for wanted in self._inputs:
            place = f"{self._file}: input {cut(wanted.name)}"
            if wanted.type not in _TYPES:
                raise ModelError(place, f"is a {wanted.type}; {', '.join(_TYPES)} are known", EXPORT_AGAIN)
            if not wanted.shape or isinstance(wanted.shape[0], int):
                problem = (
                    f"has the shape {cut(str(wanted.shape))}, and the first number is that of the rows, any number"
                )
                raise ModelError(place, problem, "export the model with dynamic_shapes, as docs/engines.md says")

    def check(self, mask: Mask) -> None:
        """Make sure that the file holds the model that the mask was made for; raises `ModelMismatch`."""
        for matrix in mask.matrices:
            differing = int((self._weights[matrix.name].reshape(-1)[matrix.indices] != matrix.theta_0).sum())
            if differing:
                problem = f"{differing} of {matrix.indices.size} masked weights of {matrix.name} differ from theta_0"
                raise ModelMismatch(str(self._file), problem, _ANOTHER)

    def write(self, theta: Float32Array) -> None:
        """Let losses from now on be at theta, float32 (n,)."""
        for matrix, part in self._mask.slices():
            self._weights[matrix.name].reshape(-1)[matrix.indices] = theta[part]

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that have a finite loss, or `DataError` without any; the log names others."""
        return usable_rows(rows, self._tried)

    def _tried(self, rows: Sequence[Row]) -> None:
        if not np.isfinite(self.losses(self.prepare(rows))).all():
            raise ValueError("its loss is not finite")

    def prepare(self, rows: Sequence[Row]) -> Batch:
        """An array for each input, of the rows' fields of its name: (rows, …).

        Raises:
            KeyError, TypeError, ValueError: a row lacks one, or it is of another type or shape.
        """
        return {wanted.name: _array(wanted, [row[wanted.name] for row in rows]) for wanted in self._inputs}

    def losses(self, batch: Batch) -> Float32Array:
        """Float32 (rows,).

        Raises:
            ModelError: ONNX Runtime does not run the graph on them, or it gives anything but a loss for each row.
        """
        try:
            found: Float32Array = self._session.run([LOSSES], self._weights | batch)[0]
        except Exception as error:
            raise not_taken(self._file, error, EXPORT_AGAIN) from error
        rows = len(next(iter(batch.values())))
        if found.shape != (rows,):
            problem = f"gives losses {found.shape} for {rows} rows, not ({rows},)"
            raise ModelError(str(self._file), problem, 'export the loss of each row (reduction="none")')
        return found


def _array(wanted: Value, values: list[Any]) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        array = np.asarray(values).astype(_TYPES[wanted.type], casting="same_kind")  # 1 for 1.0, but not 1.5 for 1
    fits = array.ndim == len(wanted.shape) and all(
        size == known for size, known in zip(array.shape, wanted.shape, strict=True) if isinstance(known, int)
    )
    if not fits:
        raise ValueError(f"field {wanted.name} has the shape {array.shape[1:]}, not {tuple(wanted.shape[1:])}")
    if not np.isfinite(array).all():  # and the loss might be finite: a Relu may make 0 of NaN
        raise ValueError(f"field {wanted.name} is not finite")
    return array


def _read(file: Path) -> tuple[bytes, dict[str, Float32Array]]:
    """A file that was checked, and its weights."""
    try:
        data = read_regular(file, _MOST)
    except FileNotFoundError as error:
        raise ModelNotFound(str(file), "is missing", "name the file that was exported") from error
    except OSError as error:
        raise ModelError(str(file), f"cannot be read ({reason(error)})", EXPORT_AGAIN) from error
    check_own(data, str(file))
    try:
        return data, _weights_in(data)
    except (ValueError, IndexError) as error:
        raise ModelError(str(file), f"holds a damaged weight ({reason(error)})", EXPORT_AGAIN) from error


def _weights_in(data: bytes) -> dict[str, Float32Array]:
    """The float32 weights that operations read, by name; one of fewer or more bytes than its shape says is none."""
    found, read = dict[str, Float32Array](), set[bytes]()
    for graph in (message(inner) for number, inner in fields(data) if number == MODEL_GRAPH):
        for node in (message(inner) for number, inner in fields(graph) if number == GRAPH_NODE):
            read.update(message(inner) for number, inner in fields(node) if number == _NODE_INPUT)
        for tensor in (message(inner) for number, inner in fields(graph) if number == GRAPH_CONSTANT):
            parts = list(fields(tensor))
            dims = tuple(inner for number, inner in parts if number == _TENSOR_DIMS and isinstance(inner, int))
            holds = dict(parts)
            values = holds.get(_TENSOR_RAW) or holds.get(_TENSOR_FLOATS)
            if isinstance(values, bytes) and holds.get(_TENSOR_TYPE) == FLOAT and len(values) == 4 * math.prod(dims):
                name = message(holds.get(_TENSOR_NAME)).decode()
                found[name] = np.frombuffer(values, "<f4").reshape(dims).copy()
    return {name: values for name, values in found.items() if name.encode() in read}


def make(setup: Setup) -> OwnEngine:
    """The engine of a node whose `model` names an ONNX file; raises as `OwnEngine`."""
    if setup.model is None:
        raise ConfigError("model", "is missing", "name the ONNX file of the run's model; see docs/engines.md")
    if setup.device != "cpu":
        raise ConfigError("device", f"{setup.device!r}: ONNX Runtime computes on the CPU here", 'set device = "cpu"')
    if setup.adapter is not None:
        raise ConfigError("adapter", "is given, and an ONNX file takes none", "remove this key")
    return OwnEngine(Path(setup.model), setup.mask, setup.threads)
