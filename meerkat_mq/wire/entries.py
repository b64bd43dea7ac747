"""A ledger entry's bytes, as frames carry them and the ledger keeps them (protocol/SPECIFICATION.md, section 4)."""

import math
import struct
from functools import lru_cache

from meerkat_mq.core.path import HASH_BYTES, Coefficient, Displacement, Entry
from meerkat_mq.errors import BadValue
from meerkat_mq.wire.reader import Reader, check

MAX_TERMS = 12000  # an entry of them fits a frame,
MAX_AGED_TERMS = 9600  # and so does one of these, which are longer
MAX_STALENESS = 1000
KNOWN_ENTRY_BYTES = 1024
BLOB = struct.Struct("<16sI")  # hash and size of a displacement's blob

_ENTRY = struct.Struct("<IH")
_TERM = struct.Struct("<HHf")
_AGED_TERM = struct.Struct("<HHHf")
_AGED, _DISPLACED = 1 << 15, 1 << 14  # flags of an entry, above its number of terms


def most_terms(*, aged: bool) -> int:
    """How many terms an entry can have, with ages or without."""
    return MAX_AGED_TERMS if aged else MAX_TERMS


def entry_bytes(entry: Entry) -> int:
    """The length of `encode_entry`'s result."""
    return _entry_size(len(entry.terms), aged=entry.aged, displaced=entry.displacement is not None)


def _entry_size(terms: int, *, aged: bool, displaced: bool) -> int:
    each = _AGED_TERM.size if aged else _TERM.size
    return _ENTRY.size + each * terms + BLOB.size * displaced + 2 * HASH_BYTES


def encode_entry(entry: Entry) -> bytes:
    """u32 version, u16 terms and flags, (u16 lane, u16 step, f32 coefficient) each, 16 previous, 16 digest.

    With bit 15, there is a u16 age before each lane; with bit 14, 16 hash and u32 size of a displacement after the
    terms.
    """
    check(len(entry.previous) == len(entry.digest) == HASH_BYTES, "entry", "has a hash that is not 16 bytes")
    _check(entry)
    flags = _AGED * entry.aged | _DISPLACED * (entry.displacement is not None)
    return _ENTRY.pack(entry.version, len(entry.terms) | flags) + entry.body


def previous_of(data: bytes) -> bytes:
    """The hash of the entry before, of an encoded entry."""
    return data[-2 * HASH_BYTES : -HASH_BYTES]


def _check_count(terms: int, aged: bool) -> None:
    if terms > (most := most_terms(aged=aged)):
        raise BadValue("terms", f"{terms} are more than {most}")


def _check(entry: Entry) -> None:
    """Refuse, as BadValue, what no entry can be."""
    _check_count(len(entry.terms), entry.aged)
    oldest = min(MAX_STALENESS, entry.version)
    for term in entry.terms:
        if not math.isfinite(term.coefficient):
            raise BadValue("coefficient", f"{term.coefficient} is not finite")
        if not 0 <= term.age <= oldest:
            raise BadValue("age", f"{term.age} is outside 0…{oldest}")
    if entry.displacement is not None:
        check_blob("displacement", entry.displacement.blob, entry.displacement.size)


def check_blob(name: str, blob: bytes, size: int) -> None:
    """Refuse, as BadValue, what names no blob."""
    check(len(blob) == HASH_BYTES and size > 0, name, "needs a 16-byte hash and a size")


def read_entry(reader: Reader) -> Entry:
    """The next entry of a frame."""
    head = int.from_bytes(reader.peek(_ENTRY.size)[4:], "little")
    count = head & ~(_AGED | _DISPLACED)
    _check_count(count, bool(head & _AGED))
    data = bytes(reader.take(_entry_size(count, aged=bool(head & _AGED), displaced=bool(head & _DISPLACED))))
    return _known_entry(data) if len(data) <= KNOWN_ENTRY_BYTES else _entry(data)


@lru_cache(maxsize=64)  # a round repeats the entries of the rounds before it
def _known_entry(data: bytes) -> Entry:
    return _entry(data)


def _entry(data: bytes) -> Entry:
    reader = Reader(data)
    version, head = reader.unpack(_ENTRY)
    count, aged = head & ~(_AGED | _DISPLACED), bool(head & _AGED)
    packed = reader.take((_AGED_TERM if aged else _TERM).size * count)
    found = _AGED_TERM.iter_unpack(packed) if aged else ((0, *term) for term in _TERM.iter_unpack(packed))
    terms = tuple([Coefficient(lane, step, c, age) for age, lane, step, c in found])
    displacement = Displacement(*reader.unpack(BLOB)) if head & _DISPLACED else None
    entry = Entry(version, terms, bytes(reader.take(HASH_BYTES)), bytes(reader.take(HASH_BYTES)), displacement)
    check(entry.aged == aged, "age", "is written down although all are 0")
    _check(entry)
    return entry


def decode_entry(data: bytes) -> Entry:
    """The inverse of `encode_entry`; WireError where the bytes are no entry."""
    reader = Reader(data)
    entry = read_entry(reader)
    reader.end()
    return entry
