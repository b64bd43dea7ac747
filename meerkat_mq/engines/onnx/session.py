"""A graph of a bundle in ONNX Runtime: weights and theta are bound once, by their place in memory.

Each run reads what is there then. The runtime reads as far as the graph's types and shapes say, not as far as an array
goes: so they have to be the array's, else a graph from anybody would read what else is in this process's memory.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.onnx.graph_shapes import MADE, check_shapes
from meerkat_mq.engines.onnx.layout import AGAIN, INDICES, THETA, Shape
from meerkat_mq.engines.onnx.manifest import Bundle
from meerkat_mq.engines.onnx.runtime import Value, not_taken, opened
from meerkat_mq.errors import ModelError, cut, reason

_INT4: Final = 22  # onnx.TensorProto.INT4, which NumPy does not have
_ELEMENTS: Final[dict[str, tuple[Any, Any]]] = {  # what the runtime is told, and what the array has
    "tensor(float)": (np.float32, np.float32), "tensor(float16)": (np.float16, np.float16),
    "tensor(int8)": (np.int8, np.int8), "tensor(int4)": (_INT4, np.uint8), "tensor(int64)": (np.int64, np.int64),
}  # fmt: skip
_STORED: Final = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int4": "tensor(int4)",
}


class Session:
    """A graph of a bundle at a theta.

    Args:
        name: of its file.
        mask: None: the graph takes no theta.

    Attributes:
        made: the inputs that each run is to be given.

    Raises:
        ModelError: ONNX Runtime does not take the graph, or the bundle lacks something that it reads.
    """

    def __init__(self, bundle: Bundle, name: str, graph: bytes, mask: Mask | None, threads: int | None) -> None:
        self._bundle, self._file = bundle, bundle.folder / name
        self._session, inputs, outputs = opened(graph, threads, self._file, AGAIN)
        self._theta = np.empty(0, np.float32) if mask is None else mask.theta_0
        self._binding = self._session.io_binding()
        self._held: list[npt.NDArray[Any]] = []  # the runtime knows no more than where they are
        slices = () if mask is None else mask.slices()
        parts = {matrix.name: (matrix.indices.astype(np.int64), self._theta[part]) for matrix, part in slices}
        self.made = {wanted.name for wanted in inputs} & MADE.keys()
        for wanted in inputs:
            if wanted.name not in MADE:
                self._bind(wanted, self._found(wanted, parts))
        if len(outputs) != 1:
            raise ModelError(str(self._file), f"has {len(outputs)} outputs, not one", AGAIN)
        self._output = outputs[0].name
        try:
            check_shapes(graph, {found.name: found.shape for found in inputs}, self._output)
        except (ValueError, KeyError) as error:
            raise ModelError(str(self._file), f"is no graph of a bundle ({reason(error)})", AGAIN) from error

    def _found(
        self, wanted: Value, parts: Mapping[str, tuple[npt.NDArray[np.int64], Float32Array]]
    ) -> npt.NDArray[Any]:
        """What an input of the graph is to read."""
        name, weights, matrices = wanted.name, self._bundle.weights, self._bundle.manifest.matrices
        none = np.empty(0, np.int64), np.empty(0, np.float32)
        if name.startswith(INDICES):
            return parts.get(name.removeprefix(INDICES), none)[0]
        if name.startswith(THETA):
            return parts.get(name.removeprefix(THETA), none)[1]
        shape: Shape = tuple(number for number in wanted.shape if isinstance(number, int))
        if len(shape) < len(wanted.shape):
            raise self._differs(wanted, "a tensor of the weights file, whose shape is known")
        if name in matrices or wanted.type == _STORED[self._bundle.manifest.weights] != "tensor(float)":
            return weights.linear(name, shape)
        return weights.array(name, "F32", shape)

    def _bind(self, wanted: Value, array: npt.NDArray[Any]) -> None:
        """Let the runtime read an array, all of it and no more."""
        element, dtype = _ELEMENTS.get(wanted.type, (None, None))
        shape = [array.size if isinstance(number, str) else number for number in wanted.shape]
        numbers = math.prod(number or 0 for number in shape)
        if array.dtype != dtype or array.size != ((numbers + 1) // 2 if element == _INT4 else numbers):
            raise self._differs(wanted, f"{array.size} × {array.dtype}")
        self._held.append(array)
        self._binding.bind_input(wanted.name, "cpu", 0, element, shape, array.ctypes.data)

    def _differs(self, wanted: Value, there: str) -> ModelError:
        place = f"{self._file}: {cut(wanted.name)}"
        return ModelError(place, f"is a {wanted.type} {cut(str(wanted.shape))}, and there is {there}", AGAIN)

    def write(self, theta: Float32Array) -> None:
        """Let all runs from now on be at theta, float32 (n,)."""
        if theta.shape != self._theta.shape or theta.dtype != np.float32:
            raise ValueError(f"theta is {theta.dtype} {theta.shape}, not float32 {self._theta.shape}")
        np.copyto(self._theta, theta)

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Float32Array:
        """The graph's output for the inputs of one run."""
        try:
            for name, array in inputs.items():
                self._binding.bind_cpu_input(name, array)
            self._binding.bind_output(self._output, "cpu")
            self._session.run_with_iobinding(self._binding)
            found: Float32Array = self._binding.copy_outputs_to_cpu()[0]
        except Exception as error:
            raise not_taken(self._file, error, AGAIN) from error
        finally:
            self._binding.clear_binding_outputs()
        return found
