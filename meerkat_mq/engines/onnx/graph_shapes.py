"""The sizes of all that a bundle's graph computes, by its operations: a graph from anybody may not grow without bound.

Known operations alone bound nothing: an addition of (n, 1) and (1, 2) doubles an array, and forty of them fill any
memory; a thousand results that are all read at the end do so, too. Our graphs do neither. Each operation is taken in
the shapes in which our graphs have it, so that no result is larger than a weight, or than a pass's tokens times the
width of one; and few are held at any time, if operations are carried out in the order of the file. They are: the
session asks for that order (`runtime`).

A dimension is c · s₁ · s₂ …: a number, and names of what varies (tokens, batch, length, wanted).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from meerkat_mq.engines.onnx.graph_check import GRAPH_CONSTANT, GRAPH_NODE, MODEL_GRAPH
from meerkat_mq.engines.onnx.protobuf import fields, message
from meerkat_mq.errors import shown

Dim = tuple[int, tuple[str, ...]]
Shape = tuple[Dim, ...]

MADE: Final[Mapping[str, tuple[str | int | None, ...]]] = {  # inputs of one run, and their shapes; None: any number
    "embedded": ("tokens", None), "position_ids": ("batch", "length"), "places": ("tokens",),
    "spread": ("batch", "length"), "kept": ("tokens",), "wanted": ("wanted",),
    "seen": ("batch", 1, "length", "length"),
}  # fmt: skip
_PLACES: Final = ("spread", "kept", "wanted", "places")  # where a row of a table, or a token, is looked up
_MOST_HELD: Final = 16  # results that are still to be read
_WIDEST: Final = 16  # times the width of the embedded tokens
_LEAST_HEAD: Final = 4  # numbers of an attention head: scores are heads × length × length
_VARYING: Final = {(), ("tokens",), ("wanted",), ("batch", "length")}  # what a result's size may hang on
_FLOAT: Final = 1


@dataclass
class _Node:
    kind: str
    inputs: list[str]
    output: str
    numbers: dict[str, int] = field(default_factory=dict)


def check_shapes(data: bytes, inputs: Mapping[str, Sequence[int | str | None]], output: str) -> None:
    """Refuse a graph whose results are larger, or held longer, than those of ours.

    Args:
        data: that `check_graph` has passed.
        inputs: the graph's, by name, with their shapes; `output`: what it gives.

    Raises:
        ValueError: says which operation.
    """
    graph = b"".join(message(inner) for number, inner in fields(data) if number == MODEL_GRAPH)  # as they are merged
    parts = [(number, message(inner)) for number, inner in fields(graph) if number in (GRAPH_NODE, GRAPH_CONSTANT)]
    shapes = _Shapes(inputs, dict(_constant(inner) for number, inner in parts if number == GRAPH_CONSTANT))
    nodes = [_node(inner) for number, inner in parts if number == GRAPH_NODE]
    last = {name: at for at, node in enumerate(nodes) for name in node.inputs} | {output: len(nodes)}
    held = set[str]()
    for at, node in enumerate(nodes):
        if last.get(node.output, -1) <= at:
            raise ValueError(f"nothing reads {shown(node.output)} after it is made")
        if shapes.add(node):
            held.add(node.output)
        if len(held) > _MOST_HELD:
            raise ValueError(f"more than {_MOST_HELD} results wait to be read at {shown(node.output)}")
        held = {name for name in held if last[name] > at}


class _Shapes:
    """What is known of all names so far."""

    def __init__(self, inputs: Mapping[str, Sequence[int | str | None]], constants: dict[str, list[int]]) -> None:
        self._of: dict[str, Shape] = {}
        self._numbers = constants  # of lists of dimensions
        self._counts = set[str]()
        for name, dims in inputs.items():
            known = MADE.get(name)
            if known is not None and (len(known) != len(dims) or not all(map(_is, dims, known))):
                raise ValueError(f"the input {name} is {shown(dims)}")
            self._of[name] = tuple((dim, ()) if isinstance(dim, int) else (1, (str(dim),)) for dim in dims)
        self._widest = _WIDEST * self._of["embedded"][1][0]

    def add(self, node: _Node) -> bool:
        """Find the shape of a node's result; whether it may be large."""
        if node.output in self._of or node.output in self._numbers or node.output in self._counts:
            raise ValueError(f"{shown(node.output)} is made twice")
        if node.kind in ("Shape", "Sub") or (node.kind == "Add" and node.inputs[0] in self._numbers):
            self._count(node)
            return False
        make = _RULES.get(node.kind)
        found = make(self, node, [self._of.get(name) for name in node.inputs]) if make else None
        size, names = _product(found or ())
        if found is None or names not in _VARYING or (names and size > self._widest):
            raise ValueError(f"{node.kind} of {shown([self._of.get(name) for name in node.inputs])} is none of ours")
        self._of[node.output] = found
        return True

    def _count(self, node: _Node) -> None:
        """Numbers that say nothing but that something else was made before: 0 + dimensions."""
        first, *others = node.inputs
        if node.kind == "Shape" and node.numbers == {"start": 0, "end": 1} and not others and first in self._of:
            self._counts.add(node.output)
        elif node.kind == "Sub" and others == [first] and first in self._counts:
            self._numbers[node.output] = [0]
        elif node.kind == "Add" and len(others) == 1 and self._numbers[first] == [0] and others[0] in self._numbers:
            self._numbers[node.output] = self._numbers[others[0]]
        else:
            raise ValueError(f"{node.kind} of {shown(node.inputs)} is none of ours")

    # --- one rule an operation: the result's shape; None: not in these shapes ---

    def same(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """One array; or several of the same shape."""
        return shapes[0] if shapes and shapes.count(shapes[0]) == len(shapes) else None

    def cast(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """To float32 only."""
        return shapes[0] if node.numbers == {"to": _FLOAT} and len(shapes) == 1 else None

    def norm(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """Along the last dimension."""
        whole, *vectors = shapes
        fits = whole and node.numbers == {"axis": -1} and all(vector == whole[-1:] for vector in vectors)
        return whole if fits else None

    def stored(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """Levels and scales of a weight, and the values of some."""
        return shapes[0] if shapes[0] and _is_fixed(shapes[0]) and None not in shapes else None

    def gather(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """Rows of a table, or tokens."""
        table, places = shapes
        fits = table and len(table) == 2 and places and node.inputs[1] in _PLACES and node.numbers == {"axis": 0}
        return (*places, table[1]) if fits and table and places else None

    def linear(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """x (tokens, in) to (tokens, out)."""
        x, weight, *bias = shapes
        fits = x and weight and _is_fixed(weight) and node.numbers == {"transB": 1} and len(x) == len(weight) == 2
        fits = fits and x is not None and x[0] in ((1, ("tokens",)), (1, ("wanted",)))
        return (x[0], weight[0]) if fits and x and weight and all(one == weight[:1] for one in bias) else None

    def reshape(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """As many numbers; -1, which may stand first, is what the others leave."""
        whole, wanted = shapes[0], self._numbers.get(node.inputs[1])
        if whole is None or not wanted or node.numbers or min(wanted[1:], default=1) < 1:
            return None
        count, names = _product(whole)
        rest = math.prod(wanted[1:])
        first = wanted[0] if wanted[0] != -1 else count // rest
        fits = first > 0 and first * rest == count and (wanted[0] == -1 or not names)
        return ((first, names), *((number, ()) for number in wanted[1:])) if fits else None

    def rotary(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """Of texts in lines, by the tables of angles."""
        lines, heads = shapes[0], node.numbers.get("num_heads")
        fits = lines and len(lines) == 3 and node.inputs[3:] == ["position_ids"] and _heads(lines, heads)
        return lines if fits else None

    def attention(self, node: _Node, shapes: list[Shape | None]) -> Shape | None:
        """Of texts in lines; with a mask, it is `seen`."""
        heads, groups = node.numbers.get("q_num_heads"), node.numbers.get("kv_num_heads")
        lines, (query, key, value), mask = self._of["spread"], shapes[:3], node.inputs[3:]
        known = all(one and len(one) == 3 and one[:2] == lines for one in (query, key, value))
        if not (known and query and key and value and mask in ([], ["seen"]) and heads and groups):
            return None
        if not (_heads(query, heads) and _heads(key, groups) and _heads(value, groups)):
            return None
        return (*lines, (heads * (value[2][0] // groups), ()))


_Rule = Callable[[_Shapes, _Node, list[Shape | None]], Shape | None]
_RULES: Final[Mapping[str, _Rule]] = {
    "Add": _Shapes.same, "Mul": _Shapes.same, "Sigmoid": _Shapes.same, "Gelu": _Shapes.same, "Cast": _Shapes.cast,
    "LayerNormalization": _Shapes.norm, "RMSNormalization": _Shapes.norm, "DequantizeLinear": _Shapes.stored,
    "ScatterElements": _Shapes.stored, "Gather": _Shapes.gather, "Gemm": _Shapes.linear, "Reshape": _Shapes.reshape,
    "RotaryEmbedding": _Shapes.rotary, "Attention": _Shapes.attention,
}  # fmt: skip


def _is(dim: int | str | None, known: str | int | None) -> bool:
    return isinstance(dim, int) if known is None else dim == known


def _is_fixed(shape: Shape) -> bool:
    return not any(names for _, names in shape)


def _product(shape: Shape) -> Dim:
    return math.prod(number for number, _ in shape), tuple(sorted(name for _, names in shape for name in names))


def _heads(shape: Shape, heads: int | None) -> bool:
    """Whether so many heads share the last dimension."""
    width, names = shape[-1]
    return bool(heads) and not names and width % (heads or 1) == 0 and width // (heads or 1) >= _LEAST_HEAD


# --- onnx.proto ---


def _node(data: bytes) -> _Node:
    inputs, outputs, kinds, numbers = list[str](), list[str](), list[str](), dict[str, int]()
    for number, inner in fields(data):
        if number in (1, 2, 4):
            {1: inputs, 2: outputs, 4: kinds}[number].append(message(inner).decode())
        elif number == 5:
            attribute = dict(fields(message(inner)))
            name, value = message(attribute.get(1, b"")).decode(), attribute.get(3)
            if isinstance(value, int) and name not in {"block_size", "is_causal"}:
                numbers[name] = value - (1 << 64) * (value >> 63)
    if len(outputs) != 1 or not all((*inputs, *outputs)) or not inputs:
        raise ValueError(f"{shown(kinds)} has {len(outputs)} results")
    if kinds[-1] in ("DequantizeLinear", "ScatterElements", "Gelu"):
        numbers = {}  # along which axis changes no size
    return _Node(kinds[-1], inputs, outputs[0], numbers)


def _constant(data: bytes) -> tuple[str, list[int]]:
    """The name and the numbers of a list of dimensions."""
    found = dict(fields(data))
    raw = message(found.get(9, b""))
    if len(raw) % 8 or len(raw) > 64:
        raise ValueError("a constant that is no list of dimensions")
    return message(found.get(8, b"")).decode(), [int(number) for number in np.frombuffer(raw, "<i8")]
