"""Arrays and values blobs (SPECIFICATION.md, section 5). Both need the package zstandard."""

import math
import struct

from protocol.reference import core
from protocol.reference.core import Refused
from protocol.reference.frames import Bytes, need

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

AVAILABLE = zstandard is not None

DTYPES = {"float32": (1, 4), "uint32": (2, 4), "uint16": (3, 2)}
CODECS = {"float32": 1, "bfloat16": 2, "int8": 3}
BLOCK = 128
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, float.fromhex("0x1.020406p121")


def array(body: Bytes, dtype: str, count: int) -> bytes:
    """The elements' bytes."""
    code, width = DTYPES[dtype]
    found, elements, length = body.read("<BII")
    need(1 <= found <= len(DTYPES), "UnknownType")
    need((found, elements) == (code, count))
    return unshuffled(decompress(body.take(length), width * count), count)


def decompress(packed: bytes, size: int) -> bytes:
    """One zstd frame of so many bytes, nothing behind it."""
    need(size <= 2**15 * len(packed), "TooLarge")
    try:
        need(zstandard.get_frame_parameters(packed).content_size == size)
        raw: bytes = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refused("BadValue") from error
    return raw


def unshuffled(planes: bytes, count: int) -> bytes:
    """Elements of all their first bytes, then all their second bytes, and so on."""
    return b"".join(planes[i::count] for i in range(count))


def parts(blob: bytes, codec: str, count: int) -> tuple[bytes, ...]:
    """The arrays of a values blob: elements' bytes."""
    blocks = -(-count // BLOCK)
    size = {"float32": 4 * count, "bfloat16": 2 * count, "int8": count + 4 * blocks}[codec]
    raw = decompress(blob[13:], size)
    if codec == "int8":
        return raw[:count], unshuffled(raw[count:], blocks)
    return (unshuffled(raw, count),)


def decode(blob: bytes, name: bytes, count: int) -> list[float]:
    """What a values blob of this hash stands for."""
    need(len(blob) <= 5 * count + 2**16, "TooLarge")
    need(core.short_hash(blob) == name)
    magic, code, size = Bytes(blob).read("<8sBI")
    need(magic == b"MKVALS\x01\n", "BadMagic")
    need(code in CODECS.values(), "UnknownType")
    need(size == count)
    codec = next(codec for codec, number in CODECS.items() if number == code)
    kept = parts(blob, codec, count)
    if codec == "float32":
        values = core.floats(kept[0])
    elif codec == "bfloat16":
        values = core.floats(struct.pack(f"<{count}I", *(half << 16 for half in struct.unpack(f"<{count}H", kept[0]))))
    else:
        codes, scales = struct.unpack(f"<{count}b", kept[0]), core.floats(kept[1])
        need(min(codes) >= -127 and all(s == 0 or SMALLEST_SCALE <= s <= LARGEST_SCALE for s in scales))
        values = [core.float32(code * scales[j // BLOCK]) for j, code in enumerate(codes)]
    need(all(map(math.isfinite, values)))
    return values


def quantise(values: list[float], codec: str) -> tuple[bytes, ...]:
    """The arrays that a codec keeps of values."""
    if codec == "float32":
        return (core.packed(values),)
    if codec == "bfloat16":
        return (b"".join(struct.pack("<H", _upper_half(value)) for value in values),)
    codes, scales = b"", list[float]()
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        scale = core.float32(max(map(abs, block)) / 127)
        scale = 0.0 if scale < SMALLEST_SCALE else min(scale, LARGEST_SCALE)
        codes += struct.pack(f"<{len(block)}b", *(_code(value, scale) for value in block))
        scales.append(scale)
    return codes, core.packed(scales)


def _upper_half(value: float) -> int:
    """To nearest, ties to even; never to infinity."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    half = int(bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return half - 1 if half & 0x7FFF == 0x7F80 else half


def _code(value: float, scale: float) -> int:
    """`round` is to nearest, ties to even."""
    return max(-127, min(127, round(core.float32(value / (scale or 1.0)))))
