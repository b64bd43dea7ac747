"""A graph from anybody, looked at before ONNX Runtime reads it: operations from a list, and nothing beside them.

An ONNX file can hold loops, branches, functions, operations of other makers' libraries, and constants that lie in other
files, anywhere. Our graphs have none of these. The file is a Protocol Buffers message; only the fields that matter here
are entered, and what cannot be followed is refused.

A graph of a user's own model (`own`) may have more operations, and constants among them. Not in the list, and refused:
what repeats or branches, what draws numbers, strings, and results whose size hangs on values.
"""

from typing import Final

from meerkat_mq.engines.onnx.layout import AGAIN
from meerkat_mq.engines.onnx.protobuf import fields, message
from meerkat_mq.errors import ModelError, shown

OPERATIONS: Final = frozenset((
    "Add", "Attention", "Cast", "DequantizeLinear", "Gather", "Gelu", "Gemm", "LayerNormalization", "Mul",
    "RMSNormalization", "Reshape", "RotaryEmbedding", "ScatterElements", "Shape", "Sigmoid", "Sub",
))  # fmt: skip
_OWN: Final = OPERATIONS | frozenset((
    "Abs", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Ceil", "Celu", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DepthToSpace", "Div", "Einsum", "Elu", "Equal", "Erf",
    "Exp", "Expand", "Flatten", "Floor", "GRU", "GatherElements", "GatherND", "GlobalAveragePool", "GlobalMaxPool",
    "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
    "LRN", "LSTM", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "LpPool", "MatMul",
    "Max", "MaxPool", "Mean", "Min", "Mish", "Mod", "Neg", "NegativeLogLikelihoodLoss", "Not", "OneHot", "Or",
    "PRelu", "Pad", "Pow", "RNN", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Resize", "Round", "Selu", "Sign",
    "Sin", "Slice", "Softmax", "SoftmaxCrossEntropyLoss", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt",
    "Squeeze", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
    "Xor",
))  # fmt: skip
_WITH_TENSOR: Final = {"Constant", "ConstantOfShape"}
EXPORT_AGAIN: Final = "export the model again, as docs/engines.md says"
_MOST_NODES: Final = 1 << 17

# Fields of onnx.proto by message: those that are entered, and those that must not be there.
MODEL_GRAPH, _MODEL_OPSETS, _MODEL_OTHERS = 7, 8, {20: "training", 25: "functions", 26: "devices"}
GRAPH_NODE, GRAPH_CONSTANT, _GRAPH_OTHERS = 1, 5, {15: "sparse constants", 14: "quantisation"}
_NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_OTHERS = (
    5,
    {
        6: "a graph",
        10: "tensors",
        11: "graphs",
        22: "a sparse tensor",
        23: "sparse tensors",
    },
)
_CONSTANT_OTHERS = {13: "data in another file", 14: "data in another file"}
_OPSET_DOMAIN = 1


def check_graph(data: bytes, where: str) -> None:
    """Refuse a graph that is not of the kind that bundles have.

    Raises:
        ModelError: it is no ONNX file, or holds anything else than known operations and small constants.
    """
    try:
        _check_model(data, OPERATIONS)
    except (ValueError, IndexError) as error:
        raise ModelError(where, f"is no graph of a bundle ({error})", AGAIN) from error


def check_own(data: bytes, where: str) -> None:
    """Refuse a graph of a user's own model that holds anything else than known operations and its weights.

    Raises:
        ModelError: as `check_graph`.
    """
    try:
        _check_model(data, _OWN)
    except (ValueError, IndexError) as error:
        raise ModelError(where, f"is no ONNX file that a node computes with ({error})", EXPORT_AGAIN) from error


def _check_model(data: bytes, operations: frozenset[str]) -> None:
    if not any(number == MODEL_GRAPH for number, _ in fields(data)):
        raise ValueError("it holds no graph")
    for number, inner in fields(data):
        _refuse(number, _MODEL_OTHERS, "the model")
        if number == _MODEL_OPSETS:
            _check_domain(message(inner), _OPSET_DOMAIN)
        if number == MODEL_GRAPH:
            _check_nodes(message(inner), operations)


def _check_nodes(graph: bytes, operations: frozenset[str]) -> None:
    nodes = 0
    for number, inner in fields(graph):
        _refuse(number, _GRAPH_OTHERS, "the graph")
        if number == GRAPH_CONSTANT:
            _check_constant(message(inner))
        if number == GRAPH_NODE:
            nodes += 1
            _check_node(message(inner), operations)
    if not 0 < nodes <= _MOST_NODES:
        raise ValueError(f"{nodes} operations")


def _check_node(node: bytes, operations: frozenset[str]) -> None:
    kinds = [message(inner).decode() for number, inner in fields(node) if number == _NODE_KIND]
    if len(kinds) != 1:
        raise ValueError("an operation without a name")
    if kinds[0] not in operations:
        raise ValueError(f"operation {shown(kinds[0])} is none of ours")
    for number, inner in fields(node):
        if number == _NODE_ATTRIBUTE:
            _check_attribute(message(inner), tensors=kinds[0] in _WITH_TENSOR)
    _check_domain(node, _NODE_DOMAIN)


def _check_attribute(attribute: bytes, *, tensors: bool) -> None:
    for number, inner in fields(attribute):
        _refuse(number, _ATTRIBUTE_OTHERS, "an attribute")
        if number == _ATTRIBUTE_TENSOR:
            if not tensors:
                raise ValueError("an attribute holds a tensor")
            _check_constant(message(inner))


def _check_constant(tensor: bytes) -> None:
    for number, _ in fields(tensor):
        _refuse(number, _CONSTANT_OTHERS, "a constant")


def _check_domain(holder: bytes, domain: int) -> None:
    for number, inner in fields(holder):
        if number == domain and (name := message(inner)):
            raise ValueError(f"operations of {shown(name.decode(errors='replace'))}")


def _refuse(number: int, others: dict[int, str], what: str) -> None:
    if number in others:
        raise ValueError(f"{what} holds {others[number]}")
