"""The data plane: one compact little-endian frame a message (protocol/SPECIFICATION.md, section 4).

A frame is a 24-byte header, a body by type, and a CRC-32 over all that. `encode` and `decode` are exact inverses:
every meaning has one encoding, and bytes that are not that encoding are refused with a WireError.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

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
    "MAX_CHUNK_BYTES", "MAX_FRAME_BYTES", "MAX_LANES", "MAX_SLOTS", "MAX_STALENESS", "MAX_STEPS", "MAX_TERMS",
    "Chunk", "Entries", "Frame", "Header", "Offer", "Reason", "Refusal", "Round", "Update", "Values", "Want", "Welcome",
    "decode", "decode_entry", "encode", "encode_entry", "entry_bytes", "most_terms",
]  # fmt: skip

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

Pairs = tuple[tuple[int, int], ...]


def encode(frame: Frame) -> bytes:
    """Encode a frame.

    Raises:
        BadValue: a field is outside its range, or not finite where it must be.
        TooLarge: the frame is longer than 96 KiB.
    """
    name, kind, header = type(frame).__name__, _KINDS[type(frame)], frame.header
    try:
        check(len(header.mask) == 8, "mask", "hash is not cut to 8 bytes")
        kind.check(frame)
        head = _HEADER.pack(MAGIC, VERSION, kind.number, header.run, header.term, header.version, header.mask)
        data = head + kind.encode(frame)
    except (struct.error, OverflowError) as error:
        raise BadValue(name, f"cannot be encoded ({error})") from error
    if len(data) + 4 > MAX_FRAME_BYTES:
        raise TooLarge(name, f"{len(data) + 4} bytes are more than {MAX_FRAME_BYTES}")
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
    magic, version, number, run, term, theta, mask = reader.unpack(_HEADER)
    if magic != MAGIC:
        raise BadMagic("frame", f"starts with {magic.hex()}, not {MAGIC.hex()}")
    if version != VERSION:
        raise UnknownVersion("frame", f"has version {version}, this is {VERSION}", "update this side or the other")
    if number not in _NUMBERED:
        raise UnknownType("frame", f"type {number} is unknown")
    if zlib.crc32(memoryview(payload)[:-4]) != int.from_bytes(payload[-4:], "little"):
        raise BadChecksum("frame", "CRC-32 does not match")
    reader.trim(4)
    kind = _NUMBERED[number]
    frame = kind.decode(Header(run, term, theta, mask), reader)
    kind.check(frame)
    reader.end()
    return frame


def _flags(name: str, value: int, count: int) -> list[bool]:
    """The flags of a frame, from bit 0 on."""
    if value >> count:
        raise UnknownFlags(name, f"bits {value:#x} are unknown", "update this side")
    return [bool(value >> bit & 1) for bit in range(count)]


# --- update ---


def _check_update(frame: Update) -> None:
    count = len(frame.scalars) if frame.values is None else frame.values.steps
    _check_steps(count)
    check(len(frame.base) == 8, "base digest", "is not 8 bytes")
    if frame.values is not None:
        _check_alone(bool(frame.scalars) or frame.seeds is not None)
        check_blob("values", frame.values.blob, frame.values.size)
    elif frame.seeds is not None:
        check(len(frame.seeds) == count, "seeds", "are not one a step")


def _check_steps(count: int) -> None:
    check(1 <= count <= MAX_STEPS, "steps", f"{count} is outside 1…{MAX_STEPS}")


def _check_alone(others: bool) -> None:
    check(not others, "values", "go without projected gradients and seeds")


def _encode_update(frame: Update) -> bytes:
    values, seeds = frame.values, frame.seeds
    count = len(frame.scalars) if values is None else values.steps
    flags = (seeds is not None) | (values is not None) << 1
    head = _UPDATE.pack(frame.boot, frame.base, count, flags, _pack_scalars((frame.loss,)))
    if values is not None:
        return head + BLOB.pack(values.blob, values.size)
    return head + (struct.pack(f"<{count}Q", *seeds) if seeds is not None else b"") + _pack_scalars(frame.scalars)


def _decode_update(header: Header, reader: Reader) -> Update:
    boot, base, count, flags, packed_loss = reader.unpack(_UPDATE)
    (loss,) = _unpack_scalars("loss", packed_loss)
    _check_steps(count)
    has_seeds, has_values = _flags("UpdateFlag", flags, 2)
    _check_alone(has_seeds and has_values)
    if has_values:
        blob, size = reader.unpack(BLOB)
        return Update(header, boot, base, loss, (), values=Values(blob, size, count))
    seeds = reader.numbers("Q", count) if has_seeds else None
    return Update(header, boot, base, loss, _unpack_scalars("projected gradient", reader.take(4 * count)), seeds)


def _pack_scalars(values: Iterable[float]) -> bytes:
    """f32 each; here alone, infinities and NaN may stand: the server's guards count whom they come from."""
    return b"".join(_NAN if math.isnan(value) else struct.pack("<f", value) for value in values)


def _unpack_scalars(name: str, packed: bytes | memoryview) -> tuple[float, ...]:
    values = struct.unpack(f"<{len(packed) // 4}f", packed)
    for number, value in enumerate(values):
        if math.isnan(value) and packed[4 * number : 4 * number + 4] != _NAN:
            raise BadValue(name, "has another NaN than 0x7fc00000")
    return values


# --- round ---


def _check_round(frame: Round) -> None:
    steps, before = frame.steps, frame.heard_before
    _check_steps(steps)
    check(1 <= frame.lanes <= MAX_LANES, "lanes", f"{frame.lanes} is outside 1…{MAX_LANES}")
    check(finite("eps", frame.eps) > 0, "eps", f"{frame.eps} is not above 0")
    slots = frame.asked | frame.heard
    check(not slots or 0 <= min(slots) <= max(slots) < MAX_SLOTS, "slot", f"is outside 0…{MAX_SLOTS - 1}")
    _check_ascending("short", frame.short)
    check(all(1 <= fewer < steps for _, fewer in frame.short), "short", f"steps are outside 1…{steps - 1}")
    _check_ascending("heard before", before)
    check(frame.heard.isdisjoint(slot for slot, _ in before), "heard before", "names a slot that is heard")
    check(all(1 <= age <= MAX_STALENESS for _, age in before), "heard before", f"an age is outside 1…{MAX_STALENESS}")


def _check_ascending(name: str, pairs: Pairs) -> None:
    check(all(a[0] < b[0] for a, b in pairwise(pairs)), name, "slots are not ascending")


def _encode_round(frame: Round) -> bytes:
    length = max(frame.asked | frame.heard, default=-1) // 8 + 1
    before = frame.heard_before
    head = _ROUND.pack(
        frame.steps, frame.lanes, frame.eps, frame.deadline_ms, frame.attempt, frame.is_open | bool(before) << 1,
        length, len(frame.short), len(frame.entries),
    )  # fmt: skip
    bitmaps = _bitmap(frame.asked, length) + _bitmap(frame.heard, length)
    earlier = struct.pack("<H", len(before)) + _pack_pairs(before) if before else b""
    return head + bitmaps + _pack_pairs(frame.short) + earlier + b"".join(map(encode_entry, frame.entries))


def _decode_round(header: Header, reader: Reader) -> Round:
    steps, lanes, eps, deadline_ms, attempt, flags, length, short_count, entry_count = reader.unpack(_ROUND)
    check(length <= MAX_SLOTS // 8, "bitmap", f"{length} bytes are more than {MAX_SLOTS // 8}")
    is_open, has_earlier = _flags("RoundFlag", flags, 2)
    asked, heard = reader.take(length), reader.take(length)
    check(length == 0 or bool(asked[-1] | heard[-1]), "bitmap", "is longer than its last slot")
    short = _pairs(reader, short_count)
    earlier: Pairs = ()
    if has_earlier:
        earlier = _pairs(reader, *reader.numbers("H", 1))
        check(len(earlier) > 0, "heard before", "is empty")
    entries = tuple(read_entry(reader) for _ in range(entry_count))
    slots = _slots(bytes(asked)), _slots(bytes(heard))
    return Round(header, is_open, steps, lanes, eps, deadline_ms, attempt, *slots, short, entries, earlier)


def _bitmap(slots: frozenset[int], length: int) -> bytes:
    bits = bytearray(length)
    for slot in slots:
        bits[slot // 8] |= 1 << slot % 8
    return bytes(bits)


@lru_cache(maxsize=4)  # most rounds ask the same nodes
def _slots(bitmap: bytes) -> frozenset[int]:
    return frozenset(8 * i + bit for i, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1)


def _pack_pairs(pairs: Pairs) -> bytes:
    return b"".join(struct.pack("<HH", *pair) for pair in pairs)


def _pairs(reader: Reader, count: int) -> Pairs:
    numbers = reader.numbers("H", 2 * count)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


# --- what is asked and answered ---


def _check_want(frame: Want) -> None:
    named = len(frame.blob) == HASH_BYTES and len(frame.chunks) > 0 if frame.blob is not None else not frame.chunks
    check(named, "chunks", "need a 16-byte hash and an index")


def _encode_want(frame: Want) -> bytes:
    body = b"" if frame.entries_from is None else struct.pack("<I", frame.entries_from)
    if frame.blob is not None:
        body += _CHUNKS.pack(frame.blob, len(frame.chunks)) + struct.pack(f"<{len(frame.chunks)}H", *frame.chunks)
    flags = frame.welcome | (frame.entries_from is not None) << 1 | (frame.blob is not None) << 2
    return _WANT.pack(frame.boot, flags) + body


def _decode_want(header: Header, reader: Reader) -> Want:
    boot, flags = reader.unpack(_WANT)
    welcome, wants_entries, wants_chunks = _flags("WantFlag", flags, 3)
    first, blob, chunks = None, None, ()
    if wants_entries:
        (first,) = reader.numbers("I", 1)
    if wants_chunks:
        blob, count = reader.unpack(_CHUNKS)
        chunks = reader.numbers("H", count)
    return Want(header, boot, welcome, first, blob, chunks)


def _encode_entries(frame: Entries) -> bytes:
    return struct.pack("<H", len(frame.entries)) + b"".join(map(encode_entry, frame.entries))


def _decode_entries(header: Header, reader: Reader) -> Entries:
    (count,) = reader.numbers("H", 1)
    return Entries(header, tuple(read_entry(reader) for _ in range(count)))


def _check_chunk(frame: Chunk) -> None:
    length = len(frame.data)
    check(len(frame.blob) == HASH_BYTES, "blob", "hash is not 16 bytes")
    check(frame.index < frame.count, "chunk", f"{frame.index} of {frame.count} does not exist")
    in_range = 0 < length <= min(MAX_CHUNK_BYTES, frame.size)
    check(in_range, "chunk", f"{length} bytes of {frame.size} are out of range")


def _encode_chunk(frame: Chunk) -> bytes:
    return _CHUNK.pack(frame.blob, frame.index, frame.count, frame.size, len(frame.data)) + frame.data


def _decode_chunk(header: Header, reader: Reader) -> Chunk:
    blob, index, count, size, length = reader.unpack(_CHUNK)
    return Chunk(header, blob, index, count, size, bytes(reader.take(length)))


def _decode_refusal(header: Header, reader: Reader) -> Refusal:
    boot, reason = reader.unpack(_REFUSAL)
    if reason not in set(Reason):
        raise UnknownType("refusal", f"reason {reason} is unknown")
    return Refusal(header, boot, Reason(reason))


class _Kind(NamedTuple):
    """A type of frames: its number, what holds of each before it is encoded and after it was decoded, and its body."""

    number: int
    check: Callable[[Any], None]
    encode: Callable[[Any], bytes]
    decode: Callable[[Header, Reader], Frame]


def _anything(frame: Frame) -> None:
    """Nothing to check but what struct does."""


_KINDS: dict[type[Frame], _Kind] = {
    Update: _Kind(1, _check_update, _encode_update, _decode_update),
    Round: _Kind(2, _check_round, _encode_round, _decode_round),
    Want: _Kind(3, _check_want, _encode_want, _decode_want),
    Welcome: _Kind(
        4,
        _anything,
        lambda frame: _WELCOME.pack(frame.boot, frame.slot),
        lambda header, reader: Welcome(header, *reader.unpack(_WELCOME)),
    ),
    Entries: _Kind(5, _anything, _encode_entries, _decode_entries),
    Chunk: _Kind(6, _check_chunk, _encode_chunk, _decode_chunk),
    Refusal: _Kind(7, _anything, lambda frame: _REFUSAL.pack(frame.boot, frame.reason), _decode_refusal),
    Offer: _Kind(
        8,
        lambda frame: check_blob("offer", frame.blob, frame.size),
        lambda frame: _OFFER.pack(frame.version, frame.blob, frame.size),
        lambda header, reader: Offer(header, *reader.unpack(_OFFER)),
    ),
}
_NUMBERED = {kind.number: kind for kind in _KINDS.values()}
