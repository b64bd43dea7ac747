import hashlib
import math
import struct
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.directions import direction
from meerkat_mq.core.path import (
    Coefficient,
    Displacement,
    Entry,
    apply,
    apply_terms,
    coefficient,
    digest,
    digest_due,
    seed_for,
    short_hash,
)
from meerkat_mq.errors import BadValue

SCALARS = st.floats(width=32, allow_nan=False, allow_infinity=False)
RUN = bytes(range(16))


def test_a_seed_is_the_hash_of_its_place() -> None:
    expected = hashlib.sha256(RUN + struct.pack("<III", 5, 6, 7)).digest()[:8]
    assert seed_for(RUN, 5, 6, 7) == int.from_bytes(expected, "little")
    assert len({seed_for(RUN, v, lane, t) for v in range(5) for lane in range(5) for t in range(5)}) == 125


def test_arrival_order_does_not_change_a_coefficient() -> None:
    scalars = [(1, 1e30), (7, -3.25), (1, -1e30), (2**24, 1e-20), (3, 0.1)]
    exact = [(n, float(np.float32(g))) for n, g in scalars]
    assert len({coefficient(0.01, order, 2**24 + 12) for order in permutations(exact)}) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2**24), SCALARS), max_size=20), st.floats(1e-8, 1.0))
def test_a_coefficient_is_the_exact_mean_rounded(scalars: list[tuple[int, float]], lr: float) -> None:
    total = sum(n for n, _ in scalars) + 1
    exact = sum((Fraction(n) * Fraction(g) for n, g in scalars), Fraction(0))
    c = coefficient(lr, scalars, total)
    assert c == float(np.float32(lr * (float(exact) / total)))
    assert math.copysign(1, c) == 1 or c < 0


@pytest.mark.parametrize(
    ("lr", "scalars", "total"),
    [
        (1.0, [(0, 1.0)], 1),
        (1.0, [(2**32 + 1, 1.0)], 2**33),
        (1.0, [], 0),
        (math.nan, [(1, 1.0)], 1),
        (math.inf, [(1, 1.0)], 1),
        (1e3, [(1, 3e38)], 1),
        (1.0, [(1, math.nan)], 1),
        (1.0, [(1, math.inf), (1, -math.inf)], 2),
    ],
)
def test_what_is_not_finite_or_out_of_range_is_refused(lr: float, scalars: list[tuple[int, float]], total: int) -> None:
    with pytest.raises(BadValue):
        coefficient(lr, scalars, total)


def test_apply_rounds_after_the_product_and_after_the_difference() -> None:
    theta = np.array([1.0, 1.0, -3.5], np.float32)
    z = np.array([1 + 2**-23, 1 + 2**-12, 0.1], np.float32)
    c = float(np.float32(1 + 2**-12))
    expected = [np.float32(float(t) - float(np.float32(c * float(v)))) for t, v in zip(theta, z, strict=True)]
    apply(theta, z, c, np.empty_like(z))
    assert theta.tolist() == [float(value) for value in expected]


def test_terms_apply_in_order_zeros_included() -> None:
    start = direction("mk1", 1, 0, 100)
    terms = (Coefficient(0, 0, 0.5), Coefficient(1, 0, 0.0), Coefficient(0, 1, -0.25))
    theta = start.copy()
    apply_terms(theta, terms, lambda term: 10 * term.lane + term.step, "mk1")
    expected = start - direction("mk1", 0, 0, 100) * np.float32(0.5)
    expected = expected - direction("mk1", 10, 0, 100) * np.float32(0)
    expected = expected - direction("mk1", 1, 0, 100) * np.float32(-0.25)
    assert np.array_equal(theta, expected)
    zeros = np.full(64, -0.0, np.float32)
    apply_terms(zeros, (Coefficient(0, 0, 0.0),), lambda term: 0, "rademacher")
    assert np.array_equal(np.signbit(zeros), direction("rademacher", 0, 0, 64) > 0)


def test_a_digest_is_the_hash_of_little_endian_bytes() -> None:
    theta = np.array([1.5, -0.0, 1e-45], np.float32)
    expected = hashlib.sha256(struct.pack("<3f", 1.5, -0.0, 1e-45)).digest()[:16]
    assert digest(theta) == expected
    assert digest(np.repeat(theta, 2)[::2]) == expected
    assert digest(theta[::-1]) != expected


def test_every_field_of_an_entry_enters_its_hash() -> None:
    entry = Entry(3, (Coefficient(1, 2, 0.5),), bytes(16), bytes(range(16)))
    packed = struct.pack("<IIHHf", 3, 1, 1, 2, 0.5)
    assert entry.hash(RUN) == short_hash(RUN + packed + bytes(16) + bytes(range(16)))
    others = [
        Entry(4, entry.terms, entry.previous, entry.digest),
        Entry(3, (), entry.previous, entry.digest),
        Entry(3, (Coefficient(0, 2, 0.5),), entry.previous, entry.digest),
        Entry(3, (Coefficient(1, 1, 0.5),), entry.previous, entry.digest),
        Entry(3, (Coefficient(1, 2, -0.5),), entry.previous, entry.digest),
        Entry(3, entry.terms, b"\1" * 16, entry.digest),
        Entry(3, entry.terms, entry.previous, b"\1" * 16),
        Entry(3, (Coefficient(1, 2, 0.5, 1),), entry.previous, entry.digest),
        Entry(3, (Coefficient(1, 2, 0.5, 2),), entry.previous, entry.digest),
        Entry(3, entry.terms, entry.previous, entry.digest, Displacement(bytes(16), 1)),
        Entry(3, entry.terms, entry.previous, entry.digest, Displacement(bytes(16), 2)),
        Entry(3, entry.terms, entry.previous, entry.digest, Displacement(b"\1" * 16, 1)),
        Entry(3, (Coefficient(1, 2, 0.5, 1),), entry.previous, entry.digest, Displacement(bytes(16), 1)),
    ]
    hashes = {other.hash(RUN) for other in others} | {entry.hash(RUN), entry.hash(bytes(16))}
    assert len(hashes) == len(others) + 2


def test_digests_are_due_at_multiples() -> None:
    assert [v for v in range(10) if digest_due(v, 3)] == [0, 3, 6, 9]


@given(st.lists(st.tuples(st.integers(1, 2**24), st.floats(-(2.0**99), 2.0**99, width=32)), min_size=1, max_size=9))
def test_a_staleness_weight_of_one_changes_no_bit(scalars: list[tuple[int, float]]) -> None:
    total = sum(weight for weight, _ in scalars)
    in_256ths = [(256 * weight, scalar) for weight, scalar in scalars]
    assert coefficient(1e-3, in_256ths, 256 * total) == coefficient(1e-3, scalars, total)
