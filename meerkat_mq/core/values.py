"""Displacements of values nodes: what a codec keeps of one, their mean, and what an encoding leaves for the next.

What a codec keeps is made element by element in float32, and the mean in float64: the bits are the same everywhere
(protocol/SPECIFICATION.md, section 5).
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.errors import BadValue

BLOCK = 128  # values that share a scale
LARGEST_CODE = 127
SMALLEST_SCALE = np.float32(2.0**-126)  # below it some processors flush to zero, and others do not
LARGEST_SCALE = np.float32(float.fromhex("0x1.020406p121"))  # the largest whose product with 127 is finite

Parts = tuple[npt.NDArray[np.generic], ...]


def quantise(values: Float32Array, codec: Codec) -> Parts:
    """The arrays that a codec keeps of values.

    - float32: the values.
    - bfloat16: uint16 (n,), the upper halves of their bits, rounded to nearest, ties to even; never to infinity.
    - int8: int8 (n,), rint(x / scale) within ±127, and float32 (⌈n / 128⌉,), the scales: largest |x| of a block / 127,
      or 0 where that is below 2**-126, and so are its codes.

    They are float32 (n,), finite.
    """
    match codec:
        case "float32":
            return (values,)
        case "bfloat16":
            bits = values.view(np.uint32)
            halves = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return (np.where(halves & 0x7FFF == 0x7F80, halves - np.uint16(1), halves),)
        case "int8":
            return _blocks(values)


def dequantise(parts: Parts, codec: Codec) -> Float32Array:
    """What the arrays of `quantise` stand for: float32 (n,)."""
    match codec:
        case "float32":
            return np.asarray(parts[0], dtype=np.float32)
        case "bfloat16":
            return (parts[0].astype(np.uint32) << 16).view(np.float32)
        case "int8":
            codes, scales = parts[0].astype(np.float32), np.asarray(parts[1], dtype=np.float32)
            return np.multiply(codes, np.repeat(scales, BLOCK)[: codes.size], out=codes)


def quantised(values: Float32Array, codec: Codec) -> Float32Array:
    """What an encoding of values decodes to: float32 (n,)."""
    return dequantise(quantise(values, codec), codec)


def _blocks(values: Float32Array) -> Parts:
    padded = np.zeros((-(-values.size // BLOCK), BLOCK), dtype=np.float32)
    padded.reshape(-1)[: values.size] = values
    scales = np.abs(padded).max(axis=1) / np.float32(LARGEST_CODE)
    scales = np.where(scales < SMALLEST_SCALE, np.float32(0), np.minimum(scales, LARGEST_SCALE))
    codes = np.divide(padded, np.where(scales > 0, scales, np.float32(1))[:, None], out=padded)
    np.clip(np.rint(codes, out=codes), -LARGEST_CODE, LARGEST_CODE, out=codes)
    return codes.reshape(-1)[: values.size].astype(np.int8), scales


def mean_displacement(parts: Iterable[tuple[float, Float32Array]], size: int) -> Float32Array:
    """float32(Σ weight · values), added up in the order given, in float64, each product and each sum rounded.

    Args:
        parts: (weight, float32 (n,)) each, finite; the weights' sum is at most 1.
        size: n.

    Raises:
        BadValue: the result is not finite.
    """
    total, product = np.zeros(size, dtype=np.float64), np.empty(size, dtype=np.float64)
    for weight, values in parts:
        np.multiply(values, weight, out=product, dtype=np.float64)
        np.add(total, product, out=total)
    with np.errstate(over="ignore"):
        mean = total.astype(np.float32)
    if not np.isfinite(mean).all():
        raise BadValue("mean displacement", "is not finite")
    return mean


class Residual:
    """Error feedback: what the encodings of acknowledged updates rounded away, added to the next displacement.

    As in Seide et al. (2014) and Karimireddy et al. (arXiv 1901.09847). It is kept in memory only: a node that starts
    again loses at most one update's rounding.
    """

    def __init__(self, codec: Codec, size: int) -> None:
        self._codec = codec
        self._left: Float32Array = np.zeros(size, dtype=np.float32)
        self._sent: dict[int, tuple[Float32Array, Float32Array]] = {}

    def add(self, version: int, displacement: Float32Array) -> Float32Array:
        """What to encode for this displacement, from theta of `version`: float32 (n,)."""
        wanted = displacement + self._left
        self._sent[version] = self._left, wanted - quantised(wanted, self._codec)
        return wanted

    def forget(self, version: int, *, heard: bool) -> None:
        """Settle an update. If it was acknowledged, what its encoding rounded away goes into the next displacement."""
        before, after = self._sent.pop(version, (self._left, self._left))
        if heard:
            self._left = after if before is self._left else self._left + (after - before)
