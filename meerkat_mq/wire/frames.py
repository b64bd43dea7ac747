"""The data plane: one compact little-endian frame a message (protocol/SPECIFICATION.md, section 4).

A frame is a 24-byte header, a body by type, and a CRC-32 over all that. `encode` and `decode` are exact inverses:
every meaning has one encoding, and bytes that are not that encoding are refused with a WireError.
"""

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from meerkat_mq.core.path import HASH_BYTES, Entry, Term
from meerkat_mq.errors import BadChecksum, BadMagic, BadValue, TooLarge, UnknownFlags, UnknownType, UnknownVersion
from meerkat_mq.wire.reader import Reader

MAGIC = b"MK"
VERSION = 1
MAX_FRAME_BYTES = 96 * 1024
MAX_STEPS = 1000
MAX_SLOTS = 65536
MAX_TERMS = 65535
MAX_CHUNK_BYTES = 64 * 1024

_HEADER = struct.Struct("<2sBBIII8s")


@dataclass(frozen=True, slots=True)
class Header:
    """What every frame says of its run.

    Attributes:
        run: first 4 bytes of the run id, as u32.
        term: the server's term.
        version: version of theta that the sender stands at.
        mask: first 8 bytes of the mask hash.
    """

    run: int
    term: int
    version: int
    mask: bytes


@dataclass(frozen=True, slots=True)
class Update:
    """A node's projected gradients for the round of version `header.version`.

    Attributes:
        boot: the sending process.
        base: first 8 bytes of the node's own digest of the newest theta at or before that version whose digest is due.
        loss: mean loss of the steps.
        scalars: one projected gradient a local step, each exactly a float32.
        seeds: the explicit seed list, one a step; None where both sides derive it.
    """

    header: Header
    boot: int
    base: bytes
    loss: float
    scalars: tuple[float, ...]
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """The state of the round; retained.

    Attributes:
        is_open: whether nodes are asked to step now, from theta of `header.version`.
        steps: T.
        lanes: P.
        eps: perturbation scale, exactly a float32.
        deadline_ms: from opening to closing.
        attempt: counts doublings of the deadline and reopenings.
        asked: slots of the nodes asked.
        heard: slots whose updates are committed: the acknowledgement.
        short: (slot, local steps) of nodes that do fewer than T, by slot.
        entries: the newest ledger entries, oldest first.
    """

    header: Header
    is_open: bool
    steps: int
    lanes: int
    eps: float
    deadline_ms: int
    attempt: int = 0
    asked: frozenset[int] = frozenset()
    heard: frozenset[int] = frozenset()
    short: tuple[tuple[int, int], ...] = ()
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Want:
    """What a node asks of the server.

    Attributes:
        welcome: asks for its slot.
        entries_from: first ledger entry wanted.
        blob: hash of a blob of which `chunks` are wanted.
    """

    header: Header
    boot: int
    welcome: bool = False
    entries_from: int | None = None
    blob: bytes | None = None
    chunks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer to a node's birth: its slot."""

    header: Header
    boot: int
    slot: int


@dataclass(frozen=True, slots=True)
class Entries:
    """Ledger entries, in order."""

    header: Header
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part `index` of `count` of a blob of `size` bytes."""

    header: Header
    blob: bytes
    index: int
    count: int
    size: int
    data: bytes = field(repr=False)


class Reason(IntEnum):
    """Why an update was refused."""

    RESYNCHRONISE = 1  # its base digest is not that of the server's theta
    WRONG_SEEDS = 2
    WRONG_STEPS = 3


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server refuses the update for `header.version` of process `boot`."""

    header: Header
    boot: int
    reason: Reason


Frame = Update | Round | Want | Welcome | Entries | Chunk | Refusal


class _UpdateFlag(IntFlag):
    EXPLICIT_SEEDS = 1


class _RoundFlag(IntFlag):
    OPEN = 1


class _WantFlag(IntFlag):
    WELCOME = 1
    ENTRIES = 2
    CHUNKS = 4


def encode(frame: Frame) -> bytes:
    """Encode a frame.

    Raises:
        BadValue: a field is outside its range or not finite.
        TooLarge: the frame is longer than 96 KiB.
    """
    kind = type(frame)
    header = frame.header
    try:
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
    reader = Reader(payload)
    magic, version, kind, run, term, theta, mask = reader.unpack(_HEADER)
    if magic != MAGIC:
        raise BadMagic("frame", f"starts with {magic.hex()}, not {MAGIC.hex()}")
    if version != VERSION:
        raise UnknownVersion("frame", f"has version {version}, this is {VERSION}", "update this side or the other")
    if kind not in _DECODERS:
        raise UnknownType("frame", f"type {kind} is unknown")
    if reader.left < 4:
        reader.take(4)
    if zlib.crc32(memoryview(payload)[:-4]) != int.from_bytes(payload[-4:], "little"):
        raise BadChecksum("frame", "CRC-32 does not match")
    reader.trim(4)
    frame = _DECODERS[kind](Header(run, term, theta, mask), reader)
    reader.end()
    return frame


def encode_entry(entry: Entry) -> bytes:
    """u32 version, u16 terms, (u16 lane, u16 step, f32 coefficient) each, 16 previous, 16 digest."""
    if not 0 <= len(entry.terms) <= MAX_TERMS or len(entry.previous) != HASH_BYTES or len(entry.digest) != HASH_BYTES:
        raise BadValue("entry", f"version {entry.version} has wrong lengths")
    terms = b"".join(struct.pack("<HHf", t.lane, t.step, _finite("coefficient", t.coefficient)) for t in entry.terms)
    return struct.pack("<IH", entry.version, len(entry.terms)) + terms + entry.previous + entry.digest


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise BadValue(name, f"{value} is not finite")
    return value


def _flags(value: int, known: type[IntFlag]) -> int:
    if value & ~sum(known):
        raise UnknownFlags(known.__name__.removeprefix("_"), f"bits {value:#x} are unknown", "update this side")
    return value


def _check(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise BadValue(name, problem)


def _encode_update(frame: Update) -> bytes:
    count = len(frame.scalars)
    _check(1 <= count <= MAX_STEPS, "steps", f"{count} is outside 1…{MAX_STEPS}")
    _check(frame.seeds is None or len(frame.seeds) == count, "seeds", "are not one a step")
    _check(len(frame.base) == 8, "base digest", "is not 8 bytes")
    flags = 0 if frame.seeds is None else _UpdateFlag.EXPLICIT_SEEDS
    head = struct.pack("<I8sHHf", frame.boot, frame.base, count, flags, _finite("loss", frame.loss))
    seeds = struct.pack(f"<{count}Q", *frame.seeds) if frame.seeds is not None else b""
    return head + seeds + struct.pack(f"<{count}f", *(_finite("projected gradient", g) for g in frame.scalars))


def _decode_update(header: Header, reader: Reader) -> Update:
    boot, base, count, flags, loss = reader.unpack(struct.Struct("<I8sHHf"))
    _check(1 <= count <= MAX_STEPS, "steps", f"{count} is outside 1…{MAX_STEPS}")
    explicit = _flags(flags, _UpdateFlag) & _UpdateFlag.EXPLICIT_SEEDS
    seeds = reader.numbers("Q", count) if explicit else None
    scalars = tuple(_finite("projected gradient", g) for g in reader.numbers("f", count))
    return Update(header, boot, base, _finite("loss", loss), scalars, seeds)


def _bitmap(slots: frozenset[int], length: int) -> bytes:
    bits = bytearray(length)
    for slot in slots:
        bits[slot // 8] |= 1 << slot % 8
    return bytes(bits)


def _slots(bitmap: memoryview) -> frozenset[int]:
    return frozenset(8 * i + bit for i, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1)


def _encode_round(frame: Round) -> bytes:
    _check(1 <= frame.steps <= MAX_STEPS, "steps", f"{frame.steps} is outside 1…{MAX_STEPS}")
    _check(frame.lanes >= 1, "lanes", f"{frame.lanes} is below 1")
    _check(frame.eps > 0, "eps", f"{frame.eps} is not above 0")
    highest = max(frame.asked | frame.heard, default=-1)
    _check(highest < MAX_SLOTS and min(frame.asked | frame.heard, default=0) >= 0, "slot", f"{highest} is out of range")
    length = highest // 8 + 1
    flags = _RoundFlag.OPEN if frame.is_open else 0
    head = struct.pack(
        "<HHfIHHHHH",
        frame.steps, frame.lanes, _finite("eps", frame.eps), frame.deadline_ms, frame.attempt, flags,
        length, len(frame.short), len(frame.entries),
    )  # fmt: skip
    short = b"".join(struct.pack("<HH", slot, steps) for slot, steps in frame.short)
    entries = b"".join(map(encode_entry, frame.entries))
    return head + _bitmap(frame.asked, length) + _bitmap(frame.heard, length) + short + entries


def _decode_round(header: Header, reader: Reader) -> Round:
    fields = reader.unpack(struct.Struct("<HHfIHHHHH"))
    steps, lanes, eps, deadline_ms, attempt, flags, length, short_count, entry_count = fields
    _check(1 <= steps <= MAX_STEPS, "steps", f"{steps} is outside 1…{MAX_STEPS}")
    _check(lanes >= 1, "lanes", "is 0")
    _check(_finite("eps", eps) > 0, "eps", f"{eps} is not above 0")
    _check(length <= MAX_SLOTS // 8, "bitmap", f"{length} bytes are more than {MAX_SLOTS // 8}")
    is_open = bool(_flags(flags, _RoundFlag) & _RoundFlag.OPEN)
    asked, heard = reader.take(length), reader.take(length)
    _check(length == 0 or bool(asked[-1] | heard[-1]), "bitmap", "is longer than its last slot")
    numbers = reader.numbers("H", 2 * short_count)
    short = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    entries = tuple(_decode_entry(reader) for _ in range(entry_count))
    return Round(
        header, is_open, steps, lanes, eps, deadline_ms, attempt, _slots(asked), _slots(heard), short, entries
    )  # fmt: skip


def _decode_entry(reader: Reader) -> Entry:
    version, count = reader.unpack(struct.Struct("<IH"))
    packed = reader.take(8 * count)
    terms = tuple(
        Term(lane, step, _finite("coefficient", c)) for lane, step, c in struct.Struct("<HHf").iter_unpack(packed)
    )
    return Entry(version, terms, bytes(reader.take(HASH_BYTES)), bytes(reader.take(HASH_BYTES)))


def _encode_want(frame: Want) -> bytes:
    flags = _WantFlag.WELCOME if frame.welcome else _WantFlag(0)
    body = b""
    if frame.entries_from is not None:
        flags |= _WantFlag.ENTRIES
        body += struct.pack("<I", frame.entries_from)
    if frame.blob is not None:
        _check(len(frame.blob) == HASH_BYTES and len(frame.chunks) > 0, "chunks", "need a 16-byte hash and an index")
        flags |= _WantFlag.CHUNKS
        body += struct.pack(f"<16sH{len(frame.chunks)}H", frame.blob, len(frame.chunks), *frame.chunks)
    return struct.pack("<IB", frame.boot, flags) + body


def _decode_want(header: Header, reader: Reader) -> Want:
    boot, flags = reader.unpack(struct.Struct("<IB"))
    _flags(flags, _WantFlag)
    first, blob, chunks = None, None, ()
    if flags & _WantFlag.ENTRIES:
        (first,) = reader.unpack(struct.Struct("<I"))
    if flags & _WantFlag.CHUNKS:
        blob, count = reader.unpack(struct.Struct("<16sH"))
        _check(count > 0, "chunks", "are none")
        chunks = reader.numbers("H", count)
    return Want(header, boot, bool(flags & _WantFlag.WELCOME), first, blob, chunks)


def _encode_entries(frame: Entries) -> bytes:
    return struct.pack("<H", len(frame.entries)) + b"".join(map(encode_entry, frame.entries))


def _decode_entries(header: Header, reader: Reader) -> Entries:
    (count,) = reader.unpack(struct.Struct("<H"))
    return Entries(header, tuple(_decode_entry(reader) for _ in range(count)))


def _encode_chunk(frame: Chunk) -> bytes:
    _check(len(frame.blob) == HASH_BYTES, "blob", "hash is not 16 bytes")
    _check_chunk(frame.index, frame.count, frame.size, len(frame.data))
    return struct.pack("<16sHHII", frame.blob, frame.index, frame.count, frame.size, len(frame.data)) + frame.data


def _decode_chunk(header: Header, reader: Reader) -> Chunk:
    blob, index, count, size, length = reader.unpack(struct.Struct("<16sHHII"))
    _check_chunk(index, count, size, length)
    return Chunk(header, blob, index, count, size, bytes(reader.take(length)))


def _check_chunk(index: int, count: int, size: int, length: int) -> None:
    _check(index < count, "chunk", f"{index} of {count} does not exist")
    _check(0 < length <= MAX_CHUNK_BYTES and length <= size, "chunk", f"{length} bytes of {size} are out of range")


_TYPES: dict[type[Frame], int] = {Update: 1, Round: 2, Want: 3, Welcome: 4, Entries: 5, Chunk: 6, Refusal: 7}
_ENCODERS: dict[type[Frame], Callable[..., bytes]] = {
    Update: _encode_update,
    Round: _encode_round,
    Want: _encode_want,
    Welcome: lambda frame: struct.pack("<IH", frame.boot, frame.slot),
    Entries: _encode_entries,
    Chunk: _encode_chunk,
    Refusal: lambda frame: struct.pack("<IB", frame.boot, frame.reason),
}


def _decode_welcome(header: Header, reader: Reader) -> Welcome:
    return Welcome(header, *reader.unpack(struct.Struct("<IH")))


def _decode_refusal(header: Header, reader: Reader) -> Refusal:
    boot, reason = reader.unpack(struct.Struct("<IB"))
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
}
