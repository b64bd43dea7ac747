"""Frames: round trips, and "a mutated frame is decoded to the same meaning or refused with a named error"."""

import math
import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.errors import BadChecksum, BadValue, TooLarge, WireError
from meerkat_mq.wire.frames import (
    MAX_CHUNK_BYTES,
    MAX_FRAME_BYTES,
    MAX_STALENESS,
    MAX_TERMS,
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
    decode,
    encode,
    most_terms,
)
from meerkat_mq.wire.topics import Topics
from protocol.vectors_wire import meaning
from tests.support.memory import peak_of

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALAR = F32 | st.sampled_from([math.nan, -math.nan, math.inf, -math.inf])
HASH = st.binary(min_size=16, max_size=16)
EIGHT = st.binary(min_size=8, max_size=8)
HEADERS = st.builds(Header, U32, U32, U32, EIGHT)
SLOTS = st.frozensets(st.one_of(st.integers(0, 40), U16), max_size=12)
SIZE = st.integers(1, 2**32 - 1)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    version = draw(U32)
    ages = st.just(0) | st.integers(0, min(version, MAX_STALENESS))
    terms = draw(st.lists(st.builds(Coefficient, U16, U16, F32, ages), max_size=4))
    displacement = draw(st.none() | st.builds(Displacement, HASH, SIZE))
    return Entry(version, tuple(terms), draw(HASH), draw(HASH), displacement)


ENTRY = entries()
SOME_ENTRIES = st.lists(ENTRY, max_size=3).map(tuple)

NANS = [bytes.fromhex(bits) for bits in ("0000c07f", "0000c0ff", "0100c07f", "0100807f", "ffffffff")]
NAMED = tuple(WireError.__subclasses__())
WIDTH = st.integers(1, 9)
EXTRA = st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 4, bytes(4), *NANS])


@st.composite
def updates(draw: st.DrawFn) -> Update:
    steps = draw(st.integers(1, 12))
    if draw(st.booleans()):
        values = Values(draw(HASH), draw(SIZE), steps)
        return Update(draw(HEADERS), draw(U32), draw(EIGHT), draw(SCALAR), (), values=values)
    seeds = draw(st.none() | st.lists(U64, min_size=steps, max_size=steps).map(tuple))
    scalars = tuple(draw(st.lists(SCALAR, min_size=steps, max_size=steps)))
    return Update(draw(HEADERS), draw(U32), draw(EIGHT), draw(SCALAR), scalars, seeds)


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    steps = draw(st.integers(1, 1000))
    short = sorted(draw(st.dictionaries(U16, st.integers(1, steps - 1), max_size=4)).items()) if steps > 1 else ()
    eps = draw(st.floats(min_value=2.0**-149, width=32, allow_infinity=False))
    numbers = (steps, draw(st.integers(1, 4096)), eps, draw(U32), draw(U16))
    asked, heard = draw(SLOTS), draw(SLOTS)
    before = draw(
        st.dictionaries(U16.filter(lambda slot: slot not in heard), st.integers(1, MAX_STALENESS), max_size=4)
    )
    return Round(
        draw(HEADERS), draw(st.booleans()), *numbers, asked, heard, tuple(short), draw(SOME_ENTRIES),
        tuple(sorted(before.items())),
    )  # fmt: skip


@st.composite
def wants(draw: st.DrawFn) -> Want:
    blob = draw(st.none() | HASH)
    chunks = tuple(draw(st.lists(U16, min_size=1, max_size=9))) if blob is not None else ()
    return Want(draw(HEADERS), draw(U32), draw(st.booleans()), draw(st.none() | U32), blob, chunks)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    count = draw(st.integers(1, 65535))
    data = draw(st.binary(min_size=1, max_size=300))
    return Chunk(
        draw(HEADERS), draw(HASH), draw(st.integers(0, count - 1)), count, draw(st.integers(300, 2**32 - 1)), data
    )


FRAMES: st.SearchStrategy[Frame] = st.one_of(
    updates(),
    rounds(),
    wants(),
    st.builds(Welcome, HEADERS, U32, U16),
    st.builds(Entries, HEADERS, SOME_ENTRIES),
    chunks(),
    st.builds(Refusal, HEADERS, U32, st.sampled_from(Reason)),
    st.builds(Offer, HEADERS, U32, HASH, st.integers(1, 2**32 - 1)),
)


def same(a: Frame, b: Frame) -> bool:
    """Equal, −0 is not 0, and NaN is NaN: repr tells them apart."""
    return type(a) is type(b) and repr(meaning(a)) == repr(meaning(b))


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Another byte string: bits flipped, bytes overwritten, a piece cut out, doubled or put in, an end cut off."""
    kind = draw(st.sampled_from(["flip", "write", "cut", "insert", "double", "extend", "truncate"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    match kind:
        case "flip":
            flipped = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[place : place + 1])
            return data[:place] + flipped + data[place + 1 :]
        case "cut":
            return data[:place] + data[place + draw(WIDTH) :]
        case "double":
            return data[: place + draw(WIDTH)] + data[place:]
        case "truncate":
            return data[:place]
    extra = draw(EXTRA)
    match kind:
        case "write":
            return data[:place] + extra + data[place + len(extra) :]
        case "insert":
            return data[:place] + extra + data[place:]
    return data + extra


def seal(data: bytes | bytearray) -> bytes:
    return bytes(data) + struct.pack("<I", zlib.crc32(data))


@settings(max_examples=400, deadline=None)
@given(FRAMES)
def test_every_frame_round_trips(frame: Frame) -> None:
    data = encode(frame)
    assert len(data) <= MAX_FRAME_BYTES
    assert same(decode(data), frame)
    assert encode(decode(data)) == data


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_mutated_frame_means_the_same_or_is_refused(data: st.DataObject) -> None:
    frame = data.draw(FRAMES)
    hostile = data.draw(mutated(encode(frame)))
    try:
        found = decode(hostile)
    except NAMED:
        return
    assert same(found, frame)
    assert hostile == encode(frame)


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_behind_the_checksum_a_frame_is_canonical_or_refused(data: st.DataObject) -> None:
    body = encode(data.draw(FRAMES))[:-4]
    hostile = seal(data.draw(mutated(body)))
    try:
        found = decode(hostile)
    except NAMED:
        return
    assert encode(found) == hostile


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 9), st.binary(max_size=200))
def test_any_body_is_canonical_or_refused(kind: int, body: bytes) -> None:
    hostile = seal(b"MK\x01" + bytes([kind]) + bytes(20) + body)
    try:
        found = decode(hostile)
    except NAMED:
        return
    assert encode(found) == hostile


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(WireError):
        decode(junk)


def test_every_single_bit_is_covered_by_the_checksum() -> None:
    data = encode(update())
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode(bytes(flipped))


HEADER = Header(1, 2, 3, b"maskhash")


def update(**other: Any) -> Update:
    return replace(Update(HEADER, 1, bytes(8), 0.5, (0.25,)), **other)


def test_a_one_step_update_is_small() -> None:
    payload = encode(update())
    assert len(payload) == 52
    topic = Topics("home").up("pump", "update")
    assert len(topic) == 30
    fixed_header, topic_length, packet_id = 2, 2, 2
    assert fixed_header + topic_length + len(topic) + packet_id + len(payload) == 88
    assert len(encode(update(scalars=(0.25,) * 100))) == 52 + 4 * 99


ENTRY_OF_ONE = Entry(0, (Coefficient(0, 0, 0.5),), bytes(16), bytes(16))
STALE = Entry(5000, (Coefficient(0, 0, 0.5, 1),), bytes(16), bytes(16), Displacement(bytes(16), 7))
IDLE = Round(HEADER, False, 10, 1, 0.5, 0)


@pytest.mark.parametrize(
    "frame",
    [
        update(header=replace(HEADER, run=2**32)),
        update(header=replace(HEADER, mask=b"short")),
        update(boot=-1),
        update(base=bytes(7)),
        update(loss=1e39),
        update(scalars=()),
        update(scalars=(0.0,) * 1001),
        update(scalars=(1e39,)),
        update(seeds=(1, 2)),
        update(seeds=(2**64,)),
        update(values=Values(bytes(16), 1, 1)),
        update(scalars=(), values=Values(bytes(15), 1, 1)),
        update(scalars=(), values=Values(bytes(16), 0, 1)),
        update(scalars=(), values=Values(bytes(16), 1, 0)),
        update(scalars=(), values=Values(bytes(16), 1, 1), seeds=(1,)),
        replace(IDLE, steps=0),
        replace(IDLE, steps=1001),
        replace(IDLE, lanes=0),
        replace(IDLE, lanes=4097),
        replace(IDLE, eps=0.0),
        replace(IDLE, eps=-1.0),
        replace(IDLE, eps=float("nan")),
        replace(IDLE, deadline_ms=-1),
        replace(IDLE, asked=frozenset({65536})),
        replace(IDLE, heard=frozenset({-1})),
        replace(IDLE, short=((2, 1), (1, 1))),
        replace(IDLE, short=((1, 1), (1, 2))),
        replace(IDLE, short=((1, 10),)),
        replace(IDLE, short=((1, 0),)),
        replace(IDLE, heard_before=((2, 1), (1, 1))),
        replace(IDLE, heard_before=((1, 0),)),
        replace(IDLE, heard_before=((1, MAX_STALENESS + 1),)),
        replace(IDLE, heard_before=((1, 1),), heard=frozenset({1})),
        Want(HEADER, 1, blob=bytes(16)),
        Want(HEADER, 1, blob=bytes(15), chunks=(1,)),
        Want(HEADER, 1, chunks=(1,)),
        Want(HEADER, 1, entries_from=-1),
        Welcome(HEADER, 1, 65536),
        Entries(HEADER, (replace(ENTRY_OF_ONE, digest=bytes(15)),)),
        Entries(HEADER, (replace(ENTRY_OF_ONE, previous=b""),)),
        Entries(HEADER, (replace(ENTRY_OF_ONE, terms=(Coefficient(0, 0, float("nan")),)),)),
        Entries(HEADER, (replace(ENTRY_OF_ONE, terms=(Coefficient(65536, 0, 0.5),)),)),
        Entries(HEADER, (replace(ENTRY_OF_ONE, terms=ENTRY_OF_ONE.terms * (MAX_TERMS + 1)),)),
        Entries(HEADER, (replace(ENTRY_OF_ONE, terms=(Coefficient(0, 0, 0.5, 1),)),)),
        Entries(HEADER, (replace(STALE, terms=(Coefficient(0, 0, 0.5, MAX_STALENESS + 1),)),)),
        Entries(HEADER, (replace(STALE, terms=STALE.terms * (most_terms(aged=True) + 1)),)),
        Entries(HEADER, (replace(ENTRY_OF_ONE, displacement=Displacement(bytes(15), 1)),)),
        Entries(HEADER, (replace(ENTRY_OF_ONE, displacement=Displacement(bytes(16), 0)),)),
        Chunk(HEADER, bytes(16), 1, 1, 5, b"x"),
        Chunk(HEADER, bytes(16), 0, 1, 5, b""),
        Chunk(HEADER, bytes(16), 0, 1, 5, b"longer"),
        Chunk(HEADER, bytes(16), 0, 1, 10**6, bytes(MAX_CHUNK_BYTES + 1)),
        Chunk(HEADER, bytes(15), 0, 1, 5, b"x"),
        Offer(HEADER, 1, bytes(15), 1),
        Offer(HEADER, 1, bytes(16), 0),
        Offer(HEADER, 2**32, bytes(16), 1),
    ],
    ids=lambda frame: repr(frame)[:80],
)
def test_what_cannot_be_said_is_not_encoded(frame: Frame) -> None:
    with pytest.raises(BadValue):
        encode(frame)


@pytest.mark.parametrize("at", [16, 20], ids=["loss", "projected gradient"])
@pytest.mark.parametrize("bits", NANS)
def test_not_a_number_has_one_encoding(at: int, bits: bytes) -> None:
    body = bytearray(encode(update())[:-4])
    body[24 + at : 28 + at] = bits
    if bits == NANS[0]:
        found = decode(seal(body))
        assert isinstance(found, Update)
        assert [math.isnan(found.loss), math.isnan(found.scalars[0])] == [at == 16, at == 20]
    else:
        with pytest.raises(BadValue, match="another NaN"):
            decode(seal(body))


def test_every_nan_is_sent_as_the_one() -> None:
    (payload_nan,) = struct.unpack("<d", bytes.fromhex("010000000000f87f"))
    wanted = encode(update(loss=math.nan, scalars=(math.nan,)))
    assert encode(update(loss=-math.nan, scalars=(payload_nan,))) == wanted
    assert wanted[40:48] == 2 * NANS[0]


LARGEST = [
    replace(ENTRY_OF_ONE, terms=ENTRY_OF_ONE.terms * MAX_TERMS),
    replace(STALE, terms=STALE.terms * most_terms(aged=True)),
]


@pytest.mark.parametrize("largest", LARGEST, ids=["now", "stale"])
def test_the_largest_entry_fits_a_frame_and_more_does_not(largest: Entry) -> None:
    assert decode(encode(Entries(HEADER, (largest,)))) == Entries(HEADER, (largest,))
    with pytest.raises(TooLarge):
        encode(Entries(HEADER, (largest, largest)))


def test_the_longest_payload_is_bounded() -> None:
    with pytest.raises(TooLarge):
        decode(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(BadChecksum):
        decode(b"MK\x01\x01" + bytes(MAX_FRAME_BYTES - 4))


def test_ages_stand_only_where_one_is_not_zero() -> None:
    frame = encode(Entries(HEADER, (STALE,)))
    body = bytearray(frame[:-4])
    place = 24 + 2 + 6  # the header, the number of entries, and the entry's own head
    assert body[place : place + 2] == b"\x01\x00"
    body[place : place + 2] = b"\x00\x00"
    with pytest.raises(BadValue, match="age"):
        decode(seal(body))
    assert len(frame) - len(encode(Entries(HEADER, (replace(STALE, terms=ENTRY_OF_ONE.terms),)))) == 2


@pytest.mark.parametrize("count", [b"\xff\xff"])
@pytest.mark.parametrize(("kind", "fixed"), [(1, 12), (2, 18), (2, 20), (3, 21), (5, 0), (5, 6)])
def test_declared_counts_allocate_nothing(kind: int, fixed: int, count: bytes) -> None:
    body = bytearray(60)
    if kind == 2:
        body[:8] = struct.pack("<HHf", 10, 1, 0.5)
    if kind == 3:
        body[4] = 4
    if kind == 5:
        body[0] = 1
    body[fixed : fixed + 2] = count
    hostile = seal(b"MK\x01" + bytes([kind]) + bytes(20) + bytes(body))
    assert peak_of(lambda: decode(hostile), WireError) < 60_000
