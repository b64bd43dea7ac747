"""The rules that need no state."""

from typing import Any

import pytest

from meerkat_mq.core.path import Term
from meerkat_mq.errors import ConfigError
from meerkat_mq.rounds.events import UpdateRecord
from meerkat_mq.rounds.policy import (
    applicable,
    deadline_length,
    default_lanes,
    fewest_needed,
    newest_that_fit,
    sample,
    share,
    terms_of,
)
from meerkat_mq.wire.frames import encode_entry
from tests.rounds.support import RUN, chain, settings


def record(slot: int, *scalars: float, weight: int = 1) -> UpdateRecord:
    return UpdateRecord(0, f"n{slot}", slot, 1, weight, scalars, 1.0)


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
    assert [deadline_length(3.0, attempt) for attempt in (0, 1, 2, 3, 4, 5, 2**16)] == [3, 6, 12, 24, 30, 30, 30]


def test_the_fewest_that_a_round_may_need() -> None:
    assert fewest_needed(settings(min_nodes=10, fraction=0.5, quorum=0.6)) == 3


@pytest.mark.parametrize(("scalar", "fits"), [(0.0, True), (-1e38, True), (2e38, False), (-2e38, False)])
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
        ({}, [], []),
    ],
    ids=["mean", "lanes", "empty lane", "zero", "short", "weights", "nobody"],
)
def test_terms(changes: dict[str, Any], records: list[UpdateRecord], expected: list[tuple[int, int, float]]) -> None:
    assert terms_of(records, settings(**changes)) == tuple(Term(*term) for term in expected)


def test_the_newest_entries_that_fit() -> None:
    ledger = chain(5)
    size = len(encode_entry(ledger[0]))
    assert newest_that_fit(ledger, 3 * size) == tuple(ledger[2:])
    assert newest_that_fit(ledger, 3 * size - 1) == tuple(ledger[3:])
    assert newest_that_fit(ledger, size - 1) == ()


def test_more_lanes_than_nodes_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"rounds\.directions: 3 lanes are more than the 2 nodes"):
        settings(lanes=3, min_nodes=4, fraction=0.5)


@pytest.mark.parametrize(
    ("nodes", "fraction", "lanes"), [(1, 1.0, 1), (4, 1.0, 1), (6, 1.0, 2), (8, 1.0, 2), (12, 0.5, 2)]
)
def test_each_lane_has_three_nodes_by_default(nodes: int, fraction: float, lanes: int) -> None:
    assert default_lanes(nodes, fraction) == lanes
