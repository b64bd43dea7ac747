"""Displacements in a run with the clipped mean: how far one goes, and which ones are refused for where they go."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from meerkat_mq.config import GuardsConfig
from meerkat_mq.rounds.clipping import FARTHER, longest
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import COMPARED, RoundSettings, shares_of, shortened
from meerkat_mq.rounds.records import Moved, UpdateRecord, Verdict
from meerkat_mq.wire.frames import Values
from tests.rounds.support import settings
from tests.rounds.test_guards import record

STEPS = 10


def displacement(version: int, slot: int, moved: Moved | None, *, steps: int = STEPS) -> UpdateRecord:
    values = Values(bytes([slot] * 16), 9, steps)
    return UpdateRecord(version, f"n{slot}", slot, 1, 1, (), 1.0, values=values, moved=moved)


def sized(*sizes: float | None, steps: Sequence[int] = ()) -> list[UpdateRecord]:
    return [
        displacement(0, slot, None if size is None else Moved(size, 1.0, (0.0,)), steps=(steps or [STEPS] * 9)[slot])
        for slot, size in enumerate(sizes)
    ]


def rules(**changes: object) -> RoundSettings:
    return settings(values_accepted=True, aggregate="clipped-mean", lr=0.5, steps=STEPS, **changes)


# --- how far ---


@pytest.mark.parametrize(
    ("displacements", "paths", "reach", "expected"),
    [
        ([(1.0, 1), (2.0, 1), (90.0, 1)], (), 0.1, 2.0),
        ([(1.0, 1), (2.0, 1), (3.0, 1), (90.0, 1)], (9.0,) * 9, 0.1, 2.0),
        ([(4.0, 2), (30.0, 10), (3.0, 1)], (), 0.1, 3.0),
        ([(1.0, 1), (90.0, 1)], (1.0, 2.0, 9.0), 0.1, 0.2),
        ([(0.1, 1), (90.0, 1)], (1.0, 2.0, 9.0), 0.1, 0.1),
        ([(1.0, 1), (90.0, 1)], (), 0.1, 1.0),
        ([(90.0, 1)], (1.0, 2.0, 9.0), 0.1, 0.2),
        ([(90.0, 1)], (1.0, 2.0), 0.1, 0.1),
        ([(90.0, 1)], (), 0.1, float("inf")),
        ([], (1.0, 2.0, 9.0), 0.1, 0.2),
        ([(1.0, 1), (90.0, 1)], (1.0, 2.0, 9.0), None, 1.0),
        ([(90.0, 1)], (1.0, 2.0, 9.0), None, 2.0 * FARTHER),
        ([(90.0, 1)], (1.0, 2.0), None, float("inf")),
        ([], (1.0, 2.0, 9.0), None, 2.0 * FARTHER),
    ],
)
def test_a_displacement_goes_as_far_as_others_do(
    displacements: list[tuple[float, int]], paths: Sequence[float], reach: float | None, expected: float
) -> None:
    assert longest(displacements, paths, reach, len(displacements)) == pytest.approx(expected)


def weights(records: Sequence[UpdateRecord], used: RoundSettings) -> list[float]:
    return [share.weight for share in shares_of(records, used, 0)]


def test_what_goes_farther_is_scaled_down_and_nothing_else_changes() -> None:
    assert weights(sized(1.0, 2.0, 8.0), rules()) == pytest.approx([1 / 3, 1 / 3, 2 / 8 / 3])
    assert weights(sized(1.0, 8.0), rules()) == pytest.approx([1 / 2, 1 / 2 / 8])
    assert weights(sized(0.0, 0.0, 8.0), rules()) == [1 / 3, 1 / 3, 0.0]
    assert weights(sized(5.0, 0.5, 5.0, steps=(10, 1, 10)), rules()) == [1 / 3] * 3
    refused = [*sized(1.0, 2.0), replace(sized(1.0, 2.0, 1e3)[2], verdict=Verdict.AGAINST)]
    assert weights(refused, rules()) == pytest.approx([1 / 2, 1 / 4])


def test_who_is_shortened_a_lot_is_said() -> None:
    assert shortened(sized(1.0, 2.5, 8.0, 0.0), rules()) == ["n1", "n2"]
    assert shortened(sized(1.0, 1.9, 8.0), rules()) == ["n2"]
    assert shortened(sized(None, None, None), rules()) == []


def test_a_run_without_the_clipped_mean_or_of_an_older_server_scales_nothing_down() -> None:
    assert weights(sized(None, None, None), rules()) == [1 / 3] * 3
    mean = settings(values_accepted=True)
    assert not mean.compares(sized(1.0)[0])
    assert rules().compares(sized(1.0)[0])
    assert not rules().compares(replace(sized(1.0)[0], verdict=Verdict.TOO_LARGE))
    assert not rules().compares(record(0, 1, 0.5))


@pytest.mark.parametrize("others", [(), (9.0,)])
def test_one_or_two_go_no_farther_than_the_useful_part_of_a_path(others: Sequence[float]) -> None:
    paths = [record(0, slot, *([0.1] * STEPS)) for slot in (2, 3, 4)]
    used = rules(displacement_reach=2.0, weights=100)
    length = 0.5 * (STEPS * 0.01) ** 0.5
    found = weights([*sized(5.0, *others), *paths], used)
    assert found[0] == pytest.approx(1 / (4 + len(others)) * 2.0 * length / 100**0.5 / 5.0)
    trusted = used.model_copy(update={"guards": GuardsConfig(trusted=("n0",))})
    assert weights([*sized(5.0, *others), *paths], trusted)[0] == 1 / (4 + len(others))
    refused = [replace(displacement(0, slot, Moved(9.0, -1, (0.0,))), verdict=Verdict.AGAINST) for slot in (7, 8)]
    assert weights([*sized(5.0, *others), *paths, *refused], used)[0] == 1 / (4 + len(others))
    assert shortened([*sized(5.0), *paths], used) == ["n0"]
    assert shortened([*sized(5.0), *paths], trusted) == []


def test_one_alone_went_no_farther_than_a_few_paths_in_older_runs() -> None:
    paths = [record(0, slot, *([0.1] * STEPS)) for slot in (1, 2, 3)]
    reach = FARTHER * 0.5 * (STEPS * 0.01) ** 0.5
    assert weights([*sized(2 * reach), *paths], rules()) == pytest.approx([1 / 8])
    assert weights([*sized(0.9 * reach), *paths], rules()) == [1 / 4]
    assert weights([*sized(2 * reach), *paths[:2]], rules()) == [1 / 3]


@pytest.mark.parametrize(("lanes", "expected"), [(1, (1, 10)), (3, (3, 10)), (20, (20, 1)), (1000, (COMPARED, 1))])
def test_a_displacement_is_measured_along_so_many_directions(lanes: int, expected: tuple[int, int]) -> None:
    assert rules(lanes=lanes, min_nodes=lanes).compared(0) == expected


# --- where to ---


class Mixed:
    """A guarded fleet of five paths in one lane, and of displacements that go with the paths in part.

    Attributes:
        verdicts: of the displacements, by round.
        closed: all updates, by round.
    """

    def __init__(self, *, cumulative: bool = True, against: float = -0.5, window: int = 50) -> None:
        self.guard = Guard(GuardsConfig(against=against, window=window), 1, cumulative=cumulative)
        self.verdicts: list[list[Verdict]] = []
        self.closed: list[Sequence[UpdateRecord]] = []
        self._rng = Random(5)

    def round(self, *signs: float, agreements: Sequence[float] = (), paths: int = 5) -> None:
        version, draw = len(self.verdicts), self._rng.gauss
        common = [draw(0, 1) for _ in range(STEPS)]
        records = [record(version, slot, *(0.1 * (g + draw(0, 1)) for g in common)) for slot in range(paths)]
        for number, sign in enumerate(signs):
            along = tuple(sign * g / 2 + draw(0, 0.8) for g in common)
            moved = Moved(1.0, agreements[number] if agreements else 0.5, along)
            records.append(displacement(version, 10 + number, moved))
        judged = self.guard.judge(records)
        assert [found.moved for found in judged] == [found.moved for found in records]
        self.guard.remember(judged)
        self.closed.append(judged)
        self.verdicts.append([found.verdict for found in judged if found.values is not None])

    def refused(self, number: int) -> list[int]:
        return [version for version, verdicts in enumerate(self.verdicts) if verdicts[number] is Verdict.AGAINST]


def test_who_pushes_against_the_paths_is_refused_within_a_few_rounds_and_flagged() -> None:
    fleet = Mixed()
    while not fleet.guard.flagged:
        fleet.round(-1, 1)
    assert len(fleet.verdicts) <= 5
    assert fleet.guard.flagged == {"n10": Verdict.AGAINST}
    for _ in range(60):
        fleet.round(-1, 1)
    first = fleet.refused(0)[0]
    assert fleet.refused(0) == list(range(first, len(fleet.verdicts)))
    assert fleet.refused(1) == []


def test_the_present_round_counts_before_it_is_accepted() -> None:
    paths = [record(0, slot, *([0.1] * STEPS)) for slot in range(3)]
    for x, verdict in ((-3.0, Verdict.AGAINST), (3.0, Verdict.ACCEPTED)):
        guard = Guard(GuardsConfig(), 1, cumulative=True)
        judged = guard.judge([*paths, displacement(0, 9, Moved(1.0, 0.0, (x,) * STEPS))])
        assert [found.verdict for found in judged] == [Verdict.ACCEPTED] * 3 + [verdict]


def test_who_behaves_again_is_taken_again() -> None:
    fleet = Mixed(window=10)
    for _ in range(10):
        fleet.round(-1)
    for _ in range(10):
        fleet.round(1)
    assert fleet.verdicts[-1] == [Verdict.ACCEPTED]
    assert not fleet.guard.flagged or fleet.verdicts[9] == [Verdict.AGAINST]


def test_noise_is_not_refused_and_nobody_is_judged_by_two_paths() -> None:
    fleet = Mixed()
    for _ in range(200):
        fleet.round(0, 1)
    assert len(fleet.refused(0)) <= 2
    few = Mixed()
    for _ in range(30):
        few.round(-1, paths=2)
    assert few.refused(0) == []


@pytest.mark.parametrize("change", [{"cumulative": False}, {"against": -1.0}])
def test_both_comparisons_can_be_off(change: dict[str, bool | float]) -> None:
    fleet = Mixed(**change)  # type: ignore[arg-type]
    for _ in range(20):
        fleet.round(-1, 1, 1, agreements=(-0.9, 0.1, 0.1))
    assert fleet.refused(0) == []


def test_one_that_opposes_the_others_is_refused_at_once() -> None:
    fleet = Mixed()
    fleet.round(1, 1, 1, agreements=(-0.9, 0.02, -0.1))
    assert fleet.verdicts[0] == [Verdict.AGAINST, Verdict.ACCEPTED, Verdict.ACCEPTED]
    assert fleet.guard.flagged == {"n10": Verdict.AGAINST}
    fleet.round(1, 1, 1, agreements=(0.5, 0.5, 0.5))
    assert fleet.verdicts[1] == [Verdict.ACCEPTED] * 3
    assert not fleet.guard.flagged


def test_where_half_of_them_oppose_each_other_nobody_is_refused_for_it() -> None:
    fleet = Mixed()
    fleet.round(1, 1, 1, 1, agreements=(-0.9, -0.9, 0.1, 0.1))
    assert fleet.verdicts[0] == [Verdict.ACCEPTED] * 4


def test_a_guard_that_begins_again_judges_as_before() -> None:
    fleet = Mixed(window=6)
    for _ in range(9):
        fleet.round(-1, 1)
    again = Guard(GuardsConfig(window=6), 1, fleet.closed[-6:], cumulative=True)
    came = [replace(found, verdict=Verdict.ACCEPTED) for found in fleet.closed[-1]]
    assert again.judge(came) == fleet.guard.judge(came)
    assert again.flagged == fleet.guard.flagged
