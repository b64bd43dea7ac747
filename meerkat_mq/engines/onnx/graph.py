"""Graphs by hand: what ONNX Runtime computes of embedded tokens, weights and theta. Only `meerkat bundle` builds them.

Four rules make such a graph fit for theta:

- Every weight is an *input* of the graph, never a constant of it. ONNX Runtime keeps copies of constants in a layout of
  its own ("prepacking"), and what is written into the original later is silently ignored. Inputs are read by each run.
- A linear layer is `values of the stored weight → ScatterElements(indices, theta) → Gemm`. The scatter *assigns* theta
  to the masked weights, in float32, so what was stored there is of no consequence, and nothing is added up.
- What makes a weight's values waits for the layer's own activations: the number 0 in its shape is computed from theirs.
  Else the runtime would make the values of all layers first, and hold them all at once.
- Texts of a batch differ in length. Linear layers, which take nearly all the time, see the tokens of all texts one
  after the other. Only attention sees a text a line: `Gather` by `spread` puts tokens into lines (batch, length),
  padded on the right, and by `kept` takes them out again.

Activations are float32 throughout: with fewer bits, the difference of a step's two losses drowns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.engines.onnx.layout import INDICES, SCALE, THETA, Shape
from meerkat_mq.engines.onnx.quantise import BLOCK, LARGEST, Weights, blocks_of, quantised

OPSET: Final = 23  # Attention, RotaryEmbedding and RMSNormalization
IR_VERSION: Final = 11
EPSILON: Final = "epsilon"

_STORED: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
}

Values = Callable[[], Float32Array]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the bundle's weights file: its format and shape there, and what makes its bytes."""

    name: str
    dtype: str  # as safetensors names it
    shape: Shape
    data: Callable[[], npt.NDArray[Any]]


def packed(name: str, shape: Shape, values: Values, weights: Weights) -> list[Tensor]:
    """A matrix (rows, columns) as the weights file holds it: one tensor, or levels and scales."""
    if weights == "float32":
        return [Tensor(name, "F32", shape, values)]
    if weights == "float16":
        return [Tensor(name, "F16", shape, lambda: values().astype(np.float16))]
    largest = LARGEST[weights]
    scale = Tensor(name + SCALE, "F32", (shape[0], blocks_of(shape[1])), lambda: quantised(values(), largest)[1])
    if weights == "int8":
        return [Tensor(name, "I8", shape, lambda: quantised(values(), largest)[0]), scale]
    nibbles = (shape[0] * shape[1] + 1) // 2
    return [Tensor(name, "U8", (nibbles,), lambda: _nibbles(quantised(values(), largest)[0])), scale]


def _nibbles(levels: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Two levels a byte, the first in the lower half; as ONNX packs them."""
    flat = levels.reshape(-1).view(np.uint8) & np.uint8(15)
    flat = np.pad(flat, (0, flat.size % 2))
    packed_two: npt.NDArray[np.uint8] = flat[0::2] | (flat[1::2] << np.uint8(4))
    return packed_two


class Graph:
    """A graph that grows node by node.

    Args:
        weights: how linear weights are stored.
        parameters: the model's, float32, by name.
        shapes: theirs.
        masked: the linear weights that take theta.

    Attributes:
        tensors: what the weights file must hold for it.
        used: parameters that it reads.
    """

    def __init__(
        self, weights: Weights, parameters: Mapping[str, Values], shapes: Mapping[str, Shape], masked: set[str]
    ) -> None:
        self.tensors: list[Tensor] = []
        self.used: set[str] = set()
        self._weights = weights
        self._parameters, self._shapes, self._masked = parameters, shapes, masked
        self._nodes: list[NodeProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._constants: dict[tuple[int, ...], str] = {}
        self._zeros: dict[str, str] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output, whose name it returns."""
        output = f"{kind}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def input(self, name: str, element: int, dims: Sequence[int | str]) -> str:
        """Declare an input; a dimension is a number, or a name where it varies."""
        self._inputs.append(helper.make_tensor_value_info(name, element, dims))
        return name

    def dims(self, *numbers: int) -> str:
        """A constant list of dimensions."""
        if numbers not in self._constants:
            self._constants[numbers] = "dims." + ".".join(map(str, numbers))
        return self._constants[numbers]

    def has(self, name: str) -> bool:
        """Whether the model has such a parameter."""
        return name in self._parameters

    def vector(self, name: str, change: Callable[[Float32Array], Float32Array] = lambda values: values) -> str:
        """A small parameter, float32, as it is or changed once for all."""
        self.used.add(name)
        values = self._parameters[name]
        return self.table(name, self._shapes[name], lambda: change(values()))

    def table(self, name: str, shape: Shape, values: Values) -> str:
        """Float32 numbers of the weights file as an input."""
        self.tensors.append(Tensor(name, "F32", shape, values))
        return self.input(name, TensorProto.FLOAT, shape)

    def linear(self, x: str, layer: str) -> str:
        """x (tokens, in) to (tokens, out), with the layer's bias if it has one."""
        name = f"{layer}.weight"
        self.used.add(name)
        rows, columns = self._shapes[name]
        weight = self._flat(x, name)
        if name in self._masked:
            places = self.input(INDICES + name, TensorProto.INT64, [f"masked of {name}"])
            theta = self.input(THETA + name, TensorProto.FLOAT, [f"masked of {name}"])
            weight = self.op("ScatterElements", weight, places, theta, axis=0)
        weight = self.op("Reshape", weight, self.dims(rows, columns))
        bias = [self.vector(f"{layer}.bias")] if self.has(f"{layer}.bias") else []
        return self.op("Gemm", x, weight, *bias, transB=1)

    def _flat(self, x: str, name: str) -> str:
        """The values of a linear weight, float32 (rows · columns,), made after x."""
        rows, columns = self._shapes[name]
        self.tensors += packed(name, (rows, columns), self._parameters[name], self._weights)
        if self._weights in LARGEST and columns % BLOCK == 0:  # a block a line: ONNX Runtime takes a tenth of the time
            blocks = rows * columns // BLOCK
            stored = self.input(name, _STORED[self._weights], (blocks, BLOCK))
            scale = self._after(x, self.input(name + SCALE, TensorProto.FLOAT, (blocks,)), (blocks,))
            return self.op("Reshape", self.op("DequantizeLinear", stored, scale, axis=0), self.dims(-1))
        stored = self.input(name, _STORED[self._weights], (rows, columns))
        if self._weights in LARGEST:
            blocks = blocks_of(columns)
            scale = self._after(x, self.input(name + SCALE, TensorProto.FLOAT, (rows, blocks)), (rows, blocks))
            values = self.op("DequantizeLinear", stored, scale, axis=1, block_size=BLOCK)
            return self.op("Reshape", values, self.dims(-1))
        flat = self._after(x, stored, (rows * columns,))
        return flat if self._weights == "float32" else self.op("Cast", flat, to=TensorProto.FLOAT)

    def _after(self, x: str, value: str, shape: Shape) -> str:
        """The value in this shape, which is known only when x is."""
        if x not in self._zeros:
            count = self.op("Shape", x, start=0, end=1)
            self._zeros[x] = self.op("Sub", count, count)
        return self.op("Reshape", value, self.op("Add", self._zeros[x], self.dims(*shape)))

    def model(self, outputs: Iterable[tuple[str, Sequence[int | str]]]) -> ModelProto:
        """The whole graph, with these outputs, float32."""
        constants = [numpy_helper.from_array(np.array(key, np.int64), name) for key, name in self._constants.items()]
        found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs]
        graph = helper.make_graph(self._nodes, "model", self._inputs, found, constants)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="meerkat-mq")
