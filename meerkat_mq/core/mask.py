"""The mask: which weights are trained, where they start, and the pre-training gradient on them.

The mask file is also where every replay starts: it holds theta_0 and the base's fingerprint, so neither torch nor the
checkpoint is needed to rebuild a model. Layout: protocol/SPECIFICATION.md, section 3.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.foreign import read_regular
from meerkat_mq.core.gradip import root_mean_square
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import MaskError

MAGIC = b"MKMASK\x01\n"
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8
MAX_MATRICES = 65536
MAX_WEIGHTS = 2**31

UInt32Array = npt.NDArray[np.uint32]

_DTYPES = (np.dtype("<u4"), np.dtype("<f4"), np.dtype("<f4"))


@dataclass(frozen=True, eq=False)
class MaskedMatrix:
    """The masked weights of one matrix."""

    name: str  # as in the model's `named_parameters()`
    shape: tuple[int, ...]  # the whole matrix
    indices: UInt32Array  # uint32 (k,), strictly ascending positions in the flattened matrix
    theta_0: Float32Array  # float32 (k,), the weights before training
    g_p: Float32Array  # float32 (k,), the mean signed pre-training gradient

    def __post_init__(self) -> None:
        """Refuse, as MaskError, anything that is not a mask of this matrix."""
        size = int(np.prod(self.shape, dtype=object)) if self.shape else 0
        if not self.name or len(self.name.encode()) > MAX_NAME_BYTES or not 1 <= len(self.shape) <= MAX_DIMENSIONS:
            raise MaskError(self.name or "matrix", f"name or shape {self.shape} is out of bounds")
        if not 0 < size < 2**32:
            raise MaskError(self.name, f"{size} weights are outside 1…2**32 − 1")
        if (self.indices.dtype, self.theta_0.dtype, self.g_p.dtype) != _DTYPES or self.indices.ndim != 1:
            raise MaskError(self.name, "indices, theta_0 and g_p are not 1-D uint32, float32 and float32")
        if not self.indices.shape == self.theta_0.shape == self.g_p.shape != (0,):
            raise MaskError(self.name, "indices, theta_0 and g_p differ in length or are empty")
        ascending = self.indices.size == 1 or bool(np.all(self.indices[1:] > self.indices[:-1]))
        if not ascending or int(self.indices[-1]) >= size:
            raise MaskError(self.name, "indices are not strictly ascending within the matrix")
        if not (np.isfinite(self.theta_0).all() and np.isfinite(self.g_p).all()):
            raise MaskError(self.name, "theta_0 or g_p is not finite", "check the checkpoint for NaN and infinities")


@dataclass(frozen=True, eq=False)
class Mask:
    """All masked matrices, ordered by the bytes of their names, and the base that they belong to."""

    matrices: tuple[MaskedMatrix, ...]  # the mask order is matrix by matrix, then ascending index
    fingerprint: bytes  # 32 bytes, the base checkpoint's
    tokenizer_fingerprint: bytes  # 32 bytes
    size: int = field(init=False)

    def __post_init__(self) -> None:
        """Refuse, as MaskError, what has no single mask order."""
        names = [matrix.name.encode() for matrix in self.matrices]
        if not 1 <= len(names) <= MAX_MATRICES or any(a >= b for a, b in pairwise(names)):
            raise MaskError("mask", "matrices are missing, doubled or not ordered by name")
        if len(self.fingerprint) != 32 or len(self.tokenizer_fingerprint) != 32:
            raise MaskError("mask", "a fingerprint is not 32 bytes")
        object.__setattr__(self, "size", sum(matrix.indices.size for matrix in self.matrices))
        if self.size > MAX_WEIGHTS:
            raise MaskError("mask", f"{self.size} weights are more than {MAX_WEIGHTS}", "lower the density")

    @property
    def theta_0(self) -> Float32Array:
        """A fresh float32 (n,) in mask order."""
        return np.concatenate([matrix.theta_0 for matrix in self.matrices])

    @property
    def g_p(self) -> Float32Array:
        """A fresh float32 (n,) in mask order."""
        return np.concatenate([matrix.g_p for matrix in self.matrices])

    @cached_property
    def hash(self) -> bytes:
        """The mask hash: first 16 bytes of SHA-256 over the mask file."""
        return short_hash(self.to_bytes())

    @cached_property
    def scale(self) -> float:
        """The size of a weight: the root mean square of those of theta_0 that are not zero; 1 where all are."""
        theta_0 = self.theta_0
        weights = theta_0[theta_0 != 0]
        return root_mean_square(weights) if weights.size else 1.0

    @property
    def covered(self) -> int:
        """Number of weights in the matrices that the mask touches."""
        return sum(int(np.prod(matrix.shape)) for matrix in self.matrices)

    def slices(self) -> Iterator[tuple[MaskedMatrix, slice]]:
        """Each matrix with its place in theta."""
        start = 0
        for matrix in self.matrices:
            yield matrix, slice(start, start + matrix.indices.size)
            start += matrix.indices.size

    def to_bytes(self) -> bytes:
        """The mask file: header, a record a matrix, then all indices, all theta_0, all g_p."""
        parts = [MAGIC, self.fingerprint, self.tokenizer_fingerprint, struct.pack("<I", len(self.matrices))]
        for matrix in self.matrices:
            name, shape = matrix.name.encode(), matrix.shape
            parts += [struct.pack(f"<HBI{len(shape)}I", len(name), len(shape), matrix.indices.size, *shape), name]
        for array, dtype in (("indices", "<u4"), ("theta_0", "<f4"), ("g_p", "<f4")):
            parts += [getattr(matrix, array).astype(dtype).tobytes() for matrix in self.matrices]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Mask":
        """Decode a mask file.

        Raises:
            MaskError: the bytes are not a mask file of this version, cut short, or not canonical.
        """
        try:
            return _decode(memoryview(data))
        except (struct.error, ValueError, IndexError) as error:
            raise MaskError("mask file", f"cannot be decoded ({error})", "make or fetch it again") from error

    @classmethod
    def whole(cls, weights: Mapping[str, npt.ArrayLike]) -> "Mask":
        """A mask of every weight of a small model: no pre-training gradient, and no checkpoint's fingerprint.

        The weights, float32 of any shape by name, are theta_0.

        Raises:
            MaskError: there are none, or they are not finite.
        """
        matrices = list[MaskedMatrix]()
        for name, values in sorted(weights.items(), key=lambda item: item[0].encode()):
            array = np.asarray(values, np.float32)
            indices = np.arange(array.size, dtype=np.uint32)
            matrices.append(MaskedMatrix(name, array.shape, indices, array.flatten(), np.zeros(array.size, np.float32)))
        return cls(tuple(matrices), bytes(32), bytes(32))

    def save(self, path: Path) -> None:
        """Write the mask file, whole or not at all."""
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> "Mask":
        """Read a mask file.

        Raises:
            MaskError: it is missing, unreadable or damaged; the message names the file.
        """
        try:
            return cls.from_bytes(read_regular(path))
        except OSError as error:
            raise MaskError(str(path), f"cannot be read ({error.strerror})", "make one with `meerkat mask`") from error
        except MaskError as error:
            raise MaskError(f"{path}: {error.where}", error.problem, error.remedy) from error


def matrix_records(data: memoryview) -> tuple[list[tuple[str, tuple[int, ...], int]], int]:
    """The (name, shape, masked weights) records of a mask file's header, and where the header ends.

    Raises:
        MaskError: not a mask file, or more matrices than the limit.
        struct.error, ValueError: cut short.
    """
    if data[:8] != MAGIC:
        raise MaskError("mask file", "is not a mask file of this version", "make it again with `meerkat mask`")
    (count,) = struct.unpack_from("<I", data, 72)
    if count > MAX_MATRICES:
        raise MaskError("mask file", f"{count} matrices are more than {MAX_MATRICES}")
    offset, records = 76, []
    for _ in range(count):
        name_bytes, dimensions, size = struct.unpack_from("<HBI", data, offset)
        shape = struct.unpack_from(f"<{dimensions}I", data, offset + 7)
        offset += 7 + 4 * dimensions
        records.append((bytes(data[offset : offset + name_bytes]).decode(), shape, size))
        offset += name_bytes
    return records, offset


def _decode(data: memoryview) -> Mask:
    records, offset = matrix_records(data)
    total = sum(size for _, _, size in records)
    if len(data) != offset + 12 * total:
        raise MaskError("mask file", f"{len(data)} bytes instead of {offset + 12 * total}", "make or fetch it again")
    indices = np.frombuffer(data, "<u4", total, offset)
    theta_0 = np.frombuffer(data, "<f4", total, offset + 4 * total)
    g_p = np.frombuffer(data, "<f4", total, offset + 8 * total)
    matrices, start = [], 0
    for name, shape, size in records:
        part = slice(start, start + size)
        matrices.append(MaskedMatrix(name, shape, indices[part], theta_0[part], g_p[part]))
        start += size
    return Mask(tuple(matrices), bytes(data[8:40]), bytes(data[40:72]))
