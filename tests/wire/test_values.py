"""Values blobs: round trips, and "a mutated blob decodes to finite values of its size or is refused with a name"."""

import struct
from typing import get_args

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import short_hash
from meerkat_mq.core.values import BLOCK, LARGEST_SCALE, quantise, quantised
from meerkat_mq.errors import BadMagic, BadValue, TooLarge, Truncated, UnknownType, WireError
from meerkat_mq.wire.arrays import MAX_BLOB_WEIGHTS
from meerkat_mq.wire.values import MAGIC, decode_values, encode_values, largest_blob
from tests.support.memory import peak_of

CODECS = get_args(Codec)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
NAMED = tuple(WireError.__subclasses__())
VALUES = direction("mk1", 3, 0, 300)
BLOBS = {codec: encode_values(VALUES, codec) for codec in CODECS}


def blob_of(code: int, size: int, *arrays: np.ndarray) -> bytes:
    planes = [array.view(np.uint8).reshape(array.size, array.itemsize).T.tobytes() for array in arrays]
    return MAGIC + struct.pack("<BI", code, size) + zstandard.ZstdCompressor().compress(b"".join(planes))


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 3 * BLOCK), elements=FINITE), st.sampled_from(CODECS))
def test_every_displacement_decodes_to_what_its_codec_keeps(values: Float32Array, codec: Codec) -> None:
    blob = encode_values(values, codec)
    found = decode_values(blob, short_hash(blob), values.size)
    assert found.dtype == np.float32
    assert found.tobytes() == quantised(values, codec).tobytes()
    if codec == "float32":
        assert found.tobytes() == values.tobytes()
    if codec != "int8":
        assert encode_values(found, codec) == blob
    assert decode_values(blob, None, values.size).tobytes() == found.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 100_003])
def test_every_size_of_random_bits_fits_the_bound(codec: Codec, size: int) -> None:
    bits = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    values = np.where(bits >> 23 & 255 == 255, 0, bits).astype(np.uint32).view(np.float32)
    blob = encode_values(values, codec)
    assert len(blob) <= largest_blob(size)
    assert decode_values(blob, None, size).tobytes() == quantised(values, codec).tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_strided_values_have_the_same_encoding(codec: Codec) -> None:
    assert encode_values(np.repeat(VALUES, 2)[::2], codec) == BLOBS[codec]


def test_zeros_are_small_and_come_back() -> None:
    values = np.zeros(2**20, np.float32)
    for codec in CODECS:
        blob = encode_values(values, codec)
        assert len(blob) < 1000
        assert decode_values(blob, None, values.size).tobytes() == values.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_encoded(codec: Codec, value: float) -> None:
    with pytest.raises(BadValue, match="not all finite"):
        encode_values(np.array([1, value], np.float32), codec)


def test_more_values_than_a_run_has_are_not_encoded() -> None:
    values = np.broadcast_to(np.float32(0), MAX_BLOB_WEIGHTS + 1)
    assert peak_of(lambda: encode_values(values, "int8"), TooLarge) < 100_000


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CODECS), st.data())
def test_a_changed_byte_is_refused_by_its_hash(codec: Codec, data: st.DataObject) -> None:
    good = BLOBS[codec]
    place, change = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255))
    hostile = good[:place] + bytes([good[place] ^ change]) + good[place + 1 :]
    with pytest.raises(BadValue, match="hash"):
        decode_values(hostile, short_hash(good), VALUES.size)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(CODECS), st.data())
def test_whoever_names_it_values_are_finite_and_of_the_runs_size(codec: Codec, data: st.DataObject) -> None:
    good = BLOBS[codec]
    place, removed = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 6))
    hostile = good[:place] + data.draw(st.binary(max_size=6)) + good[place + removed :]
    try:
        found = decode_values(hostile, short_hash(hostile), VALUES.size)
    except NAMED:
        return
    assert found.shape == VALUES.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.int8, 130), hnp.arrays(np.float32, 2, elements=st.floats(width=32)))
def test_any_codes_and_scales_are_finite_values_or_refused(codes: np.ndarray, scales: np.ndarray) -> None:
    try:
        found = decode_values(blob_of(3, 130, codes, scales), None, 130)
    except BadValue:
        return
    assert found.tolist() == [float(np.float32(int(q)) * scales[j // BLOCK]) for j, q in enumerate(codes)]
    assert np.isfinite(found).all()


CODES_, SCALES_ = quantise(VALUES, "int8")
F32 = BLOBS["float32"]


def scales(value: float) -> np.ndarray:
    return np.array([1, value, 1], np.float32)


@pytest.mark.parametrize(
    ("blob", "refusal"),
    [
        (b"", Truncated),
        (F32[:12], Truncated),
        (F32[:13], TooLarge),
        (F32[:-1], BadValue),
        (F32 + b"\0", BadValue),
        (F32 + F32[13:], BadValue),
        (b"MKSNAP\x01\n" + F32[8:], BadMagic),
        (b"MKVALS\x02\n" + F32[8:], BadMagic),
        (blob_of(0, 300, VALUES), UnknownType),
        (blob_of(4, 300, VALUES), UnknownType),
        (blob_of(1, 301, VALUES), BadValue),
        (blob_of(1, 300, VALUES[1:]), BadValue),
        (blob_of(2, 300, VALUES), BadValue),
        (blob_of(1, 300, np.full(300, np.nan, np.float32)), BadValue),
        (blob_of(2, 300, np.full(300, 0x7F80, np.uint16)), BadValue),
        (blob_of(3, 300, CODES_), BadValue),
        (blob_of(3, 300, CODES_, SCALES_[1:]), BadValue),
        (blob_of(3, 300, np.full(300, -128, np.int8), SCALES_), BadValue),
        *((blob_of(3, 300, CODES_, scales(value)), BadValue) for value in (np.nan, np.inf, -1.0, 2.0**-127)),
        (blob_of(3, 300, CODES_, scales(float(np.nextafter(LARGEST_SCALE, np.float32(np.inf))))), BadValue),
        (F32 + bytes(largest_blob(300)), TooLarge),
    ],
    ids=range(24),
)
def test_hostile_blobs_are_refused(blob: bytes, refusal: type[WireError]) -> None:
    assert peak_of(lambda: decode_values(blob, None, 300), refusal) < 100_000


def test_declared_sizes_and_bombs_allocate_nothing() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 * 2**20))
    for code, width in ((1, 4), (2, 2), (3, 1)):
        for size, packed in ((2**26, bytes(40)), (2**26 // width, bomb[:-2]), (300, bomb)):
            hostile = MAGIC + struct.pack("<BI", code, size) + packed
            assert peak_of(lambda: decode_values(hostile, None, 300), WireError) < 200_000  # noqa: B023
    hostile = MAGIC + struct.pack("<BI", 1, MAX_BLOB_WEIGHTS) + bytes(100)
    assert peak_of(lambda: decode_values(hostile, None, MAX_BLOB_WEIGHTS), TooLarge) < 100_000
    huge = MAGIC + struct.pack("<BI", 1, 2**32 - 1) + bytes(100)
    assert peak_of(lambda: decode_values(huge, None, 2**32 - 1), TooLarge) < 100_000
