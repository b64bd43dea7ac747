"""When a snapshot is the cheaper way back."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.core.path import NO_DIGEST, Coefficient, Entry
from meerkat_mq.ledger.snapshots import Stretch, snapshot_is_cheaper
from meerkat_mq.wire.frames import encode_entry

MILLION = 1_000_000
SNAPSHOT_BYTES = 3_400_000


def rounds(count: int, terms: int = 1) -> Stretch:
    return Stretch(count, count * (38 + 8 * terms))


@given(st.lists(st.integers(0, 30), max_size=20))
def test_terms_are_counted_from_the_bytes(counts: list[int]) -> None:
    entries = [Entry(i, (Coefficient(0, 0, 0.5),) * count, NO_DIGEST, NO_DIGEST) for i, count in enumerate(counts)]
    found = Stretch(len(entries), sum(len(encode_entry(entry)) for entry in entries))
    assert found.terms == sum(counts)


@pytest.mark.parametrize(
    ("missed", "after", "cheaper"),
    [(1, 0, False), (100, 50, False), (10_000, 0, True), (10_000, 499, True), (10_000, 9_900, False), (700, 0, True)],
)
def test_a_million_weights(missed: int, after: int, cheaper: bool) -> None:
    found = snapshot_is_cheaper(
        rounds(missed), rounds(after), weights=MILLION, snapshot_bytes=SNAPSHOT_BYTES, digest_every=1
    )
    assert found is cheaper


def test_more_terms_and_more_digests_make_entries_dearer() -> None:
    def cheaper(terms: int, digest_every: int) -> bool:
        return snapshot_is_cheaper(
            rounds(500, terms), rounds(0), weights=MILLION, snapshot_bytes=SNAPSHOT_BYTES, digest_every=digest_every
        )

    assert [cheaper(1, 1), cheaper(4, 1), cheaper(2, 10**6), cheaper(2, 1)] == [False, True, False, True]


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**7))
def test_a_snapshot_that_spares_nothing_is_never_cheaper(missed: int, snapshot_bytes: int, weights: int) -> None:
    same = rounds(missed)
    assert not snapshot_is_cheaper(same, same, weights=weights, snapshot_bytes=snapshot_bytes, digest_every=1)


def test_displacements_make_entries_dearer_by_their_bytes() -> None:
    missed = rounds(10)
    assert not snapshot_is_cheaper(
        missed, rounds(0), weights=MILLION, snapshot_bytes=SNAPSHOT_BYTES, digest_every=1
    )  # fmt: skip
    displaced = replace(missed, displaced=10 * SNAPSHOT_BYTES)
    assert snapshot_is_cheaper(displaced, rounds(0), weights=MILLION, snapshot_bytes=SNAPSHOT_BYTES, digest_every=1)
