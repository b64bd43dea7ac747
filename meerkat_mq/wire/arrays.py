"""Arrays and blobs: byte-shuffled, zstd-compressed, with limits that hold before anything is allocated."""

import struct

import numpy as np
import numpy.typing as npt
import zstandard

from meerkat_mq.core.mask import Mask, matrix_records
from meerkat_mq.errors import BadValue, MaskError, TooLarge, Truncated, UnknownType
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES, Chunk, Header, Want
from meerkat_mq.wire.reader import Reader

MAX_BLOB_BYTES = 256 * 1024 * 1024
MAX_BLOB_WEIGHTS = 2**26  # 256 MiB an array, once decompressed
CHUNKS_A_REPLY = 64
LEVEL = 6
MAX_RATIO = 2**15  # a zstd block makes at most 128 KiB of at least 4 bytes

_DTYPES: dict[int, np.dtype[np.generic]] = {1: np.dtype("<f4"), 2: np.dtype("<u4"), 3: np.dtype("<u2")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PREFIX = struct.Struct("<BII")


def encode_array(array: npt.NDArray[np.generic]) -> bytes:
    """u8 dtype code, u32 count, u32 compressed bytes, then zstd of the bytes, all first bytes first.

    Raises:
        BadValue: not a 1-D array of float32, uint32 or uint16.
    """
    dtype = array.dtype.newbyteorder("<")
    if array.ndim != 1 or dtype not in _CODES:
        raise BadValue("array", f"{array.dtype} of {array.ndim} dimensions has no code")
    planes = np.ascontiguousarray(array, dtype=dtype).view(np.uint8).reshape(array.size, dtype.itemsize).T
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(planes.tobytes())
    return _PREFIX.pack(_CODES[dtype], array.size, len(packed)) + packed


def read_array(reader: Reader, dtype: str, count: int) -> npt.NDArray[np.generic]:
    """Read an array that must have this dtype and count.

    Raises:
        WireError: it has others, is cut short, or does not decompress to exactly its size.
    """
    code, found, length = reader.unpack(_PREFIX)
    if code not in _DTYPES:
        raise UnknownType("array", f"dtype code {code} is unknown")
    if _DTYPES[code] != np.dtype(dtype) or found != count:
        raise BadValue("array", f"is {found} × {_DTYPES[code]}, expected {count} × {dtype}")
    raw = decompress(reader.take(length), count * _DTYPES[code].itemsize)
    planes = np.frombuffer(raw, np.uint8).reshape(_DTYPES[code].itemsize, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(_DTYPES[code])


def decompress(packed: memoryview, size: int) -> bytes:
    """What one zstd frame holds, which must be so many bytes.

    Raises:
        WireError: it is damaged, declares or holds another size, or something is behind it.
    """
    if size > MAX_RATIO * len(packed):
        raise TooLarge("array", f"{size} bytes cannot come of {len(packed)}")
    try:
        declared = zstandard.get_frame_parameters(bytes(packed[:18])).content_size
        if declared != size:
            raise BadValue("array", f"decompresses to {declared} bytes, expected {size}")
        raw: bytes = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadValue("array", f"does not decompress ({error})") from error
    return raw


def encode_mask(mask: Mask) -> bytes:
    """The mask as a blob: u32 header bytes, the mask file's header, then gaps between indices, theta_0 and g_p.

    A gap is counted from the index before it in the same matrix; a matrix's first is the index itself.

    Raises:
        TooLarge: more than 2**26 weights.
    """
    if mask.size > MAX_BLOB_WEIGHTS:
        raise TooLarge("mask", f"{mask.size} weights are more than {MAX_BLOB_WEIGHTS}", "lower the density")
    file = mask.to_bytes()
    head = file[: len(file) - 12 * mask.size]
    gaps = np.concatenate([np.diff(matrix.indices, prepend=np.uint32(0)) for matrix in mask.matrices])
    arrays = (gaps.astype("<u4"), mask.theta_0, mask.g_p)
    return struct.pack("<II", len(head), mask.size) + head + b"".join(map(encode_array, arrays))


def decode_mask(blob: bytes, expected: bytes, weights: int) -> Mask:
    """Decode a mask blob, untrusted, and hold it against the mask hash and n of the run descriptor.

    Raises:
        WireError: the blob is damaged or not the mask asked for.
    """
    reader = Reader(blob)
    head_bytes, size = reader.numbers("I", 2)
    if size != weights:
        raise BadValue("mask", f"has {size} weights, expected {weights}")
    if size > MAX_BLOB_WEIGHTS:
        raise TooLarge("mask", f"{size} weights are more than {MAX_BLOB_WEIGHTS}")
    head = bytes(reader.take(head_bytes))
    gaps, theta_0, g_p = (read_array(reader, dtype, size) for dtype in ("<u4", "<f4", "<f4"))
    reader.end()
    try:
        records, _ = matrix_records(memoryview(head))
        indices = _ungap(gaps, [count for _, _, count in records])
        mask = Mask.from_bytes(head + indices.tobytes() + theta_0.tobytes() + g_p.tobytes())
    except (MaskError, ValueError, struct.error) as error:
        raise BadValue("mask", str(error)) from error
    if mask.hash != expected:
        raise BadValue("mask", f"hash {mask.hash.hex()} is not {expected.hex()}", "fetch it again")
    return mask


def _ungap(gaps: npt.NDArray[np.generic], sizes: list[int]) -> npt.NDArray[np.uint32]:
    if sum(sizes) != gaps.size:
        raise ValueError("matrix sizes do not add up")
    parts = np.split(gaps.astype(np.uint64), np.cumsum(sizes)[:-1])
    indices = np.concatenate([np.cumsum(part, dtype=np.uint64) for part in parts])
    if indices.size and indices.max() >= 2**32:
        raise ValueError("an index is above 2**32")
    return indices.astype("<u4")


def split(header: Header, name: bytes, blob: bytes) -> list[Chunk]:
    """Cut a blob into chunks of at most 64 KiB; `name` is its hash.

    Raises:
        TooLarge: more than 256 MiB.
    """
    if not 0 < len(blob) <= MAX_BLOB_BYTES:
        raise TooLarge("blob", f"{len(blob)} bytes are outside 1…{MAX_BLOB_BYTES}")
    parts = [blob[start : start + MAX_CHUNK_BYTES] for start in range(0, len(blob), MAX_CHUNK_BYTES)]
    return [Chunk(header, name, i, len(parts), len(blob), part) for i, part in enumerate(parts)]


def chunks_of(want: Want, count: int) -> list[int]:
    """Which chunks of a blob of `count` to answer a want with: the lowest 64; who lacks more asks again."""
    return sorted(set(want.chunks) & set(range(count)))[:CHUNKS_A_REPLY]


class Assembly:
    """Puts a blob of known size together from chunks that come in any order, more than once, or not at all."""

    def __init__(self, name: bytes, size: int, count: int) -> None:
        if not 0 < size <= MAX_BLOB_BYTES or count != -(-size // MAX_CHUNK_BYTES):
            raise TooLarge("blob", f"{size} bytes in {count} chunks are out of range")
        self.name = name
        self._size = size
        self._parts: list[bytes | None] = [None] * count

    def add(self, chunk: Chunk) -> bool:
        """Take a chunk; returns whether it lacked before.

        Raises:
            BadValue: it is of another blob, or its length does not fit its place.
        """
        if (chunk.blob, chunk.size, chunk.count) != (self.name, self._size, len(self._parts)):
            raise BadValue("chunk", f"is of another blob than {self.name.hex()}")
        expected = min(MAX_CHUNK_BYTES, self._size - chunk.index * MAX_CHUNK_BYTES)
        if len(chunk.data) != expected:
            raise BadValue("chunk", f"{chunk.index} has {len(chunk.data)} bytes, expected {expected}")
        lacked = self._parts[chunk.index] is None
        self._parts[chunk.index] = chunk.data
        return lacked

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices not there yet."""
        return tuple(i for i, part in enumerate(self._parts) if part is None)

    def join(self) -> bytes:
        """The whole blob; Truncated where chunks are missing."""
        if self.missing:
            raise Truncated("blob", f"lacks {len(self.missing)} of {len(self._parts)} chunks")
        return b"".join(part for part in self._parts if part is not None)
