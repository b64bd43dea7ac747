"""The toy engine (SPECIFICATION.md, section 7)."""

import hashlib
import struct
from collections.abc import Sequence

from protocol.reference.core import MASK64, float32, philox


def batch_rows(run_id: bytes, node: str, rows: int, batch_size: int, step: int) -> list[int]:
    """Row numbers of a node's local step."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _permutation(run_id, node, rows, epoch) for epoch in {place // rows for place in places}}
    return [orders[place // rows][place % rows] for place in places]


def _permutation(run_id: bytes, node: str, rows: int, epoch: int) -> list[int]:
    key = hashlib.sha256(run_id + node.encode() + struct.pack("<I", epoch)).digest()[:8]
    seed = int.from_bytes(key, "little") & MASK64
    words = [word for block in range(1, rows // 4 + 2) for word in philox(block, (seed, 0))]
    return sorted(range(rows), key=lambda row: words[row])


def loss(theta: Sequence[float], target: Sequence[float]) -> float:
    """½·mean((theta − target)²)."""
    squares = [float32(t - goal) ** 2 for t, goal in zip(theta, target, strict=True)]
    return float32(0.5 * (sum(squares) / len(squares)))


def projected_gradient(
    theta: Sequence[float], z: Sequence[float], eps: float, targets: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """(g, mean loss of both points)."""
    shift = [float32(value * eps) for value in z]
    means = []
    for sign in (1, -1):
        point = [float32(t + sign * s) for t, s in zip(theta, shift, strict=True)]
        means.append(sum(loss(point, target) for target in targets) / len(targets))
    return float32((means[0] - means[1]) / (2 * eps)), sum(means) / 2
