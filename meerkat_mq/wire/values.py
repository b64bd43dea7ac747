"""The values blob: a displacement as a codec keeps it (protocol/SPECIFICATION.md, section 5)."""

import struct
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import zstandard

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import short_hash
from meerkat_mq.core.values import BLOCK, LARGEST_CODE, LARGEST_SCALE, SMALLEST_SCALE, Parts, dequantise, quantise
from meerkat_mq.errors import BadMagic, BadValue, TooLarge, UnknownType, within
from meerkat_mq.wire.arrays import LEVEL, MAX_BLOB_WEIGHTS, decompress
from meerkat_mq.wire.reader import Reader

MAGIC = b"MKVALS\x01\n"
_HEAD = struct.Struct("<8sBI")
_CODECS: dict[int, Codec] = {1: "float32", 2: "bfloat16", 3: "int8"}
_WORTH_A_BLOCK = 256  # bytes
_SMALL_BLOB = 256  # bytes
_WAYS = (
    zstandard.ZstdCompressionParameters.from_level(LEVEL),
    zstandard.ZstdCompressionParameters.from_level(1, strategy=zstandard.STRATEGY_FAST, min_match=7),
)
_CODES = {codec: code for code, codec in _CODECS.items()}
_ARRAYS: dict[Codec, tuple[tuple[str, int], ...]] = {  # dtype, and how many values an element is for
    "float32": (("<f4", 1),),
    "bfloat16": (("<u2", 1),),
    "int8": (("|i1", 1), ("<f4", BLOCK)),
}


def largest_blob(weights: int) -> int:
    """Bytes that no values blob of so many weights exceeds."""
    return 5 * weights + 2**16


def encode_values(values: Float32Array, codec: Codec) -> bytes:
    """Magic, u8 codec, u32 n, then one zstd frame: the arrays of `core.values.quantise`, all first bytes first.

    Raises:
        BadValue: a value is not finite.
        TooLarge: more than 2**26 values.
    """
    if values.size > MAX_BLOB_WEIGHTS:
        raise TooLarge("values", f"{values.size} are more than {MAX_BLOB_WEIGHTS}", "lower the density")
    if not np.isfinite(values).all():
        raise BadValue("values", "are not all finite")
    return _HEAD.pack(MAGIC, _CODES[codec], values.size) + _compress(quantise(values, codec))


def _compress(parts: Parts) -> bytes:
    """The smaller of two frames: in hundreds of values, short repetitions cost more than they save."""
    arrays = [np.ascontiguousarray(part).view(np.uint8).reshape(part.size, part.itemsize) for part in parts]
    planes = [plane.tobytes() for array in arrays for plane in array.T]
    return min((_pack(planes, way) for way in _WAYS), key=len)


def _pack(planes: list[bytes], way: zstandard.ZstdCompressionParameters) -> bytes:
    """A zstd block begins with each plane of bytes, which has its own statistics: 5 % less where n is small."""
    compressor = zstandard.ZstdCompressor(compression_params=way).compressobj(size=sum(map(len, planes)))
    packed = [compressor.compress(planes[0])]
    for plane in planes[1:]:
        if len(plane) >= _WORTH_A_BLOCK:
            packed.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        packed.append(compressor.compress(plane))
    return b"".join(packed) + compressor.flush()


def decode_values(blob: bytes, name: bytes | None, weights: int) -> Float32Array:
    """Decode a values blob, untrusted, and hold it against its hash and the run's size: float32 (n,), finite.

    Args:
        name: 16 bytes, the blob's hash; None where it was not named.
        weights: n of the run.

    Raises:
        WireError: the blob is damaged, or not the one asked for.
    """
    return (_known if len(blob) <= _SMALL_BLOB else _decoded)(blob, name, weights)


@lru_cache(maxsize=256)  # all nodes of a simulated federation decode the same
def _known(blob: bytes, name: bytes | None, weights: int) -> Float32Array:
    values = _decoded(blob, name, weights)
    values.flags.writeable = False
    return values


def _decoded(blob: bytes, name: bytes | None, weights: int) -> Float32Array:
    if len(blob) > largest_blob(weights) or weights > MAX_BLOB_WEIGHTS:
        raise TooLarge("values", f"{len(blob)} bytes for {weights} weights")
    if name is not None and short_hash(blob) != name:
        raise BadValue("values", f"hash {short_hash(blob).hex()} is not {name.hex()}", "fetch it again")
    reader = Reader(blob)
    magic, code, size = reader.unpack(_HEAD)
    if magic != MAGIC:
        raise BadMagic("values", f"start with {magic.hex()}, not {MAGIC.hex()}")
    if code not in _CODECS:
        raise UnknownType("values", f"codec {code} is unknown")
    if size != weights:
        raise BadValue("values", f"are {size}, expected {weights}")
    codec = _CODECS[code]
    arrays = [(np.dtype(dtype), -(-size // each)) for dtype, each in _ARRAYS[codec]]
    with within("values"):
        parts = _decompress(reader.take(reader.left), arrays)
    if codec == "int8":
        _check_blocks(parts)
    values = dequantise(parts, codec)
    if not np.isfinite(values).all():
        raise BadValue("values", "are not all finite")
    return values


def _decompress(packed: memoryview, arrays: list[tuple[np.dtype[np.generic], int]]) -> Parts:
    raw = np.frombuffer(decompress(packed, sum(count * dtype.itemsize for dtype, count in arrays)), np.uint8)
    parts: list[npt.NDArray[np.generic]] = []
    start = 0
    for dtype, count in arrays:
        planes = raw[start : start + count * dtype.itemsize].reshape(dtype.itemsize, count)
        parts.append(np.ascontiguousarray(planes.T).reshape(-1).view(dtype))
        start += planes.size
    return tuple(parts)


def _check_blocks(parts: Parts) -> None:
    codes, scales = np.asarray(parts[0], dtype=np.int8), np.asarray(parts[1], dtype=np.float32)
    if codes.min() < -LARGEST_CODE:
        raise BadValue("values", f"a code is below -{LARGEST_CODE}")
    if not ((scales == 0) | ((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE))).all():
        raise BadValue("values", "a scale is neither 0 nor from 2**-126 to the largest")
