"""Damaged bytes of the wire and of disks: as numbers lie in them, as checksums and zstd frames hide them."""

import os
import random
import re
import zlib
from collections.abc import Callable, Sequence

import zstandard

from tests.fuzz.mutate import DAMAGES, mutant

INPUTS = int(os.environ.get("MEERKAT_FUZZ_INPUTS", "20000"))  # of all decoders together
MESSAGES = int(os.environ.get("MEERKAT_FUZZ_MESSAGES", "1500"))  # to a running federation
ZSTD = re.compile(re.escape(b"\x28\xb5\x2f\xfd"))
NUMBERS = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_BYTEWISE = DAMAGES[:5]  # of texts, those that know no tokens


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A number of one to eight bytes becomes an extreme one, in either order."""
    width, place = rng.choice((1, 2, 4, 8)), rng.randrange(len(data) + 1)
    number = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    return data[:place] + number + data[place + width :]


def rezip(rng: random.Random, data: bytes) -> bytes:
    """What a zstd frame holds is damaged, and packed again; a length before the frame is put right."""
    starts = [match.start() for match in ZSTD.finditer(data)]
    if not starts:
        return overwrite(rng, data)
    start = rng.choice(starts)
    unpacking = zstandard.ZstdDecompressor().decompressobj()
    try:
        inside = bytearray(unpacking.decompress(data[start:]))
    except zstandard.ZstdError:
        return overwrite(rng, data)
    size = len(data) - start - len(unpacking.unused_data)
    for _ in range(rng.randint(1, 8)):
        if inside:
            inside[rng.randrange(len(inside))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    packed = zstandard.ZstdCompressor().compress(bytes(inside))
    before = data[:start]
    if before[-4:] == size.to_bytes(4, "little"):
        before = before[:-4] + len(packed).to_bytes(4, "little")
    return before + packed + data[start + size :]


def with_checksum(data: bytes) -> bytes:
    """The bytes, with the CRC-32 of those before the last four in their place."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def damaged(name: str, samples: Sequence[bytes], number: int, *, text: bool = False) -> bytes:
    """The mutant with this number: one of text as of files, one of bytes with one to three damages."""
    if text:
        return mutant(name, samples, number)
    rng = random.Random(f"{name} {number}")
    data = rng.choice(samples)
    ways: Sequence[Callable[[random.Random, bytes], bytes]] = (*_BYTEWISE, overwrite, overwrite, rezip, rezip)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(ways)(rng, data or b" ")
    return with_checksum(data) if rng.random() < 0.5 and len(data) > 4 else data
