"""GradIP: the inner product of the pre-training gradient and a node's step (specification, section 2).

The ledger keeps ⟨g_p, z⟩ of each direction, so its sum has one order, the same on every machine.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import seeds_of

Float64Array = npt.NDArray[np.float64]
LARGEST = float(np.finfo(np.float32).max)


def tree_sum(values: Float64Array) -> float:
    """The sum in float64, halves added to halves: `values` is padded with zeros to a power of two, then folded.

    They are float64 (m,), m ≥ 1, and overwritten.
    """
    count = values.size
    while count > 1:
        half = 1 << ((count - 1).bit_length() - 1)
        values[: count - half] += values[half:count]
        count = half
    return float(values[0])


def root_mean_square(values: Float32Array) -> float:
    """√(Σ x² / n) in float64, exact squares by `tree_sum`: the same bits everywhere; float32 (n,), n ≥ 1."""
    return math.sqrt(tree_sum(np.square(values, dtype=np.float64)) / values.size)


def inner_product(g_p: Float32Array, z: Float32Array) -> float:
    """⟨g_p, z⟩: exact products in float64, `tree_sum`, rounded once to float32; float32 (n,) each.

    Beyond float32 it is the largest float32 of its sign, and a zero is +0: what the ledger keeps is finite.
    """
    total = tree_sum(np.multiply(g_p, z, dtype=np.float64))
    return float(np.float32(min(max(total, -LARGEST), LARGEST))) + 0.0


def inner_products(
    g_p: Float32Array, run_id: bytes, version: int, *, lanes: int, steps: int, stream: str
) -> tuple[tuple[float, ...], ...]:
    """⟨g_p, z⟩ of every direction of a round, by lane and step; each exactly a float32.

    Args:
        g_p: float32 (n,), the mean signed pre-training gradient on the mask.
        steps: directions a lane.
    """
    return by_lane(tuple(each_inner_product(g_p, run_id, version, lanes=lanes, steps=steps, stream=stream)), lanes)


def each_inner_product(
    g_p: Float32Array, run_id: bytes, version: int, *, lanes: int, steps: int, stream: str
) -> Iterator[float]:
    """The same one by one, lane after lane: each is computed when it is asked for."""
    for lane in range(lanes):
        for seed in seeds_of(run_id, version, lane, steps):
            yield inner_product(g_p, direction(stream, seed, 0, g_p.size))


def by_lane(values: tuple[float, ...], lanes: int) -> tuple[tuple[float, ...], ...]:
    """Values that stand lane after lane, as many a lane, by lane and step; no lanes give ()."""
    steps = len(values) // max(lanes, 1)
    return tuple(values[lane * steps : (lane + 1) * steps] for lane in range(lanes))


def gradip(scalars: Sequence[float], products: Sequence[float]) -> tuple[float, ...]:
    """GradIP_k^t = ⟨g_p, g_k^t·z_t⟩ = g_k^t·⟨g_p, z_t⟩ of each step of a node's path, MEERKAT (arXiv 2506.03337)."""
    return tuple(scalar * product for scalar, product in zip(scalars, products, strict=False))
