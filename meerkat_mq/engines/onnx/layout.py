"""The weights file of a bundle, read piece by piece: it is mapped into memory, or read where it is needed.

It is a safetensors file. A linear weight is one tensor (F32, F16), or levels (I8, or U8 with two a byte) and scales.
"""

import math
import mmap
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.foreign import open_regular
from meerkat_mq.engines.onnx.quantise import BLOCK, Weights, blocks_of
from meerkat_mq.engines.torch.checkpoint import StoredTensor, tensors_in
from meerkat_mq.errors import ModelError, cut

SCALE: Final = ".scale"  # after a weight's name
THETA: Final = "theta:"  # before it: the graph's inputs for theta and its places
INDICES: Final = "indices:"

AGAIN: Final = "make the bundle again with `meerkat bundle`, or copy it again"

Shape = tuple[int, ...]

_DTYPES: Final = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}
_FORMAT: Final = {"float32": "F32", "float16": "F16", "int8": "I8", "int4": "U8"}


class WeightsFile:
    """All tensors of a bundle's weights file.

    Raises:
        ModelError: it is damaged, or a tensor is not of this layout.
    """

    def __init__(self, file: Path, weights: Weights) -> None:
        self._file = file
        self._weights = weights
        self._tensors = {tensor.name: tensor for tensor in tensors_in(file)}
        with open_regular(file) as stream:
            self.descriptor = os.dup(stream.fileno())
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def stored(self, name: str, dtype: str, shape: Shape) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            ModelError: there is none of this name and format with as many numbers.
        """
        found = self._tensors.get(name)
        if found is None or (found.dtype, math.prod(found.shape)) != (dtype, math.prod(shape)):
            what = "is missing" if found is None else f"is {found.dtype} {found.shape}"
            raise ModelError(f"{self._file}: {cut(name)}", f"{what}, not {dtype} {shape}", AGAIN)
        return found

    def close(self) -> None:
        """Close the file; the map goes with the last array of it."""
        os.close(self.descriptor)

    def array(self, name: str, dtype: str, shape: Shape) -> npt.NDArray[Any]:
        """A tensor, mapped: read only, in memory only as far as it was looked at."""
        stored = self.stored(name, dtype, shape)
        count = stored.size // np.dtype(_DTYPES[dtype]).itemsize
        return np.frombuffer(self._map, _DTYPES[dtype], count, stored.start).reshape(shape)

    def linear(self, name: str, shape: Shape) -> npt.NDArray[Any]:
        """A weight (rows, columns) as it is stored, mapped: what the graph takes."""
        return self.array(name, _FORMAT[self._weights], self._packed(shape))

    def scale(self, name: str, shape: Shape) -> Float32Array:
        """The scales of a weight (rows, columns), mapped."""
        return self.array(name + SCALE, "F32", (shape[0], blocks_of(shape[1])))

    def _packed(self, shape: Shape) -> Shape:
        return ((shape[0] * shape[1] + 1) // 2,) if self._weights == "int4" else shape

    def values(self, name: str, shape: Shape, places: npt.NDArray[np.int64]) -> Float32Array:
        """Some values of a weight, float32, by their places in the flattened matrix."""
        stored = self.linear(name, shape).reshape(-1)
        if self._weights in ("float32", "float16"):
            found: Float32Array = stored[places].astype(np.float32)
            return found
        if self._weights == "int4":
            nibbles = (stored[places // 2] >> (places % 2 * 4).astype(np.uint8)) & 15
            levels = ((nibbles ^ 8).astype(np.int8) - 8).astype(np.float32)
        else:
            levels = stored[places].astype(np.float32)
        rows, columns = places // shape[1], places % shape[1]
        values: Float32Array = levels * self.scale(name, shape)[rows, columns // BLOCK]
        return values


class Rows:
    """A table of which rows are looked up, such as embeddings: read from the file, so that none of it stays in memory.

    It has four bits at the least where linear weights have: those are kept as int8.
    """

    def __init__(self, file: WeightsFile, name: str, shape: Shape, weights: Weights) -> None:
        self.shape = shape
        self._name = name
        kind: Weights = "int8" if weights == "int4" else weights
        self._dtype = np.dtype(_DTYPES[_FORMAT[kind]])
        self._stored = file.stored(name, _FORMAT[kind], shape)
        self._scale = file.stored(name + SCALE, "F32", (shape[0], blocks_of(shape[1]))) if kind == "int8" else None
        self._descriptor = file.descriptor

    def at(self, ids: npt.NDArray[np.int64]) -> Float32Array:
        """Float32 (*ids.shape, columns)."""
        found, where = np.unique(ids, return_inverse=True)
        if found.size and found[-1] >= self.shape[0]:  # behind the table lies another tensor
            raise ModelError(self._name, f"has {self.shape[0]} rows, and the tokenizer gives id {found[-1]}", AGAIN)
        rows = np.concatenate([self.part(int(first), 1) for first in found])
        return rows[where.reshape(ids.shape)]

    def part(self, first: int, count: int) -> Float32Array:
        """Rows from the `first` on, float32 (count, columns)."""
        values = self._read(self._stored, self._dtype, first, count)
        if self._scale is None:
            return values.astype(np.float32)
        scale = self._read(self._scale, np.dtype(np.float32), first, count)
        wide: Float32Array = np.multiply(values, np.repeat(scale, BLOCK, axis=1)[:, : self.shape[1]], dtype=np.float32)
        return wide

    def _read(self, stored: StoredTensor, dtype: np.dtype[Any], first: int, count: int) -> npt.NDArray[Any]:
        columns = stored.size // dtype.itemsize // self.shape[0]
        width = columns * dtype.itemsize
        data = os.pread(self._descriptor, count * width, stored.start + first * width)
        return np.frombuffer(data, dtype).reshape(count, columns)
