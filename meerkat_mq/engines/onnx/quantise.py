"""Weights in few bits, in blocks of 32 of a row with a scale each. NumPy only.

A federation trains one base, bit for bit. So what counts is not the checkpoint but the values that the blocks give
back, and making blocks of these again must give the same blocks: then a base that `meerkat bundle --as-base` writes
can be bundled by anybody, and every kind of node computes with the same weights. Hence two rules:

- A scale has 11 significant bits, so that level × scale is exact in float32 for levels of up to 13 bits.
- The largest weight of a block becomes the largest level. Then the scale that is found in the dequantised block is its
  scale: (largest level × scale) ÷ largest level.

Levels are −127…127 (int8) and −7…7 (int4). A block of zeros has scale 1.
"""

from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array

Weights = Literal["float32", "float16", "int8", "int4"]
Int8Array = npt.NDArray[np.int8]

BLOCK: Final = 32
LARGEST: Final = {"int8": 127, "int4": 7}  # levels
_SCALE_BITS = 11
_ROWS = 1024  # at a time: copies in float32 are several times as large as the levels


def blocks_of(columns: int) -> int:
    """Blocks of a row."""
    return -(-columns // BLOCK)


def quantised(values: Float32Array, largest: int) -> tuple[Int8Array, Float32Array]:
    """Levels, int8 (rows, columns), and scales, float32 (rows, blocks), of float32 (rows, columns)."""
    rows, columns = values.shape
    levels = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, blocks_of(columns)), np.float32)
    for part in _parts(rows):
        padded = np.zeros((len(values[part]), scales.shape[1] * BLOCK), np.float32)
        padded[:, :columns] = values[part]
        blocks = padded.reshape(len(padded), -1, BLOCK)
        found = _short(np.abs(blocks).max(axis=2) / np.float32(largest))
        scales[part] = np.where(found == 0, np.float32(1), found)
        nearest = np.rint(blocks / scales[part][:, :, None]).clip(-largest, largest)
        levels[part] = nearest.astype(np.int8).reshape(len(padded), -1)[:, :columns]
    return levels, scales


def dequantised(levels: Int8Array, scales: Float32Array) -> Float32Array:
    """Level × scale, float32 (rows, columns): what a bundle's graph computes, exactly."""
    values = np.empty(levels.shape, np.float32)
    for part in _parts(len(levels)):
        wide = np.repeat(scales[part], BLOCK, axis=1)[:, : levels.shape[1]]
        np.multiply(levels[part], wide, out=values[part], dtype=np.float32)
    return values


def _parts(rows: int) -> Iterator[slice]:
    return (slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS))


def _short(values: Float32Array) -> Float32Array:
    """Rounded to so few significant bits; the smallest become zero."""
    mantissa, exponent = np.frexp(values)
    short = np.ldexp(np.rint(np.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS).astype(np.float32)
    return np.where(short < np.finfo(np.float32).tiny * 2**_SCALE_BITS, np.float32(0), short)
