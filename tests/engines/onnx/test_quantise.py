"""What blocks give back gives the same blocks again: else there would be no base that everybody holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.engines.onnx.quantise import BLOCK, LARGEST, dequantised, quantised


@pytest.mark.parametrize("largest", LARGEST.values())
@given(seed=st.integers(0, 2**32), exponent=st.integers(-45, 36), columns=st.sampled_from([1, 31, 32, 80]))
def test_blocks_of_what_blocks_give_back_are_the_same(largest: int, seed: int, exponent: int, columns: int) -> None:
    values = np.random.default_rng(seed).standard_normal((5, columns)).astype(np.float32) * np.float32(10.0**exponent)
    levels, scales = quantised(values, largest)
    base = dequantised(levels, scales)
    again, scales_again = quantised(base, largest)
    np.testing.assert_array_equal(again, levels)
    np.testing.assert_array_equal(scales_again, scales)
    np.testing.assert_array_equal(dequantised(again, scales_again), base)
    assert np.abs(levels).max() <= largest


@pytest.mark.parametrize(("largest", "worst"), [(127, 0.004), (7, 0.073)])
def test_no_value_is_off_by_more_than_half_a_level(largest: int, worst: float) -> None:
    values = np.random.default_rng(3).standard_normal((300, 96)).astype(np.float32)
    found = dequantised(*quantised(values, largest))
    peaks = np.abs(values.reshape(300, -1, BLOCK)).max(axis=2).repeat(BLOCK, axis=1)
    assert float((np.abs(found - values) / peaks).max()) < worst


def test_zeros_and_values_below_every_scale_become_zero() -> None:
    values = np.array([[0.0] * 32 + [1e-42] * 32], np.float32)
    levels, scales = quantised(values, 127)
    assert not levels.any()
    assert scales.tolist() == [[1.0, 1.0]]
