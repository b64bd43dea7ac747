"""Which projected gradients the guards refuse, and whom they flag."""

import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.config import GuardsConfig
from meerkat_mq.rounds.clipping import median
from meerkat_mq.rounds.cumulative import StepColumn
from meerkat_mq.rounds.guards import Guard, on_arrival
from meerkat_mq.rounds.records import UpdateRecord, Verdict

WINDOW = GuardsConfig().window
Poison = Callable[[int, float], float]


def record(version: int, slot: int, *scalars: float) -> UpdateRecord:
    return UpdateRecord(version, f"n{slot}", slot, 1, 1, scalars, 1.0, on_arrival(scalars, 1.0, 1.0))


def tailed(rng: Random, freedom: float) -> float:
    """A draw from Student's distribution; from the normal one where `freedom` is infinite."""
    return rng.gauss(0, 1) / (1 if math.isinf(freedom) else math.sqrt(rng.gammavariate(freedom / 2, 2 / freedom)))


class Fleet:
    """A guarded fleet of made-up nodes: g_k = scale_k · level · (common part + node part + batch noise).

    Attributes:
        verdicts: of each round, by slot.
        flagged: after each round.
    """

    def __init__(
        self,
        scales: Sequence[float],
        *,
        common: float = 1.0,
        node: float = 0.3,
        freedom: float = math.inf,
        steps: int = 1,
        lanes: int = 1,
        seed: int = 0,
    ) -> None:
        self.guard = Guard(GuardsConfig(), lanes)
        self.verdicts: list[list[Verdict]] = []
        self.flagged: list[dict[str, Verdict]] = []
        self._scales, self._lanes, self._steps = scales, lanes, steps
        self._common, self._node, self._freedom = common, node, freedom
        self._rng = Random(seed)

    def run(self, rounds: int, poisoned: dict[int, Poison] | None = None) -> None:
        for version in range(len(self.verdicts), len(self.verdicts) + rounds):
            judged = self.guard.judge(self._round(version, poisoned or {}))
            self.guard.remember(judged)
            self.verdicts.append([found.verdict for found in judged])
            self.flagged.append(dict(self.guard.flagged))

    def _round(self, version: int, poisoned: dict[int, Poison]) -> list[UpdateRecord]:
        rng, level = self._rng, 0.1 + math.exp(-version / 300)
        common = [[self._common * rng.gauss(0, 1) for _ in range(self._steps)] for _ in range(self._lanes)]
        records = []
        for slot, scale in enumerate(self._scales):
            noise = [self._node * rng.gauss(0, 1) + tailed(rng, self._freedom) for _ in range(self._steps)]
            scalars = [scale * level * (c + n) for c, n in zip(common[slot % self._lanes], noise, strict=True)]
            if slot in poisoned:
                scalars = [poisoned[slot](version, g) for g in scalars]
            records.append(record(version, slot, *scalars))
        return records

    def refused(self, slot: int) -> int:
        return sum(verdicts[slot] != Verdict.ACCEPTED for verdicts in self.verdicts)


def constant(value: float) -> Poison:
    return lambda version, g: value


def flipped(factor: float = 1.0) -> Poison:
    return lambda version, g: -factor * g


@pytest.mark.parametrize(
    ("scalars", "loss", "lr", "verdict"),
    [
        ((1.0, -1e22), 2.0, 1e-3, Verdict.ACCEPTED),
        ((1.0, math.nan), 2.0, 1e-3, Verdict.NOT_FINITE),
        ((-math.inf, 1.0), 2.0, 1e-3, Verdict.NOT_FINITE),
        ((1.0,), math.nan, 1e-3, Verdict.NOT_FINITE),
        ((1.0,), math.inf, 1e-3, Verdict.NOT_FINITE),
        ((1.0, -2e19), 2.0, 1.0, Verdict.TOO_LARGE),
        ((1.0, -2e19), 2.0, 0.5, Verdict.ACCEPTED),
    ],
)
def test_what_an_update_tells_by_itself(scalars: tuple[float, ...], loss: float, lr: float, verdict: Verdict) -> None:
    assert on_arrival(scalars, loss, lr) is verdict


@pytest.mark.parametrize(
    "fleet",
    [
        Fleet([1.0] * 8),
        Fleet([1.0] * 8, common=0.0, node=0.0),
        Fleet([1, 1, 1, 3, 1, 0.5, 3, 1], node=1.0),
        Fleet([0.3, 0.5, 1, 1, 1, 1.5, 2, 3], common=0.5, freedom=4),
        Fleet([1, 1, 1, 3, 1, 0.5, 3, 1], common=3.0, node=0.5, freedom=4),
        Fleet([1, 1, 3], node=0.5),
        Fleet([1, 1, 3, 1], lanes=4, node=0.5),
        Fleet([1.0, 3.0], lanes=2),
    ],
    ids=["iid", "noise", "larger", "dirichlet", "agreeing", "three", "four lanes", "two nodes"],
)
def test_honest_nodes_are_hardly_ever_refused_and_never_flagged(fleet: Fleet) -> None:
    fleet.run(1000)
    refused = sum(verdict != Verdict.ACCEPTED for verdicts in fleet.verdicts for verdict in verdicts)
    assert refused <= 0.001 * sum(map(len, fleet.verdicts))
    assert not any(fleet.flagged)


def test_many_steps_are_no_more_suspicious_than_one() -> None:
    fleet = Fleet([1, 1, 1, 3, 1, 0.5, 3, 1], freedom=4, steps=20, seed=1)
    fleet.run(100)
    assert sum(map(fleet.refused, range(8))) == 0


@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("value", [1e9, -1e9, 3e38])
def test_absurd_scalars_are_refused_for_ever(lanes: int, value: float) -> None:
    fleet = Fleet([1.0] * 8, lanes=lanes)
    fleet.run(5 * WINDOW, {3: constant(value)})
    assert fleet.refused(3) == 5 * WINDOW
    assert sum(map(fleet.refused, range(8))) <= 5 * WINDOW + 1
    expected = Verdict.TOO_LARGE if value == 3e38 else Verdict.OUTLIER
    assert fleet.flagged[1] == {}
    assert all(flagged == {"n3": expected} for flagged in fleet.flagged[2:])


def test_one_absurd_step_of_many_is_enough() -> None:
    fleet = Fleet([1.0] * 4, steps=20)
    fleet.run(WINDOW)
    scalars = [0.5] * 20
    judged = fleet.guard.judge(
        [record(WINDOW, slot, *scalars) for slot in range(3)] + [record(0, 3, *scalars[1:], 1e9)]
    )
    assert [found.verdict for found in judged] == [Verdict.ACCEPTED] * 3 + [Verdict.OUTLIER]


def test_poison_does_not_widen_the_scale() -> None:
    fleet = Fleet([1.0] * 8)
    fleet.run(4 * WINDOW, {2: constant(1e9), 5: constant(1e5), 6: lambda version, g: 200.0 * (-1) ** version})
    assert [fleet.refused(slot) for slot in range(8)] == [0, 0, 4 * WINDOW, 0, 0, 4 * WINDOW, 4 * WINDOW, 0]


def test_a_node_that_grows_step_by_step_is_not_excused_by_its_past_for_ever() -> None:
    fleet = Fleet([1.0] * 8)
    fleet.run(20 * WINDOW, {4: lambda version, g: g * 1.05**version})
    assert all(verdicts[4] != Verdict.ACCEPTED for verdicts in fleet.verdicts[-5 * WINDOW :])
    assert sum(map(fleet.refused, [0, 1, 2, 3, 5, 6, 7])) == 0


def test_a_node_with_five_times_larger_scalars_is_mostly_heard() -> None:
    fleet = Fleet([1, 1, 1, 1, 1, 1, 1, 5])
    fleet.run(500)
    assert fleet.refused(7) <= 0.02 * 500
    assert not any(fleet.flagged[2 * WINDOW :])


def test_nan_never_matters_to_anybody_else() -> None:
    plain, poisoned = Fleet([1, 1, 3, 1, 1], freedom=3), Fleet([1, 1, 3, 1, 1], freedom=3)
    larger = {2: lambda version, g: 9 * g}
    plain.run(100, larger)
    poisoned.run(100, larger)
    plain.guard, poisoned.guard = Guard(GuardsConfig(), 1), Guard(GuardsConfig(), 1)
    for version in range(100):
        rng = Random(version)
        honest = [record(version, slot, rng.gauss(0, 1)) for slot in range(5)]
        sick = [*honest, record(version, 5, math.nan)]
        judged = poisoned.guard.judge(sick)
        assert judged[5].verdict is Verdict.NOT_FINITE
        assert judged[:5] == plain.guard.judge(honest)
        plain.guard.remember(judged[:5])
        poisoned.guard.remember(judged)
    assert dict(poisoned.guard.flagged) == dict(plain.guard.flagged) | {"n5": Verdict.NOT_FINITE}


@pytest.mark.parametrize("factor", [1.0, 3.0, 10.0])
def test_a_node_that_works_against_the_others_is_refused_while_that_lasts(factor: float) -> None:
    fleet = Fleet([1.0] * 8, common=2.0)
    fleet.run(2 * WINDOW)
    fleet.run(3 * WINDOW, {1: flipped(factor)})
    assert any("n1" in flagged for flagged in fleet.flagged[2 * WINDOW : 3 * WINDOW])
    against = [verdicts[1] is Verdict.AGAINST for verdicts in fleet.verdicts[4 * WINDOW :]]
    assert sum(against) >= 0.9 * WINDOW
    assert fleet.flagged[-1] == {"n1": Verdict.AGAINST}
    fleet.run(3 * WINDOW)
    assert all(verdicts[1] is Verdict.ACCEPTED for verdicts in fleet.verdicts[-WINDOW:])
    assert fleet.flagged[-1] == {}
    assert sum(map(fleet.refused, [0, 2, 3, 4, 5, 6, 7])) == 0


def test_where_the_lane_does_not_agree_nobody_works_against_it() -> None:
    fleet = Fleet([1.0] * 8, common=2.0)
    fleet.run(10 * WINDOW, {1: flipped(), 4: flipped(), 6: flipped()})
    assert sum(map(fleet.refused, range(8))) == 0


def test_a_flagged_node_that_behaves_is_forgotten_after_the_window() -> None:
    fleet = Fleet([1.0] * 8, seed=1)
    fleet.run(5, {0: constant(1e9), 1: constant(math.nan)})
    assert fleet.flagged[-1] == {"n0": Verdict.OUTLIER, "n1": Verdict.NOT_FINITE}
    fleet.run(WINDOW - 3)
    assert fleet.flagged[-1] == {"n0": Verdict.OUTLIER, "n1": Verdict.NOT_FINITE}
    fleet.run(1)
    assert fleet.flagged[-1] == {}


def test_the_guard_does_not_grow() -> None:
    fleet = Fleet([1.0] * 8)
    fleet.run(2 * WINDOW)
    early = len(pickle.dumps(fleet.guard))
    fleet.run(10 * WINDOW)
    assert len(pickle.dumps(fleet.guard)) < 1.1 * early
    for version in range(WINDOW):
        fleet.guard.remember([record(version, 99, 1.0)])
    assert len(pickle.dumps(fleet.guard)) < 0.3 * early


wild = st.sampled_from([0.0, 1.0, -1.0, 1.5, 1e9, math.nan, -math.inf]) | st.floats(width=32)
rounds = st.lists(
    st.dictionaries(st.integers(0, 5), st.lists(wild, min_size=1, max_size=2).map(tuple), max_size=6), max_size=30
)


def play(guard: Guard, history: Sequence[dict[int, tuple[float, ...]]]) -> list[tuple[UpdateRecord, ...]]:
    """The judged records of each round."""
    closed = []
    for version, updates in enumerate(history):
        closed.append(guard.judge([record(version, slot, *scalars) for slot, scalars in updates.items()]))
        guard.remember(closed[-1])
    return closed


phases = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1.0, 1.0, 30.0, math.nan])), max_size=6)


@settings(max_examples=150, deadline=None)
@given(phases, rounds, phases, st.integers(0, 10_000), st.integers(1, 3))
def test_a_resumed_guard_judges_as_one_that_never_stopped(
    before: list[tuple[int, float]],
    history: list[dict[int, tuple[float, ...]]],
    after: list[tuple[int, float]],
    seed: int,
    lanes: int,
) -> None:
    rng = Random(seed)

    def played(phases: list[tuple[int, float]]) -> list[dict[int, tuple[float, ...]]]:
        scales = [scale for length, scale in phases for _ in range(length)]
        common = [(scale, rng.gauss(0, 1)) for scale in scales]
        return [
            {slot: (scale * (c + rng.gauss(0, 1)) * rng.choice([1, 1, -1, 20]),) for slot in range(6)}
            for scale, c in common
        ]

    config, history = GuardsConfig(window=6), played(before) + history + played(after)
    steady, closed = Guard(config, lanes), list[tuple[UpdateRecord, ...]]()
    for version in range(len(history)):
        resumed = Guard(config, lanes, closed[-6:])
        assert resumed.flagged == steady.flagged
        records = [record(version, slot, *scalars) for slot, scalars in history[version].items()]
        closed.append(steady.judge(records))
        assert repr(resumed.judge(records)) == repr(closed[-1])  # NaN is not equal to itself
        steady.remember(closed[-1])


@settings(max_examples=100, deadline=None)
@given(rounds, st.integers(0, 10_000), st.integers(1, 3))
def test_the_order_of_updates_does_not_matter(
    history: list[dict[int, tuple[float, ...]]], seed: int, lanes: int
) -> None:
    rng, plain, mixed = Random(seed), Guard(GuardsConfig(window=6), lanes), Guard(GuardsConfig(window=6), lanes)
    shuffled = [dict(rng.sample(list(updates.items()), len(updates))) for updates in history]
    for ours, theirs in zip(play(plain, history), play(mixed, shuffled), strict=True):
        assert Counter((found.node, found.verdict) for found in ours) == Counter(
            (found.node, found.verdict) for found in theirs
        )
    assert plain.flagged == mixed.flagged


def test_judging_keeps_nothing_and_changes_nothing_but_verdicts() -> None:
    fleet = Fleet([1.0] * 8)
    fleet.run(WINDOW, {0: constant(1e9)})
    records = [record(WINDOW, slot, 1e9 if slot == 0 else 0.5 + 0.1 * slot) for slot in range(8)]
    first = fleet.guard.judge(records)
    assert fleet.guard.judge(records) == first
    assert first == (replace(records[0], verdict=Verdict.OUTLIER), *records[1:])


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]) | st.floats(-9, 9, width=32), min_size=2, max_size=9))
def test_the_median_of_the_others_is_that_of_all_but_one(values: list[float]) -> None:
    column = StepColumn.of(sorted(values))
    assert column.median == median(sorted(values))
    for at, value in enumerate(values):
        others = median(sorted(values[:at] + values[at + 1 :]))
        assert column.without(value) == others
