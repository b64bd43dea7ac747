"""⟨g_p, z⟩ has one order of summation: the ledger keeps it, and everybody recomputes it to the bit."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.core.directions import direction
from meerkat_mq.core.gradip import LARGEST, by_lane, gradip, inner_product, inner_products, tree_sum
from meerkat_mq.core.path import seed_for

RUN = bytes(range(16))
SINGLE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SIZES = [*range(1, 34), 63, 64, 65, 100, 1000, 1023, 1025, 5000]


def pairwise_fold(values: list[float]) -> float:
    """Padded with zeros to a power of two, then the upper half is added to the lower until one value is left."""
    while len(values) & (len(values) - 1):
        values = [*values, 0.0]
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@pytest.mark.parametrize("size", SIZES)
def test_the_sum_is_a_fold_of_halves_to_the_bit(size: int) -> None:
    values = direction("mk1", size, 0, size).astype(np.float64) ** 3
    assert bits(tree_sum(values.copy())) == bits(pairwise_fold(values.tolist()))
    if size >= 1000:
        assert tree_sum(values.copy()) != sum(values.tolist())  # another order gives other bits


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=40))
def test_any_sum_is_that_fold(values: list[float]) -> None:
    assert tree_sum(np.array(values)) == pairwise_fold(values)


@pytest.mark.parametrize("size", [1, 3, 24, 1000, 5000])
@pytest.mark.parametrize("stream", ["mk1", "rademacher"])
def test_an_inner_product_is_close_to_the_exact_one(size: int, stream: str) -> None:
    g_p, z = direction("mk1", 5, 0, size), direction(stream, 6, 0, size)
    exact = math.fsum(a * b for a, b in zip(g_p.tolist(), z.tolist(), strict=True))
    found = inner_product(g_p, z)
    assert found == float(np.float32(found))
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-9)


@given(st.lists(st.tuples(SINGLE, SINGLE), min_size=1, max_size=20))
def test_an_inner_product_is_finite_and_changes_nothing(pairs: list[tuple[float, float]]) -> None:
    g_p, z = (np.array(values, np.float32) for values in zip(*pairs, strict=True))
    before = g_p.tobytes() + z.tobytes()
    assert math.isfinite(inner_product(g_p, z))
    assert g_p.tobytes() + z.tobytes() == before


def test_what_no_float32_holds_is_the_largest_and_a_zero_has_no_sign() -> None:
    huge, tiny = np.array([3e38, 3e38], np.float32), np.array([1e-30, 1e-30], np.float32)
    assert (inner_product(huge, huge), inner_product(huge, -huge)) == (LARGEST, -LARGEST)
    assert math.copysign(1.0, inner_product(tiny, -tiny)) == 1.0


def test_the_products_of_a_round_are_those_of_its_seeds() -> None:
    g_p = direction("mk1", 1, 0, 50)
    found = inner_products(g_p, RUN, 7, lanes=2, steps=3, stream="rademacher")
    assert found == tuple(
        tuple(inner_product(g_p, direction("rademacher", seed_for(RUN, 7, lane, t), 0, 50)) for t in range(3))
        for lane in range(2)
    )


def test_gradip_is_the_scalar_times_the_product_as_far_as_the_path_goes() -> None:
    assert gradip((2.0, -3.0), (0.5, 4.0, 9.0)) == (1.0, -12.0)


def test_a_round_that_is_not_measured_has_no_products() -> None:
    assert by_lane((), 0) == ()
    assert by_lane((1.0, 2.0, 3.0, 4.0), 2) == ((1.0, 2.0), (3.0, 4.0))
