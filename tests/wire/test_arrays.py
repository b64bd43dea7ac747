import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import BadValue, TooLarge, Truncated, UnknownType, WireError
from meerkat_mq.wire.arrays import (
    MAX_BLOB_BYTES,
    MAX_BLOB_WEIGHTS,
    Assembly,
    decode_mask,
    encode_array,
    encode_mask,
    read_array,
    split,
)
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES, Header, decode, encode
from meerkat_mq.wire.reader import Reader
from protocol.vectors_core import golden_mask
from tests.support.memory import peak_of

HEADER = Header(1, 2, 3, b"maskhash")


def prefixed(code: int, count: int, packed: bytes) -> bytes:
    return struct.pack("<BII", code, count, len(packed)) + packed


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["<f4", "<u4", "<u2"]).flatmap(
        lambda dtype: hnp.arrays(
            np.dtype(dtype), st.integers(0, 200), elements={"allow_nan": False} if "f" in dtype else None
        )
    )
)
def test_arrays_round_trip(array: Any) -> None:
    reader = Reader(encode_array(array))
    found = read_array(reader, array.dtype.str, array.size)
    reader.end()
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_strided_and_big_endian_arrays_have_the_same_encoding() -> None:
    array = np.arange(20, dtype=np.uint32)
    assert encode_array(np.repeat(array, 2)[::2]) == encode_array(array)
    assert encode_array(array.astype(">u4")) == encode_array(array)


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2), np.float32), np.zeros(3, np.int32)])
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(BadValue):
        encode_array(array)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_mutated_array_is_refused_or_has_its_size(data: st.DataObject) -> None:
    good = encode_array(direction("mk1", 1, 0, 60))
    place, removed = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 4))
    hostile = good[:place] + data.draw(st.binary(max_size=4)) + good[place + removed :]
    reader = Reader(hostile)
    try:
        found = read_array(reader, "<f4", 60)
        reader.end()
    except WireError:
        return
    assert (found.shape, found.dtype) == ((60,), np.dtype("<f4"))


def test_declared_sizes_allocate_nothing() -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(100))
    for count in (2**26, 2**30, 2**32 - 1):
        hostile = prefixed(1, count, packed)
        assert peak_of(lambda: read_array(Reader(hostile), "<f4", count), TooLarge) < 100_000  # noqa: B023
    hostile = prefixed(1, 25, packed)[:5] + b"\xff\xff\xff\xff" + packed
    assert peak_of(lambda: read_array(Reader(hostile), "<f4", 25), Truncated) < 100_000


def test_a_bomb_is_refused_before_it_opens() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 * 2**20))
    assert len(bomb) < 10_000
    for action in (
        lambda: read_array(Reader(prefixed(1, 1000, bomb)), "<f4", 1000),
        lambda: read_array(Reader(prefixed(1, 1000, bomb + bomb)), "<f4", 1000),
    ):
        assert peak_of(action, BadValue) < 200_000


def test_a_bomb_that_declares_the_right_size_stops_there() -> None:
    bomb = bytearray(zstandard.ZstdCompressor(level=19).compress(bytes(64 * 2**20)))
    size = zstandard.get_frame_parameters(bytes(bomb)).content_size
    start = bomb.index(struct.pack("<I", size))
    bomb[start : start + 4] = struct.pack("<I", 4000)
    assert zstandard.get_frame_parameters(bytes(bomb)).content_size == 4000
    assert peak_of(lambda: read_array(Reader(prefixed(1, 1000, bytes(bomb))), "<f4", 1000), BadValue) < 2 * 2**20


def test_unknown_dtypes_are_unknown_types() -> None:
    good = encode_array(np.zeros(3, np.float32))
    with pytest.raises(UnknownType):
        read_array(Reader(b"\0" + good[1:]), "<f4", 3)


def test_masks_round_trip() -> None:
    mask = golden_mask()
    blob = encode_mask(mask)
    assert decode_mask(blob, mask.hash, mask.size).to_bytes() == mask.to_bytes()


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_mutated_mask_blob_is_the_same_mask_or_refused(data: st.DataObject) -> None:
    mask = golden_mask()
    good = encode_mask(mask)
    place, removed = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 4))
    hostile = good[:place] + data.draw(st.binary(max_size=4)) + good[place + removed :]
    try:
        found = decode_mask(hostile, mask.hash, mask.size)
    except WireError:
        return
    assert found.to_bytes() == mask.to_bytes()


def with_gaps(gaps: list[int], head: bytes | None = None) -> bytes:
    mask = golden_mask()
    file = mask.to_bytes()
    head = file[: len(file) - 120] if head is None else head
    arrays = (np.array(gaps, np.uint32), mask.theta_0, mask.g_p)
    return struct.pack("<II", len(head), mask.size) + head + b"".join(map(encode_array, arrays))


GAPS = [0, 1, 21, 1, 65_535, 1, 4_199_934_463, 4, 13, 12]
HEAD = golden_mask().to_bytes()[:-120]


def test_gaps_are_counted_within_a_matrix() -> None:
    mask = golden_mask()
    assert decode_mask(with_gaps(GAPS), mask.hash, 10).to_bytes() == mask.to_bytes()


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        with_gaps([0, 0, *GAPS[2:]]),
        with_gaps([*GAPS[:6], 2**32 - 1, *GAPS[7:]]),
        with_gaps([0, 2, *GAPS[2:]]),
        with_gaps(GAPS, HEAD[:-1]),
        with_gaps(GAPS, HEAD + b"\0"),
        with_gaps(GAPS, HEAD[:72] + bytes(4)),
        with_gaps(GAPS, HEAD[:72] + b"\xff\xff\xff\xff" + HEAD[76:]),
        with_gaps(GAPS, HEAD[:79] + b"\xff\xff\xff\xff" + HEAD[83:]),
        with_gaps(GAPS, b"MKMASK\x02\n" + HEAD[8:]),
        with_gaps(GAPS, b""),
        with_gaps(GAPS) + b"\0",
        b"\xff\xff\xff\xff" + with_gaps(GAPS)[4:],
    ],
    ids=range(13),
)
def test_hostile_mask_blobs_are_refused(blob: bytes) -> None:
    assert peak_of(lambda: decode_mask(blob, golden_mask().hash, 10), WireError) < 300_000


def test_another_mask_is_refused_by_its_hash_and_size() -> None:
    blob = encode_mask(toy_mask(10))
    with pytest.raises(BadValue, match="hash"):
        decode_mask(blob, golden_mask().hash, 10)
    with pytest.raises(BadValue, match="weights"):
        decode_mask(blob, toy_mask(10).hash, 11)
    hostile = struct.pack("<II", 4, 2**32 - 1) + bytes(100)
    assert peak_of(lambda: decode_mask(hostile, bytes(16), 2**32 - 1), TooLarge) < 100_000
    hostile = struct.pack("<II", 4, MAX_BLOB_WEIGHTS) + bytes(4) + prefixed(2, MAX_BLOB_WEIGHTS, bytes(40))
    assert peak_of(lambda: decode_mask(hostile, bytes(16), MAX_BLOB_WEIGHTS), TooLarge) < 100_000


def test_indices_of_a_million_weights_are_small() -> None:
    rng = np.random.default_rng(1)
    matrices = []
    for i in range(10):
        indices = np.unique(rng.integers(0, 10**8, 100_000)).astype(np.uint32)
        values = direction("mk1", i, 0, indices.size)
        matrices.append(MaskedMatrix(f"layer.{i}", (10_000, 10_000), indices, values, values))
    mask = Mask(tuple(matrices), bytes(32), bytes(32))
    blob = encode_mask(mask)
    head_bytes, size = struct.unpack_from("<II", blob)
    code, count, packed = struct.unpack_from("<BII", blob, 8 + head_bytes)
    assert (code, count, size) == (2, mask.size, mask.size)
    assert mask.size > 990_000
    assert 8 * (9 + packed) / count <= 12.5
    assert decode_mask(blob, mask.hash, mask.size).hash == mask.hash


def test_a_blob_survives_chunks_in_any_order() -> None:
    blob = np.random.default_rng(2).bytes(3 * MAX_CHUNK_BYTES + 5)
    name = bytes(range(16))
    parts = [decode(encode(chunk)) for chunk in split(HEADER, name, blob)]
    assembly = Assembly(name, len(blob), 4)
    for place in (3, 1, 1, 0):
        assembly.add(parts[place])  # type: ignore[arg-type]
    assert list(assembly.missing) == [2]
    with pytest.raises(Truncated):
        assembly.join()
    assembly.add(parts[2])  # type: ignore[arg-type]
    assert list(assembly.missing) == []
    assert assembly.join() == blob


def test_chunks_of_another_blob_or_length_are_refused() -> None:
    blob = bytes(MAX_CHUNK_BYTES + 5)
    name = bytes(16)
    first, last = split(HEADER, name, blob)
    assembly = Assembly(name, len(blob), 2)
    other = split(HEADER, b"x" * 16, blob)[0]
    longer = split(HEADER, name, blob + b"\0")[0]
    for hostile in (other, longer, replace(first, data=b"short"), replace(last, data=bytes(6))):
        with pytest.raises(BadValue):
            assembly.add(hostile)
    assert assembly.missing == (0, 1)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (MAX_BLOB_BYTES + 1, 4097), (10, 2), (10, 0), (10**6, 1)])
def test_impossible_blobs_are_refused(size: int, count: int) -> None:
    with pytest.raises(TooLarge):
        Assembly(bytes(16), size, count)


def test_empty_blobs_are_refused() -> None:
    with pytest.raises(TooLarge):
        split(HEADER, bytes(16), b"")
