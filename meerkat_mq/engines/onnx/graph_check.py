"""A graph from anybody, looked at before ONNX Runtime reads it: operations from a list, and nothing beside them.

An ONNX file can hold loops, branches, functions, operations of other makers' libraries, and constants that lie in other
files, anywhere. Our graphs have none of these. The file is a Protocol Buffers message (wire types 0, 1, 2 and 5); only
the fields that matter here are entered, and what cannot be followed is refused.
"""

from collections.abc import Iterator
from typing import Final

from meerkat_mq.engines.onnx.layout import AGAIN
from meerkat_mq.errors import ModelError, shown

OPERATIONS: Final = frozenset((
    "Add", "Attention", "Cast", "DequantizeLinear", "Gather", "Gelu", "Gemm", "LayerNormalization", "Mul",
    "RMSNormalization", "Reshape", "RotaryEmbedding", "ScatterElements", "Shape", "Sigmoid", "Sub",
))  # fmt: skip
_MOST_NODES: Final = 1 << 17

# Fields of onnx.proto by message: those that are entered, and those that must not be there.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_OTHERS = 7, 8, {20: "training", 25: "functions", 26: "devices"}
_GRAPH_NODE, _GRAPH_CONSTANT, _GRAPH_OTHERS = 1, 5, {15: "sparse constants", 14: "quantisation"}
_NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_OTHERS = {
    5: "a tensor",
    6: "a graph",
    10: "tensors",
    11: "graphs",
    22: "a sparse tensor",
    23: "sparse tensors",
}
_CONSTANT_OTHERS = {13: "data in another file", 14: "data in another file"}
_OPSET_DOMAIN = 1

Field = tuple[int, bytes | None]  # its number, and what is in it; None: a number


def check_graph(data: bytes, where: str) -> None:
    """Refuse a graph that is not of the kind that bundles have.

    Raises:
        ModelError: it is no ONNX file, or holds anything else than known operations and small constants.
    """
    try:
        for number, inner in _fields(data):
            _refuse(number, _MODEL_OTHERS, "the model")
            if number == _MODEL_OPSETS:
                _check_domain(inner, _OPSET_DOMAIN)
            if number == _MODEL_GRAPH:
                _check_nodes(_message(inner))
    except (ValueError, IndexError) as error:
        raise ModelError(where, f"is no graph of a bundle ({error})", AGAIN) from error


def _check_nodes(graph: bytes) -> None:
    nodes = 0
    for number, inner in _fields(graph):
        _refuse(number, _GRAPH_OTHERS, "the graph")
        if number == _GRAPH_CONSTANT:
            for part, _ in _fields(_message(inner)):
                _refuse(part, _CONSTANT_OTHERS, "a constant")
        if number == _GRAPH_NODE:
            nodes += 1
            _check_node(_message(inner))
    if not 0 < nodes <= _MOST_NODES:
        raise ValueError(f"{nodes} operations")


def _check_node(node: bytes) -> None:
    kinds = 0
    for number, inner in _fields(node):
        if number == _NODE_KIND:
            kinds += 1
            name = _message(inner).decode()
            if name not in OPERATIONS:
                raise ValueError(f"operation {shown(name)} is none of ours")
        if number == _NODE_ATTRIBUTE:
            for part, _ in _fields(_message(inner)):
                _refuse(part, _ATTRIBUTE_OTHERS, "an attribute")
    if kinds != 1:
        raise ValueError("an operation without a name")
    _check_domain(node, _NODE_DOMAIN)


def _check_domain(message: bytes | None, domain: int) -> None:
    for number, inner in _fields(_message(message)):
        if number == domain and inner:
            raise ValueError(f"operations of {shown(inner.decode(errors='replace'))}")


def _refuse(number: int, others: dict[int, str], what: str) -> None:
    if number in others:
        raise ValueError(f"{what} holds {others[number]}")


def _message(inner: bytes | None) -> bytes:
    if inner is None:
        raise ValueError("a number where a message must be")
    return inner


def _fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, in their order; a group, or what ends beyond the message, is an error."""
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        kind = key & 7
        if kind == 2:
            size, place = _number(data, place)
            if size > len(data) - place:
                raise ValueError("it is cut short")
            yield key >> 3, data[place : place + size]
            place += size
        elif kind == 0:
            _, place = _number(data, place)
            yield key >> 3, None
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
            if place > len(data):
                raise ValueError("it is cut short")
            yield key >> 3, None
        else:
            raise ValueError(f"wire type {kind}")


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A variable-length number, of ten bytes at most, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number without an end")
