"""Directions, seeds, coefficients, theta, hashes and the mask file (SPECIFICATION.md, sections 1 to 3)."""

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist
from typing import Any

MASK64 = 2**64 - 1


class Refused(Exception):
    """Bytes that are not of this protocol; the argument is the error's name."""


def float32(value: float) -> float:
    """Round to float32, ties to even; overflow gives an infinity."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def floats(data: bytes) -> list[float]:
    """Little-endian float32 bytes as numbers."""
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def packed(values: Sequence[float]) -> bytes:
    """Numbers as little-endian float32 bytes."""
    return struct.pack(f"<{len(values)}f", *values)


def short_hash(data: bytes) -> bytes:
    """First 16 bytes of SHA-256."""
    return hashlib.sha256(data).digest()[:16]


# Section 1


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """One block of Philox4x64-10: four words."""
    c = [counter >> 64 * i & MASK64 for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [high >> 64 ^ c[1] ^ k0, high & MASK64, low >> 64 ^ c[3] ^ k1, low & MASK64]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK64, k1 + 0xBB67AE8584CAA73B & MASK64
    return c


def quantile(i: int) -> float:
    """Entry i of the table Q."""
    return float32(NormalDist().inv_cdf((i + 0.5) / 65536) / float.fromhex("0x1.fffeabbbd59e9p-1"))


def direction(stream: str, seed: int, start: int, stop: int) -> Iterator[float]:
    """Values start … stop-1."""
    bits = {"mk1": 16, "rademacher": 1}[stream]
    in_block = 256 // bits
    at, block = -1, 0
    for j in range(start, stop):
        if j // in_block != at:
            at = j // in_block
            words = philox(1 + at, (seed, 0))
            block = sum(word << 64 * i for i, word in enumerate(words))
        i = block >> bits * (j % in_block) & (1 << bits) - 1
        yield quantile(i) if stream == "mk1" else 2.0 * i - 1.0


# Section 2


def seed_for(run_id: bytes, version: int, lane: int, step: int) -> int:
    """Seed of a local step."""
    return int.from_bytes(hashlib.sha256(run_id + struct.pack("<III", version, lane, step)).digest()[:8], "little")


def coefficient(lr: float, scalars: Iterable[tuple[int, float]], total_weight: int) -> float:
    """Each product is rounded to float64 (exact up to n = 2^24), and so is their exact sum."""
    exact = sum((Fraction(n * g) for n, g in scalars), Fraction(0))
    value = float32(lr * (float(exact) / total_weight))
    if not math.isfinite(value):
        raise Refused("BadValue")
    return value + 0.0


def apply(theta: Sequence[float], z: Iterable[float], c: float) -> list[float]:
    """theta − c·z, rounded to float32 after the product and after the difference."""
    return [float32(t - float32(c * value)) for t, value in zip(theta, z, strict=True)]


def inner_product(g_p: Sequence[float], z: Iterable[float]) -> float:
    """Exact products, padded with zeros to a power of two; the upper half is added to the lower until one is left."""
    sums = [a * b for a, b in zip(g_p, z, strict=True)]
    sums += [0.0] * ((1 << (len(sums) - 1).bit_length()) - len(sums))
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    largest = float.fromhex("0x1.fffffep+127")
    return float32(min(max(sums[0], -largest), largest)) + 0.0


def digest(theta: Sequence[float]) -> bytes:
    """Digest of theta."""
    return short_hash(packed(theta))


def add(theta: Sequence[float], displacement: Sequence[float]) -> list[float]:
    """theta + displacement, rounded to float32."""
    return [float32(t + d) for t, d in zip(theta, displacement, strict=True)]


def mean_displacement(weights: Sequence[float], displacements: Sequence[Sequence[float]]) -> list[float]:
    """Products and sums in float64, in the order given; the result rounded to float32."""
    total = [0.0] * len(displacements[0])
    for weight, values in zip(weights, displacements, strict=True):
        total = [t + weight * value for t, value in zip(total, values, strict=True)]
    return [float32(t) for t in total]


def is_aged(entry: dict[str, Any]) -> bool:
    """Whether the age of each term is written down."""
    return any(term["age"] for term in entry["terms"])


def blob_bytes(blob: dict[str, Any]) -> bytes:
    """Hash and size of a displacement."""
    return struct.pack("<16sI", bytes.fromhex(blob["blob"]), blob["size"])


def terms_and_displacement(entry: dict[str, Any]) -> bytes:
    """As frames and hashes have them."""
    out, aged = b"", is_aged(entry)
    for t in entry["terms"]:
        out += struct.pack("<H", t["age"]) if aged else b""
        out += struct.pack("<HHf", t["lane"], t["step"], t["coefficient"])
    return out + (blob_bytes(entry["displacement"]) if entry["displacement"] else b"")


def entry_hash(run_id: bytes, entry: dict[str, Any]) -> bytes:
    """Hash of a ledger entry."""
    count = len(entry["terms"]) | is_aged(entry) << 31 | (entry["displacement"] is not None) << 30
    head = run_id + struct.pack("<II", entry["version"], count) + terms_and_displacement(entry)
    return short_hash(head + bytes.fromhex(entry["previous"]) + bytes.fromhex(entry["digest"]))


# Section 3


def decode_mask(data: bytes) -> dict[str, Any]:
    """A mask file's meaning."""
    try:
        mask = _decode_mask(data)
    except (struct.error, UnicodeDecodeError) as error:
        raise Refused("MaskError") from error
    names = [m["name"].encode() for m in mask["matrices"]]
    good = bool(names) and all(a < b for a, b in pairwise(names)) and all(map(_good, mask["matrices"]))
    if not good or encode_mask(mask) != data:
        raise Refused("MaskError")
    return mask


def _decode_mask(data: bytes) -> dict[str, Any]:
    magic, fingerprint, tokenizer, count = struct.unpack_from("<8s32s32sI", data)
    if magic != b"MKMASK\x01\n" or not 1 <= count <= 65536:
        raise Refused("MaskError")
    at, matrices, sizes = 76, [], []
    for _ in range(count):
        name_bytes, dimensions, size = struct.unpack_from("<HBI", data, at)
        shape = struct.unpack_from(f"<{dimensions}I", data, at + 7)
        at += 7 + 4 * dimensions + name_bytes
        matrices.append({"name": data[at - name_bytes : at].decode(), "shape": list(shape)})
        sizes.append(size)
    if len(data) != at + 12 * sum(sizes):
        raise Refused("MaskError")
    for key in ("indices", "theta_0", "g_p"):
        for matrix, size in zip(matrices, sizes, strict=True):
            part = data[at : at + 4 * size]
            matrix[key] = list(struct.unpack(f"<{size}I", part)) if key == "indices" else part.hex()
            at += 4 * size
    return {"fingerprint": fingerprint.hex(), "tokenizer_fingerprint": tokenizer.hex(), "matrices": matrices}


def _good(matrix: dict[str, Any]) -> bool:
    indices, size = matrix["indices"], math.prod(matrix["shape"])
    ascending = all(a < b for a, b in pairwise(indices))
    numbers = floats(bytes.fromhex(matrix["theta_0"] + matrix["g_p"]))
    bounds = 1 <= len(matrix["shape"]) <= 8 and 1 <= len(matrix["name"].encode()) <= 1024 and 0 < size < 2**32
    return bool(bounds and indices and ascending and indices[-1] < size and all(map(math.isfinite, numbers)))


def encode_mask(mask: dict[str, Any]) -> bytes:
    """The mask file."""
    matrices = mask["matrices"]
    out = b"MKMASK\x01\n" + bytes.fromhex(mask["fingerprint"] + mask["tokenizer_fingerprint"])
    out += struct.pack("<I", len(matrices))
    for m in matrices:
        name, shape = m["name"].encode(), m["shape"]
        out += struct.pack(f"<HBI{len(shape)}I", len(name), len(shape), len(m["indices"]), *shape) + name
    out += b"".join(struct.pack(f"<{len(m['indices'])}I", *m["indices"]) for m in matrices)
    return out + b"".join(bytes.fromhex(m[key]) for key in ("theta_0", "g_p") for m in matrices)
