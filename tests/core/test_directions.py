import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.directions import STREAMS, direction
from meerkat_mq.errors import BadValue

SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STREAMS), SEEDS, st.integers(0, 600), st.integers(0, 600), st.integers(0, 2**40))
def test_any_slice_is_the_same_slice_of_the_whole(stream: str, seed: int, a: int, b: int, base: int) -> None:
    start, stop = sorted((a, b))
    base -= base % 256
    whole = direction(stream, seed, base, base + 600)
    part = direction(stream, seed, base + start, base + stop)
    assert part.dtype == np.float32
    assert np.array_equal(part, whole[start:stop])


@pytest.mark.parametrize("stream", STREAMS)
def test_seeds_and_places_give_other_values(stream: str) -> None:
    first = direction(stream, 1, 0, 512)
    assert not np.array_equal(first, direction(stream, 2, 0, 512))
    assert not np.array_equal(first, direction(stream, 1 + 2**63, 0, 512))
    assert not np.array_equal(first, direction(stream, 1, 512, 1024))


@pytest.mark.parametrize(
    ("stream", "seed", "start", "stop"),
    [("mk2", 0, 0, 1), ("mk1", -1, 0, 1), ("mk1", 2**64, 0, 1), ("mk1", 0, -1, 1), ("mk1", 0, 2, 1)],
)
def test_what_is_out_of_range_is_refused(stream: str, seed: int, start: int, stop: int) -> None:
    with pytest.raises(BadValue):
        direction(stream, seed, start, stop)


def test_mk1_is_standard_normal() -> None:
    z = direction("mk1", 20261123, 0, 2_000_000).astype(np.float64)
    n = z.size
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / n)
    for level, share in ((1.0, 0.3173105), (2.0, 0.0455003), (3.0, 0.0026998), (4.0, 0.0000633)):
        assert abs((np.abs(z) > level).mean() - share) < 4 * np.sqrt(share / n) + 2 / 65536
    for lag in (1, 2, 3, 4, 16, 64):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / np.sqrt(n)


def test_mk1_of_neighbouring_seeds_is_uncorrelated() -> None:
    n = 200_000
    z = np.stack([direction("mk1", seed, 0, n) for seed in range(8)]).astype(np.float64)
    correlations = (z @ z.T / n)[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(n)


def test_rademacher_is_plus_or_minus_one() -> None:
    z = direction("rademacher", 20261123, 3, 1_000_003)
    assert set(np.unique(z).tolist()) == {-1.0, 1.0}
    assert abs(z.astype(np.float64).mean()) < 4e-3
    assert abs((z[1:].astype(np.float64) * z[:-1]).mean()) < 4e-3
