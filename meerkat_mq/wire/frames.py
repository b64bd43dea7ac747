"""The data plane: one compact little-endian frame a message (protocol/SPECIFICATION.md, section 4).

A frame is a 24-byte header, a body by type, and a CRC-32 over all that. `encode` and `decode` are exact inverses:
every meaning has one encoding, and bytes that are not that encoding are refused with a WireError.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterable
from enum import IntFlag
from functools import lru_cache
from itertools import pairwise

from meerkat_mq.core.path import HASH_BYTES
from meerkat_mq.errors import (
    BadChecksum,
    BadMagic,
    BadValue,
    TooLarge,
    Truncated,
    UnknownFlags,
    UnknownType,
    UnknownVersion,
)
from meerkat_mq.wire.entries import (
    BLOB,
    MAX_STALENESS,
    MAX_TERMS,
    check_blob,
    decode_entry,
    encode_entry,
    entry_bytes,
    most_terms,
    read_entry,
)
from meerkat_mq.wire.messages import (
    Chunk,
    Entries,
    Frame,
    Header,
    Offer,
    Reason,
    Refusal,
    Round,
    Update,
    Values,
    Want,
    Welcome,
)
from meerkat_mq.wire.reader import Reader, check, finite

__all__ = [
    "MAX_CHUNK_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_LANES",
    "MAX_SLOTS",
    "MAX_STALENESS",
    "MAX_STEPS",
    "MAX_TERMS",
    "Chunk",
    "Entries",
    "Frame",
    "Header",
    "Offer",
    "Reason",
    "Refusal",
    "Round",
    "Update",
    "Values",
    "Want",
    "Welcome",
    "decode",
    "decode_entry",
    "encode",
    "encode_entry",
    "entry_bytes",
    "most_terms",
]

MAGIC = b"MK"
VERSION = 1
MIN_FRAME_BYTES = 28
MAX_FRAME_BYTES = 96 * 1024
MAX_STEPS = 1000
MAX_LANES = 4096
MAX_SLOTS = 65536
MAX_CHUNK_BYTES = 64 * 1024

_HEADER = struct.Struct("<2sBBIII8s")
_UPDATE = struct.Struct("<I8sHH4s")
_ROUND = struct.Struct("<HHfIHHHHH")
_WANT = struct.Struct("<IB")
_CHUNKS = struct.Struct("<16sH")
_CHUNK = struct.Struct("<16sHHII")
_WELCOME = struct.Struct("<IH")
_REFUSAL = struct.Struct("<IB")
_OFFER = struct.Struct("<I16sI")
_NAN = struct.pack("<f", math.nan)  # the one encoding of what is not a number


class _UpdateFlag(IntFlag):
    EXPLICIT_SEEDS = 1
    VALUES = 2


class _RoundFlag(IntFlag):
    OPEN = 1
    HEARD_BEFORE = 2


class _WantFlag(IntFlag):
    WELCOME = 1
    ENTRIES = 2
    CHUNKS = 4


def encode(frame: Frame) -> bytes:
    """Encode a frame.

    Raises:
        BadValue: a field is outside its range, or not finite where it must be.
        TooLarge: the frame is longer than 96 KiB.
    """
    kind = type(frame)
    header = frame.header
    try:
        check(len(header.mask) == 8, "mask", "hash is not cut to 8 bytes")
        body = _ENCODERS[kind](frame)
        head = _HEADER.pack(MAGIC, VERSION, _TYPES[kind], header.run, header.term, header.version, header.mask)
    except (struct.error, OverflowError) as error:
        raise BadValue(kind.__name__, f"cannot be encoded ({error})") from error
    data = head + body
    if len(data) + 4 > MAX_FRAME_BYTES:
        raise TooLarge(kind.__name__, f"{len(data) + 4} bytes are more than {MAX_FRAME_BYTES}")
    return data + struct.pack("<I", zlib.crc32(data))


def decode(payload: bytes) -> Frame:
    """Decode a frame from an untrusted payload; nothing is allocated from a length that was not checked.

    Raises:
        WireError: one of its named kinds.
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise TooLarge("frame", f"{len(payload)} bytes are more than {MAX_FRAME_BYTES}")
    if len(payload) < MIN_FRAME_BYTES:
        raise Truncated("frame", f"{len(payload)} bytes are fewer than {MIN_FRAME_BYTES}")
    reader = Reader(payload)
    magic, version, kind, run, term, theta, mask = reader.unpack(_HEADER)
    if magic != MAGIC:
        raise BadMagic("frame", f"starts with {magic.hex()}, not {MAGIC.hex()}")
    if version != VERSION:
        raise UnknownVersion("frame", f"has version {version}, this is {VERSION}", "update this side or the other")
    if kind not in _DECODERS:
        raise UnknownType("frame", f"type {kind} is unknown")
    if zlib.crc32(memoryview(payload)[:-4]) != int.from_bytes(payload[-4:], "little"):
        raise BadChecksum("frame", "CRC-32 does not match")
    reader.trim(4)
    frame = _DECODERS[kind](Header(run, term, theta, mask), reader)
    reader.end()
    return frame


def _flags(value: int, known: type[IntFlag]) -> int:
    if value & ~sum(known):
        raise UnknownFlags(known.__name__.removeprefix("_"), f"bits {value:#x} are unknown", "update this side")
    return value


def _encode_update(frame: Update) -> bytes:
    values, seeds = frame.values, frame.seeds
    count = len(frame.scalars) if values is None else values.steps
    check(1 <= count <= MAX_STEPS, "steps", f"{count} is outside 1…{MAX_STEPS}")
    check(len(frame.base) == 8, "base digest", "is not 8 bytes")
    flags = _UpdateFlag.EXPLICIT_SEEDS if seeds is not None else _UpdateFlag(0)
    if values is not None:
        flags |= _UpdateFlag.VALUES
    head = _UPDATE.pack(frame.boot, frame.base, count, flags, _pack_scalars((frame.loss,)))
    if values is not None:
        check(not frame.scalars and seeds is None, "values", "go without projected gradients and seeds")
        check_blob("values", values.blob, values.size)
        return head + BLOB.pack(values.blob, values.size)
    check(seeds is None or len(seeds) == count, "seeds", "are not one a step")
    return head + (struct.pack(f"<{count}Q", *seeds) if seeds is not None else b"") + _pack_scalars(frame.scalars)


def _decode_update(header: Header, reader: Reader) -> Update:
    boot, base, count, flags, packed_loss = reader.unpack(_UPDATE)
    (loss,) = _unpack_scalars("loss", packed_loss)
    check(1 <= count <= MAX_STEPS, "steps", f"{count} is outside 1…{MAX_STEPS}")
    explicit = _flags(flags, _UpdateFlag) & _UpdateFlag.EXPLICIT_SEEDS
    if flags & _UpdateFlag.VALUES:
        check(not explicit, "values", "go without projected gradients and seeds")
        blob, size = reader.unpack(BLOB)
        check_blob("values", blob, size)
        return Update(header, boot, base, loss, (), values=Values(blob, size, count))
    seeds = reader.numbers("Q", count) if explicit else None
    scalars = _unpack_scalars("projected gradient", reader.take(4 * count))
    return Update(header, boot, base, loss, scalars, seeds)


def _pack_scalars(values: Iterable[float]) -> bytes:
    """f32 each; here alone, infinities and NaN may stand: the server's guards count whom they come from."""
    return b"".join(_NAN if math.isnan(value) else struct.pack("<f", value) for value in values)


def _unpack_scalars(name: str, packed: bytes | memoryview) -> tuple[float, ...]:
    values = struct.unpack(f"<{len(packed) // 4}f", packed)
    for number, value in enumerate(values):
        if math.isnan(value) and packed[4 * number : 4 * number + 4] != _NAN:
            raise BadValue(name, "has another NaN than 0x7fc00000")
    return values


def _bitmap(slots: frozenset[int], length: int) -> bytes:
    bits = bytearray(length)
    for slot in slots:
        bits[slot // 8] |= 1 << slot % 8
    return bytes(bits)


@lru_cache(maxsize=4)  # most rounds ask the same nodes
def _slots(bitmap: bytes) -> frozenset[int]:
    return frozenset(8 * i + bit for i, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1)


def _encode_round(frame: Round) -> bytes:
    _check_round(frame.steps, frame.lanes, frame.eps, frame.short)
    slots = frame.asked | frame.heard
    length = max(slots, default=-1) // 8 + 1
    check(length <= MAX_SLOTS // 8 and min(slots, default=0) >= 0, "slot", f"is outside 0…{MAX_SLOTS - 1}")
    flags = _RoundFlag.OPEN if frame.is_open else _RoundFlag(0)
    earlier = b""
    if frame.heard_before:
        _check_heard_before(frame.heard_before, frame.heard)
        flags |= _RoundFlag.HEARD_BEFORE
        earlier = struct.pack("<H", len(frame.heard_before)) + _pack_pairs(frame.heard_before)
    head = _ROUND.pack(
        frame.steps, frame.lanes, frame.eps, frame.deadline_ms, frame.attempt, flags,
        length, len(frame.short), len(frame.entries),
    )  # fmt: skip
    entries = b"".join(map(encode_entry, frame.entries))
    bitmaps = _bitmap(frame.asked, length) + _bitmap(frame.heard, length)
    return head + bitmaps + _pack_pairs(frame.short) + earlier + entries


def _pack_pairs(pairs: Iterable[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack("<HH", *pair) for pair in pairs)


def _pairs(reader: Reader, count: int) -> tuple[tuple[int, int], ...]:
    numbers = reader.numbers("H", 2 * count)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _decode_round(header: Header, reader: Reader) -> Round:
    steps, lanes, eps, deadline_ms, attempt, flags, length, short_count, entry_count = reader.unpack(_ROUND)
    check(length <= MAX_SLOTS // 8, "bitmap", f"{length} bytes are more than {MAX_SLOTS // 8}")
    is_open = bool(_flags(flags, _RoundFlag) & _RoundFlag.OPEN)
    asked, heard = reader.take(length), reader.take(length)
    check(length == 0 or bool(asked[-1] | heard[-1]), "bitmap", "is longer than its last slot")
    short = _pairs(reader, short_count)
    _check_round(steps, lanes, eps, short)
    slots = _slots(bytes(asked)), _slots(bytes(heard))
    earlier: tuple[tuple[int, int], ...] = ()
    if flags & _RoundFlag.HEARD_BEFORE:
        (count,) = reader.unpack(struct.Struct("<H"))
        check(count > 0, "heard before", "is empty")
        earlier = _pairs(reader, count)
        _check_heard_before(earlier, slots[1])
    entries = tuple(read_entry(reader) for _ in range(entry_count))
    return Round(header, is_open, steps, lanes, eps, deadline_ms, attempt, *slots, short, entries, earlier)


def _check_heard_before(pairs: tuple[tuple[int, int], ...], heard: frozenset[int]) -> None:
    check(all(a[0] < b[0] for a, b in pairwise(pairs)), "heard before", "slots are not ascending")
    check(heard.isdisjoint(slot for slot, _ in pairs), "heard before", "names a slot that is heard")
    check(all(1 <= age <= MAX_STALENESS for _, age in pairs), "heard before", f"an age is outside 1…{MAX_STALENESS}")


def _check_round(steps: int, lanes: int, eps: float, short: tuple[tuple[int, int], ...]) -> None:
    check(1 <= steps <= MAX_STEPS, "steps", f"{steps} is outside 1…{MAX_STEPS}")
    check(1 <= lanes <= MAX_LANES, "lanes", f"{lanes} is outside 1…{MAX_LANES}")
    check(finite("eps", eps) > 0, "eps", f"{eps} is not above 0")
    check(all(a[0] < b[0] for a, b in pairwise(short)), "short", "slots are not ascending")
    check(all(1 <= fewer < steps for _, fewer in short), "short", f"steps are outside 1…{steps - 1}")


def _encode_want(frame: Want) -> bytes:
    flags = _WantFlag.WELCOME if frame.welcome else _WantFlag(0)
    check(frame.blob is not None or not frame.chunks, "chunks", "are of no blob")
    body = b""
    if frame.entries_from is not None:
        flags |= _WantFlag.ENTRIES
        body += struct.pack("<I", frame.entries_from)
    if frame.blob is not None:
        check(len(frame.blob) == HASH_BYTES and len(frame.chunks) > 0, "chunks", "need a 16-byte hash and an index")
        flags |= _WantFlag.CHUNKS
        body += _CHUNKS.pack(frame.blob, len(frame.chunks)) + struct.pack(f"<{len(frame.chunks)}H", *frame.chunks)
    return _WANT.pack(frame.boot, flags) + body


def _decode_want(header: Header, reader: Reader) -> Want:
    boot, flags = reader.unpack(_WANT)
    _flags(flags, _WantFlag)
    first, blob, chunks = None, None, ()
    if flags & _WantFlag.ENTRIES:
        (first,) = reader.unpack(struct.Struct("<I"))
    if flags & _WantFlag.CHUNKS:
        blob, count = reader.unpack(_CHUNKS)
        check(count > 0, "chunks", "are none")
        chunks = reader.numbers("H", count)
    return Want(header, boot, bool(flags & _WantFlag.WELCOME), first, blob, chunks)


def _encode_entries(frame: Entries) -> bytes:
    return struct.pack("<H", len(frame.entries)) + b"".join(map(encode_entry, frame.entries))


def _decode_entries(header: Header, reader: Reader) -> Entries:
    (count,) = reader.unpack(struct.Struct("<H"))
    return Entries(header, tuple(read_entry(reader) for _ in range(count)))


def _encode_chunk(frame: Chunk) -> bytes:
    check(len(frame.blob) == HASH_BYTES, "blob", "hash is not 16 bytes")
    _check_chunk(frame.index, frame.count, frame.size, len(frame.data))
    return _CHUNK.pack(frame.blob, frame.index, frame.count, frame.size, len(frame.data)) + frame.data


def _decode_chunk(header: Header, reader: Reader) -> Chunk:
    blob, index, count, size, length = reader.unpack(_CHUNK)
    _check_chunk(index, count, size, length)
    return Chunk(header, blob, index, count, size, bytes(reader.take(length)))


def _check_chunk(index: int, count: int, size: int, length: int) -> None:
    check(index < count, "chunk", f"{index} of {count} does not exist")
    check(0 < length <= MAX_CHUNK_BYTES and length <= size, "chunk", f"{length} bytes of {size} are out of range")


def _encode_offer(frame: Offer) -> bytes:
    check(len(frame.blob) == HASH_BYTES and frame.size > 0, "offer", "needs a 16-byte hash and a size")
    return _OFFER.pack(frame.version, frame.blob, frame.size)


def _decode_offer(header: Header, reader: Reader) -> Offer:
    version, blob, size = reader.unpack(_OFFER)
    check(size > 0, "offer", "is of no bytes")
    return Offer(header, version, blob, size)


_TYPES: dict[type[Frame], int] = {Update: 1, Round: 2, Want: 3, Welcome: 4, Entries: 5, Chunk: 6, Refusal: 7, Offer: 8}
_ENCODERS: dict[type[Frame], Callable[..., bytes]] = {
    Update: _encode_update,
    Round: _encode_round,
    Want: _encode_want,
    Welcome: lambda frame: _WELCOME.pack(frame.boot, frame.slot),
    Entries: _encode_entries,
    Chunk: _encode_chunk,
    Refusal: lambda frame: _REFUSAL.pack(frame.boot, frame.reason),
    Offer: _encode_offer,
}


def _decode_welcome(header: Header, reader: Reader) -> Welcome:
    return Welcome(header, *reader.unpack(_WELCOME))


def _decode_refusal(header: Header, reader: Reader) -> Refusal:
    boot, reason = reader.unpack(_REFUSAL)
    if reason not in set(Reason):
        raise UnknownType("refusal", f"reason {reason} is unknown")
    return Refusal(header, boot, Reason(reason))


_DECODERS: dict[int, Callable[[Header, Reader], Frame]] = {
    1: _decode_update,
    2: _decode_round,
    3: _decode_want,
    4: _decode_welcome,
    5: _decode_entries,
    6: _decode_chunk,
    7: _decode_refusal,
    8: _decode_offer,
}
