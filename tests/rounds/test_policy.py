"""The rules that need no state."""

import math
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.path import Coefficient, Entry
from meerkat_mq.errors import ConfigError
from meerkat_mq.rounds.policy import (
    NEWEST_ENTRY_BYTES,
    applicable,
    deadline_length,
    default_lanes,
    fewest_needed,
    newest_that_fit,
    sample,
    share,
    terms_of,
)
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.wire.frames import encode_entry
from tests.rounds.support import RUN, chain, settings

TRIMMED = {"aggregate": "trimmed-mean", "lr": 1.0}


def record(slot: int, *scalars: float, weight: int = 1, verdict: Verdict = Verdict.ACCEPTED) -> UpdateRecord:
    return UpdateRecord(0, f"n{slot}", slot, 1, weight, scalars, 1.0, verdict)


def refused(slot: int, *scalars: float, verdict: Verdict = Verdict.NOT_FINITE) -> UpdateRecord:
    return record(slot, *scalars, verdict=verdict)


def early(slot: int, *scalars: float) -> UpdateRecord:
    return record(slot, *scalars, verdict=Verdict.EARLY_STOPPED)


@pytest.mark.parametrize(
    ("part", "count", "expected"),
    [(0.55, 100, 55), (0.07, 100, 7), (0.28, 25, 7), (0.5, 3, 2), (1.0, 7, 7), (1e-12, 5, 1), (0.34, 3, 2)],
)
def test_a_share_is_rounded_up_once(part: float, count: int, expected: int) -> None:
    assert share(part, count) == expected


def test_the_sample_is_the_same_for_everybody_and_depends_on_the_round() -> None:
    assert sample(RUN, 3, range(20), 0.25) == sample(RUN, 3, reversed(range(20)), 0.25)
    assert len({sample(RUN, version, range(20), 0.25) for version in range(20)}) > 10
    assert sample(RUN, 3, [], 0.25) == frozenset()


def test_over_many_rounds_every_slot_is_sampled_about_equally_often() -> None:
    counts = [sum(slot in sample(RUN, version, range(8), 0.5) for version in range(400)) for slot in range(8)]
    assert all(150 < count < 250 for count in counts)


def test_the_deadline_doubles_to_ten_times() -> None:
    rules, attempts = settings(deadline_s=3.0), (0, 1, 2, 3, 4, 5, 2**16)
    assert [deadline_length(rules, 0, attempt) for attempt in attempts] == [3, 6, 12, 24, 30, 30, 30]


@pytest.mark.parametrize(("calibration_steps", "deadline_s"), [(40, 12.0), (4, 3.0)])
def test_a_calibration_may_take_as_much_longer_as_it_has_more_steps(calibration_steps: int, deadline_s: float) -> None:
    config = EarlyStoppingConfig(by="random", calibration_steps=calibration_steps)
    rules = settings(deadline_s=3.0, steps=10, early_stopping=config)
    assert [deadline_length(rules, version, 0) for version in (0, 1)] == [deadline_s, 3.0]
    assert deadline_length(rules, 0, 9) == 10 * deadline_s


def test_the_fewest_that_a_round_may_need() -> None:
    config = EarlyStoppingConfig(by="random", calibration_steps=10)
    rules = settings(min_nodes=10, fraction=0.5, quorum=0.6, steps=5, early_stopping=config)
    assert [fewest_needed(rules, version) for version in (0, 1)] == [6, 3]  # all ten are asked to calibrate


@pytest.mark.parametrize(("scalar", "fits"), [(0.0, True), (-1e19, True), (2e19, False), (-2e38, False)])
def test_what_can_be_applied(scalar: float, fits: bool) -> None:
    assert applicable((1.0, scalar), 1.0) is fits


@pytest.mark.parametrize(
    ("changes", "records", "expected"),
    [
        ({}, [record(0, 1.0), record(1, 3.0)], [(0, 0, 1.0)]),
        ({"lanes": 2}, [record(0, 1.0), record(1, 3.0)], [(0, 0, 0.25), (1, 0, 0.75)]),
        ({"lanes": 2}, [record(1, 3.0), record(3, 1.0)], [(1, 0, 1.0)]),
        ({"lanes": 2}, [record(0, 1.0), record(2, -1.0), record(1, 6.0)], [(1, 0, 1.0)]),
        ({"steps": 2}, [record(0, 1.0, 2.0), record(1, 3.0)], [(0, 0, 1.0), (0, 1, 0.5)]),
        ({}, [record(0, 1.0, weight=3), record(1, 5.0)], [(0, 0, 1.0)]),
        ({}, [record(0, 1.0), refused(1, math.nan), record(2, 3.0)], [(0, 0, 1.0)]),
        ({"lanes": 2}, [record(0, 1.0), refused(1, 1e9, verdict=Verdict.OUTLIER)], [(0, 0, 0.5)]),
        ({}, [refused(0, 1.0, verdict=Verdict.AGAINST), refused(1, math.inf)], []),
        ({}, [], []),
        ({"steps": 3}, [record(0, 1.0, 2.0, 3.0), early(1, 3.0, 8.0, 9.0)], [(0, 0, 1.0), (0, 1, 0.5), (0, 2, 0.75)]),
        ({"steps": 2, "lanes": 2}, [early(0, 4.0, 9.0), early(1, 8.0, 9.0)], [(0, 0, 1.0), (1, 0, 2.0)]),
        ({"perturbations": 2}, [record(0, 1.0, 4.0), record(1, 3.0, 8.0)], [(0, 0, 0.5), (0, 1, 1.5)]),
        (
            {"perturbations": 2, "steps": 2},
            [record(0, 1.0, 2.0, 3.0, 4.0), early(1, 3.0, 2.0, 1.0, 4.0)],
            [(0, 0, 0.5), (0, 1, 0.5), (0, 2, 0.375), (0, 3, 0.5)],
        ),
    ],
    ids=[
        "mean", "lanes", "empty lane", "zero", "short", "weights", "NaN", "refused", "all refused", "nobody",
        "early-stopped", "all early-stopped", "two perturbations", "early-stopped with two perturbations",
    ],
)  # fmt: skip
def test_terms(changes: dict[str, Any], records: list[UpdateRecord], expected: list[tuple[int, int, float]]) -> None:
    assert terms_of(records, settings(**changes), 0) == tuple(Coefficient(*term) for term in expected)


@pytest.mark.parametrize(
    ("changes", "records", "expected"),
    [
        ({}, [record(slot, g) for slot, g in enumerate([1e6, 1.0, 2.0, 6.0, -1e6])], [(0, 0, 3.0)]),
        ({"trim": 0.4}, [record(slot, g) for slot, g in enumerate([1e6, 1.0, 2.0, 6.0, -1e6])], [(0, 0, 2.0)]),
        ({"trim": 0.1}, [record(slot, g) for slot, g in enumerate([1.0, 2.0, 3.0, 6.0])], [(0, 0, 3.0)]),
        ({"trim": 0.29}, [record(slot, float(slot)) for slot in range(100)], [(0, 0, 49.5)]),
        ({"trim": 0.49}, [record(0, 1.0), record(1, 5.0)], [(0, 0, 3.0)]),
        ({"trim": 0.4999999999}, [record(0, 1.0), record(1, 5.0)], [(0, 0, 3.0)]),
        (
            {"lanes": 2, "trim": 0.34},
            [record(0, 1.0), record(2, 4.0, weight=2), record(4, 9.0), record(1, 6.0, weight=4)],
            [(0, 0, 2.0), (1, 0, 3.0)],
        ),
        ({"trim": 0.34}, [record(0, 2.0, weight=5), record(1, 2.0), record(2, 2.0, weight=3)], [(0, 0, 2.0)]),
        (
            {"steps": 2, "trim": 0.34},
            [record(0, 1.0, 8.0), record(1, 2.0), record(2, 9.0)],
            [(0, 0, 2.0), (0, 1, 8 / 3)],
        ),
        ({"trim": 0.34}, [record(0, 1.0), record(1, 2.0), refused(2, 1e9), record(3, 3.0)], [(0, 0, 2.0)]),
        ({}, [refused(0, 1.0)], []),
    ],
    ids=[
        "one at each end", "two", "none of four", "0.29 of 100", "none of two", "never all", "lanes and weights",
        "ties", "short", "refused", "all refused",
    ],
)  # fmt: skip
def test_a_trimmed_mean(
    changes: dict[str, Any], records: list[UpdateRecord], expected: list[tuple[int, int, float]]
) -> None:
    found = terms_of(records, settings(**TRIMMED | changes), 0)
    assert found == tuple(Coefficient(lane, step, float(np.float32(c))) for lane, step, c in expected)


single = st.floats(-(2.0**100), 2.0**100, width=32)
verdicts = st.sampled_from(Verdict)
fleets = st.lists(st.tuples(single, st.integers(1, 2**24), verdicts), min_size=1, max_size=12)
COUNT = {Verdict.ACCEPTED, Verdict.EARLY_STOPPED}
aggregates = st.sampled_from(["mean", "trimmed-mean"])


@given(fleets, st.integers(1, 3), aggregates, st.sampled_from([0.1, 0.2, 0.25, 0.4]), st.randoms(use_true_random=False))
def test_terms_do_not_depend_on_order_nor_on_the_refused(
    fleet: list[tuple[float, int, Verdict]], lanes: int, aggregate: str, trim: float, rng: Random
) -> None:
    rules = settings(lanes=lanes, min_nodes=lanes, aggregate=aggregate, trim=trim)
    records = [record(slot, g, weight=weight, verdict=verdict) for slot, (g, weight, verdict) in enumerate(fleet)]
    changed = [
        found if found.verdict in COUNT else replace(found, scalars=(math.nan,), weight=1)
        for found in records
        if found.verdict in COUNT or rng.random() < 0.5
    ]
    rng.shuffle(changed)
    assert terms_of(changed, rules, 0) == terms_of(records, rules, 0)


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=4, max_size=12), st.lists(single, max_size=3))
def test_a_trimmed_mean_stays_among_the_honest(honest: list[float], poison: list[float]) -> None:
    records = [record(slot, g) for slot, g in enumerate([*poison, *honest])]
    trim = min(0.49, len(poison) / len(records) + 1e-6) if poison else 0.1
    found = terms_of(records, settings(**TRIMMED, trim=trim), 0)
    c = found[0].coefficient if found else 0.0
    assert np.float32(min(honest)) <= c <= np.float32(max(honest))


@given(st.lists(st.tuples(single, st.integers(1, 2**24)), min_size=1, max_size=9))
def test_where_nothing_is_left_out_a_trimmed_mean_is_the_mean_to_the_bit(fleet: list[tuple[float, int]]) -> None:
    records = [record(slot, g, weight=weight) for slot, (g, weight) in enumerate(fleet)]
    assert terms_of(records, settings(**TRIMMED, trim=0.1), 0) == terms_of(records, settings(lr=1.0), 0)


def test_the_newest_entries_that_fit() -> None:
    ledger = chain(5)
    size = len(encode_entry(ledger[0]))
    assert newest_that_fit(ledger, 3 * size) == tuple(ledger[2:])
    assert newest_that_fit(ledger, 3 * size - 1) == tuple(ledger[3:])
    assert newest_that_fit(ledger, size - 1) == tuple(ledger[4:])
    assert newest_that_fit([]) == ()


@pytest.mark.parametrize(("terms", "fits"), [(130, True), (2043, True), (2044, False)])
def test_the_newest_entry_fits_up_to_16_kib_and_brings_no_others(terms: int, fits: bool) -> None:
    (first,) = chain(1)
    long = Entry(1, (Coefficient(0, 0, 1.0),) * terms, first.hash(RUN), bytes(16))
    assert (len(encode_entry(long)) <= NEWEST_ENTRY_BYTES) is fits
    assert newest_that_fit([first, long]) == ((long,) if fits else ())
    (after,) = chain(1, start=2, previous=long.hash(RUN))
    assert newest_that_fit([first, long, after]) == (after,)  # a node that is one round late asks


def test_more_lanes_than_nodes_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"rounds\.directions: 3 lanes are more than the 2 nodes"):
        settings(lanes=3, min_nodes=4, fraction=0.5)


@pytest.mark.parametrize(
    ("nodes", "fraction", "lanes"), [(1, 1.0, 1), (4, 1.0, 1), (6, 1.0, 2), (8, 1.0, 2), (12, 0.5, 2)]
)
def test_each_lane_has_three_nodes_by_default(nodes: int, fraction: float, lanes: int) -> None:
    assert default_lanes(nodes, fraction) == lanes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 600, "perturbations": 2}, r"rounds\.local_steps: 600 × 2 perturbations"),
        ({"steps": 1000, "lanes": 13, "min_nodes": 13}, r"rounds\.local_steps: 1000 × 1 perturbations × 13 lanes"),
        (
            {"steps": 2, "perturbations": 11, "early_stopping": EarlyStoppingConfig(by="random")},
            r"early_stopping\.calibration_steps: 200 × 11",
        ),
        ({"steps": 2, "early_stopping": EarlyStoppingConfig(by="vpcs")}, r"early_stopping\.by: vpcs needs"),
    ],
)
def test_rounds_that_cannot_be_are_refused_in_words(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"perturbations": 1000},
        {"lanes": 1000, "min_nodes": 1000},
        {"perturbations": 11, "early_stopping": EarlyStoppingConfig(by="random")},
    ],
)
def test_the_length_of_a_calibration_that_never_comes_matters_to_nobody(changes: dict[str, Any]) -> None:
    assert settings(**changes).steps_of(0) == 1
