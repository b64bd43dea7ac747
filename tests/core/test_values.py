"""What codecs keep, the mean, and error feedback."""

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.values import (
    BLOCK,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Residual,
    mean_displacement,
    quantise,
    quantised,
)
from meerkat_mq.errors import BadValue

CODECS = get_args(Codec)
LARGEST = float(np.finfo(np.float32).max)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = hnp.arrays(np.float32, st.integers(1, 3 * BLOCK), elements=FINITE)


def f32(*values: float) -> Float32Array:
    return np.array(values, np.float32)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from(CODECS))
def test_all_finite_values_stay_finite_and_grids_are_fixed_points(values: Float32Array, codec: Codec) -> None:
    before = values.copy()
    found = quantised(values, codec)
    assert values.tobytes() == before.tobytes()
    assert found.shape == values.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    if codec != "int8":
        assert quantised(found, codec).tobytes() == found.tobytes()


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_bfloat16_is_torchs_rounding_but_never_infinite(values: Float32Array) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    expected = np.where(np.isinf(expected), np.copysign(f32(float.fromhex("0x1.FEp127")), expected), expected)
    assert quantised(values, "bfloat16").tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("value", "kept"),
    [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (-0.0, -0.0), (2.0**-149, 0.0), (2.0**-133, 2.0**-133)],
)
def test_bfloat16_rounds_to_even(value: float, kept: float) -> None:
    assert quantised(f32(value), "bfloat16").tobytes() == f32(kept).tobytes()


def naive_int8(values: Float32Array) -> tuple[list[int], list[float]]:
    """By the definition, one value at a time."""
    codes, scales = list[int](), list[float]()
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK].tolist()
        scale = np.float32(max(map(abs, block))) / np.float32(127)
        scale = np.float32(0) if scale < SMALLEST_SCALE else min(scale, LARGEST_SCALE)
        scales.append(float(scale))
        codes += [max(-127, min(127, round(float(np.float32(x) / scale)))) if scale else 0 for x in block]
    return codes, scales


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_int8_is_its_definition(values: Float32Array) -> None:
    codes, scales = quantise(values, "int8")
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32
    assert (codes.tolist(), scales.tolist()) == naive_int8(values)


def test_int8_blocks_have_their_own_scales_and_zeros_none() -> None:
    values = np.concatenate([f32(127, -63.5, 0.5, 1.5), np.zeros(2 * BLOCK - 4, np.float32), f32(1e-3)])
    codes, scales = quantise(values, "int8")
    assert codes[:4].tolist() == [127, -64, 0, 2]  # ties to even
    assert scales.tolist() == [1, 0, float(f32(1e-3)[0] / np.float32(127))]
    assert not codes[4:-1].any()
    assert quantised(f32(LARGEST, -LARGEST), "int8").tolist() == [LARGEST_SCALE * 127, -LARGEST_SCALE * 127]
    assert quantised(f32(-0.0, 2.0**-149, 120 * 2.0**-126), "int8").tobytes() == bytes(12)


def test_int8_errs_by_half_a_scale() -> None:
    values = direction("mk1", 3, 0, 1000)
    bound = np.repeat(quantise(values, "int8")[1], BLOCK)[: values.size] * np.float32(0.5001)  # type: ignore[operator]
    assert (np.abs(quantised(values, "int8") - values) <= bound).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), hnp.arrays(np.float32, 5, elements=FINITE)), min_size=1, max_size=6))
def test_the_mean_is_summed_in_order_in_float64(parts: list[tuple[float, Any]]) -> None:
    expected = []
    for column in range(5):
        total = 0.0
        for weight, values in parts:
            total += weight * float(values[column])
        expected.append(total)
    with np.errstate(over="ignore"):
        wanted = np.array(expected).astype(np.float32)
    if np.isfinite(wanted).all():
        assert mean_displacement(iter(parts), 5).tobytes() == wanted.tobytes()
    else:
        with pytest.raises(BadValue, match="mean displacement: is not finite"):
            mean_displacement(iter(parts), 5)


def test_the_mean_keeps_what_float32_would_lose() -> None:
    parts = [(0.5, f32(1.0, 1.0)), (0.25, f32(2**-23, 0.0)), (0.25, f32(2**-23, 0.0))]
    assert mean_displacement(parts, 2).tolist() == [0.5 + 2**-24, 0.5]
    assert mean_displacement([], 2).tolist() == [0, 0]


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_heard_and_what_is_left_add_up(codec: Codec) -> None:
    residual, size = Residual(codec, 300), 300
    wanted, heard = np.zeros(size), np.zeros(size)
    for version in range(40):
        displacement = direction("mk1", version, 0, size)
        wanted += displacement
        heard += quantised(residual.add(version, displacement), codec)
        residual.forget(version, heard=True)
    error = np.abs(wanted - heard).max()
    alone = np.abs(quantised(displacement, codec) - displacement).max()
    assert error <= 2 * alone + 1e-5


def test_an_update_that_is_never_heard_changes_nothing() -> None:
    residual = Residual("int8", 3)
    first = residual.add(0, f32(1.0, 0.3, 0.1))
    residual.forget(0, heard=True)
    left = first - quantised(first, "int8")
    assert left.any()
    for version in (1, 2):
        assert residual.add(version, f32(5.0, 0.0, 0.0)).tobytes() == (left + f32(5.0, 0.0, 0.0)).tobytes()
        residual.forget(version, heard=False)
    residual.forget(7, heard=True)
    assert residual.add(3, f32(0, 0, 0)).tobytes() == left.tobytes()


def test_two_updates_on_their_way_count_what_was_left_once() -> None:
    residual, displacements = Residual("int8", 50), [direction("mk1", seed, 0, 50) for seed in range(3)]
    sent = [quantised(residual.add(0, displacements[0]), "int8")]
    residual.forget(0, heard=True)
    sent += [quantised(residual.add(version, displacements[version]), "int8") for version in (1, 2)]
    residual.forget(1, heard=True)
    residual.forget(2, heard=True)
    left = residual.add(3, np.zeros(50, np.float32))
    assert np.allclose(np.sum(sent, axis=0) + left, np.sum(displacements, axis=0), atol=1e-6)
