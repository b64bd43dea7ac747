"""Snapshots: round trips, and "a mutated snapshot is the same or is refused with a named error"."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.directions import direction
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import BadValue, WireError
from meerkat_mq.wire.snapshot import decode_snapshot, encode_snapshot
from tests.support.memory import peak_of

RUN, HEAD = bytes(range(16)), bytes(range(16, 32))
THETA = direction("mk1", 3, 0, 200)
BLOB = encode_snapshot(RUN, 77, HEAD, THETA)
NAMED = tuple(WireError.__subclasses__())
U32 = st.integers(0, 2**32 - 1)
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
HASH = st.binary(min_size=16, max_size=16)


@settings(max_examples=100, deadline=None)
@given(HASH, U32, HASH, st.lists(F32, min_size=1, max_size=50))
def test_every_snapshot_round_trips(run_id: bytes, version: int, head: bytes, values: list[float]) -> None:
    theta = np.array(values, np.float32)
    blob = encode_snapshot(run_id, version, head, theta)
    found = decode_snapshot(blob, short_hash(blob), theta.size)
    assert (found.run_id, found.version, found.head) == (run_id, version, head)
    assert found.theta.tobytes() == theta.tobytes()
    assert found.theta.dtype == np.float32


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_by_its_hash(place: int, change: int) -> None:
    hostile = BLOB[:place] + bytes([BLOB[place] ^ change]) + BLOB[place + 1 :]
    with pytest.raises(BadValue, match="hash"):
        decode_snapshot(hostile, short_hash(BLOB), THETA.size)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(BLOB) - 1), st.binary(max_size=6), st.integers(0, 6))
def test_whoever_names_it_theta_is_what_its_digest_says(place: int, put: bytes, cut: int) -> None:
    hostile = BLOB[:place] + put + BLOB[place + cut :]
    try:
        found = decode_snapshot(hostile, short_hash(hostile), THETA.size)
    except NAMED:
        return
    assert found.theta.tobytes() == THETA.tobytes()


def test_a_theta_that_is_not_finite_is_none() -> None:
    blob = encode_snapshot(RUN, 77, HEAD, np.array([1, np.inf], np.float32))
    with pytest.raises(BadValue, match="snapshot: theta is not finite"):
        decode_snapshot(blob, short_hash(blob), 2)


def test_a_snapshot_of_another_size_allocates_nothing() -> None:
    blob = encode_snapshot(RUN, 77, HEAD, np.zeros(2**22, np.float32))
    words = "4194304 weights, expected 200"
    assert peak_of(lambda: decode_snapshot(blob, short_hash(blob), 200), BadValue, words) < 60_000
