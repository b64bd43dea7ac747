"""The clipped mean, and the cumulative test that goes with it: what a hostile minority of a lane can do."""

import math
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.config import GuardsConfig
from meerkat_mq.rounds.clipping import SIGMAS, clipped
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import terms_of
from meerkat_mq.rounds.records import Verdict
from tests.rounds.support import settings
from tests.rounds.test_guards import WINDOW, Fleet, constant, flipped, record

CLIPPED = {"aggregate": "clipped-mean", "lr": 1.0}
scalars = st.floats(-9, 9, width=32)


@pytest.mark.parametrize(
    ("lane", "entry", "expected"),
    [
        ([1.0, 2.0, 3.0], (), [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 90.0], (), [1.0, 2.0, 2.0 + SIGMAS]),
        ([1.0, 2.0, 3.0, 4.0, -90.0], (), [1.0, 2.0, 3.0, 2.0 + SIGMAS, 2.0 - SIGMAS]),
        ([5.0, 5.0, 5.0, 90.0], (), [5.0, 5.0, 5.0, 5.0]),
        ([1.0, 90.0], (1.0, 90.0), [1.0, 90.0]),
        ([1.0, 90.0], (1.0, 90.0, 2.0, 1.0, 1.5), [1.0, 4.5]),
        ([-90.0], (-90.0, 2.0, 1.0), [-6.0]),
    ],
)
def test_scalars_are_clipped_to_the_lanes_scale(
    lane: Sequence[float], entry: Sequence[float], expected: Sequence[float]
) -> None:
    assert clipped(lane, entry) == pytest.approx(expected)


@given(st.lists(scalars, min_size=5, max_size=9), st.lists(scalars | st.just(1e30), min_size=1, max_size=4))
def test_a_minority_moves_the_mean_no_farther_than_the_others_lie_apart(
    honest: list[float], hostile: list[float]
) -> None:
    hostile = hostile[: (len(honest) - 1) // 2]
    found = clipped([*honest, *hostile], ())
    spread = max(honest) - min(honest)
    assert min(honest) - SIGMAS * spread <= min(found)
    assert max(found) <= max(honest) + SIGMAS * spread


@given(st.lists(scalars, min_size=1, max_size=8), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_order_of_updates_does_not_matter_to_the_clipped_mean(values: list[float], lanes: int, rng: Random) -> None:
    records = [record(0, slot, value) for slot, value in enumerate(values)]
    rules = settings(lanes=lanes, min_nodes=lanes, **CLIPPED)
    expected = terms_of(records, rules, 0)
    rng.shuffle(records)
    assert terms_of(records, rules, 0) == expected


def test_two_of_eight_that_push_back_threefold_do_not_stop_the_lane() -> None:
    """H9: under the plain mean, nothing is left."""
    honest = [0.9, 1.0, 1.1, 1.0, 0.8, 1.2]
    records = [record(0, slot, g) for slot, g in enumerate([*honest, -3.0, -3.0])]
    (term,) = terms_of(records, settings(**CLIPPED), 0)
    assert term.coefficient > 0.6
    (plain,) = terms_of(records, settings(lr=1.0), 0)
    assert abs(plain.coefficient) < 0.01


def cumulative(fleet: Fleet) -> Fleet:
    fleet.guard = Guard(GuardsConfig(), 1, cumulative=True)
    return fleet


@pytest.mark.parametrize(
    "fleet",
    [
        Fleet([1.0] * 8),
        Fleet([1.0] * 8, common=0.0, node=0.0),
        Fleet([1, 1, 1, 3, 1, 0.5, 3, 1], node=1.0),
        Fleet([0.3, 0.5, 1, 1, 1, 1.5, 2, 3], common=0.5, freedom=4),
        Fleet([1, 1, 1, 3, 1, 0.5, 3, 1], common=3.0, node=0.5, freedom=4),
    ],
    ids=["iid", "noise", "larger", "dirichlet", "agreeing"],
)
def test_the_cumulative_test_refuses_few_honest_updates(fleet: Fleet) -> None:
    cumulative(fleet).run(1000)
    refused = sum(verdict != Verdict.ACCEPTED for verdicts in fleet.verdicts for verdict in verdicts)
    assert refused <= 0.005 * sum(map(len, fleet.verdicts))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_pair_that_works_against_a_noisy_lane_is_noticed(factor: float) -> None:
    """H9: the older test wants three quarters of the others to agree in most rounds, and never notices this pair."""
    older, newer = Fleet([1.0] * 8, common=1.0, node=1.0), cumulative(Fleet([1.0] * 8, common=1.0, node=1.0))
    for fleet in (older, newer):
        fleet.run(4 * WINDOW, {1: flipped(factor), 6: flipped(factor)})
    assert older.refused(1) + older.refused(6) <= 1
    assert newer.refused(1) + newer.refused(6) >= WINDOW
    assert {"n1", "n6"} <= set().union(*newer.flagged)
    assert sum(map(newer.refused, [0, 2, 3, 4, 5, 7])) == 0


def test_a_node_that_takes_back_little_of_what_the_others_do_is_not_refused() -> None:
    """As one does whose rows have one label, which its model knows: small scalars, all of which pull against others."""
    older, newer, hostile = (Fleet([1.0] * 8, common=1.0, node=0.5) for _ in range(3))
    older.guard = Guard(GuardsConfig(takes_back=0.0), 1, cumulative=True)
    older.run(2 * WINDOW, {1: flipped(0.2)})
    cumulative(newer).run(2 * WINDOW, {1: flipped(0.2)})
    cumulative(hostile).run(2 * WINDOW, {1: flipped(0.8)})
    assert older.refused(1) > 10
    assert newer.refused(1) == 0
    assert hostile.refused(1) > 30


@pytest.mark.parametrize(
    ("hostile", "trusted"), [((2, 3, 4), ("n0",)), ((1, 2), ("n0",)), ((2, 3, 4, 5), ("n0", "n1"))]
)
def test_a_majority_that_pushes_against_a_trusted_node_is_noticed(
    hostile: tuple[int, ...], trusted: tuple[str, ...]
) -> None:
    size = max(hostile) + 1
    alone, known = (Fleet([1.0] * size, common=2.0) for _ in range(2))
    cumulative(alone)
    known.guard = Guard(GuardsConfig(trusted=trusted), 1, cumulative=True)
    for fleet in (alone, known):
        fleet.run(3 * WINDOW, dict.fromkeys(hostile, flipped(3.0)))
    assert sum(map(alone.refused, hostile)) == 0
    assert all(known.refused(slot) > WINDOW for slot in hostile)
    assert known.flagged[-1] == {f"n{slot}": Verdict.AGAINST for slot in hostile}
    assert sum(known.refused(slot) for slot in range(size) if slot not in hostile) == 0


def test_a_trusted_node_is_not_judged_by_the_others_and_its_absence_is_as_before() -> None:
    fleet = Fleet([1.0] * 6, common=1.0, node=1.0)
    fleet.guard = Guard(GuardsConfig(trusted=("n0", "n9")), 1, cumulative=True)
    fleet.run(3 * WINDOW, {0: constant(1e6)})
    assert fleet.refused(0) == 0
    away = Fleet([1.0] * 8, common=1.0, node=1.0)
    away.guard = Guard(GuardsConfig(trusted=("n9",)), 1, cumulative=True)
    plain = cumulative(Fleet([1.0] * 8, common=1.0, node=1.0))
    for either in (away, plain):
        either.run(2 * WINDOW, {1: flipped(3.0)})
    assert away.verdicts == plain.verdicts


def test_who_behaves_again_is_accepted_again_and_minus_one_switches_the_test_off() -> None:
    fleet = cumulative(Fleet([1.0] * 8, common=2.0))
    fleet.run(2 * WINDOW, {1: flipped()})
    assert fleet.flagged[-1] == {"n1": Verdict.AGAINST}
    fleet.run(2 * WINDOW)
    assert fleet.verdicts[-1][1] is Verdict.ACCEPTED
    off = Fleet([1.0] * 8, common=2.0)
    off.guard = Guard(GuardsConfig(against=-1), 1, cumulative=True)
    off.run(2 * WINDOW, {1: flipped()})
    assert off.refused(1) == 0


def test_a_resumed_cumulative_test_judges_as_one_that_never_stopped() -> None:
    rng, config = Random(3), GuardsConfig(window=12)
    steady, closed = Guard(config, 1, cumulative=True), list[tuple[object, ...]]()
    found = set()
    for version in range(60):
        common = rng.gauss(0, 1)
        values = [common + rng.gauss(0, 0.5) for _ in range(6)]
        values[5] *= -3
        records = [record(version, slot, g) for slot, g in enumerate(values)]
        resumed = Guard(config, 1, closed[-12:], cumulative=True)  # type: ignore[arg-type]
        judged = steady.judge(records)
        assert resumed.judge(records) == judged
        assert sorted(steady.judge(records[::-1]), key=lambda one: one.slot) == list(judged)
        steady.remember(judged)
        closed.append(judged)
        found |= {one.verdict for one in judged}
    assert Verdict.AGAINST in found


def test_noise_and_absurd_scalars_move_a_clipped_lane_little() -> None:
    """H10: five times the size, two of eight; and a scalar within every absolute limit (H1)."""
    rng, moved, best = Random(5), 0.0, 0.0
    for _ in range(200):
        honest = [rng.gauss(0, 1) for _ in range(6)]
        noise = [rng.gauss(0, 5), rng.gauss(0, 5)]
        for values in (honest + noise, [*honest, 1e15, 1e15]):
            (term,) = terms_of([record(0, slot, g) for slot, g in enumerate(values)], settings(**CLIPPED), 0)
            moved = max(moved, abs(term.coefficient))
        best = max(best, *map(abs, honest))
    assert math.isfinite(moved)
    assert moved < best


def test_constant_poison_is_still_an_outlier() -> None:
    fleet = cumulative(Fleet([1.0] * 8))
    fleet.run(WINDOW, {3: constant(1e9)})
    assert fleet.refused(3) == WINDOW
