"""Virtual paths: how GradIP tells a node with extreme data, and what the guards make of such paths."""

import math
from dataclasses import replace
from itertools import product
from random import Random

import pytest

from meerkat_mq.config import GuardsConfig
from meerkat_mq.rounds.early_stopping import is_extreme, path_ratios
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import terms_of
from meerkat_mq.rounds.records import Verdict
from tests.rounds.support import settings as rules_of
from tests.rounds.test_early_stopping import CALIBRATING, DECAYING, STEADY, VPCS, records_of

# --- the verdict on a path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "ratios", "both", "either"),
    [
        (DECAYING, (math.inf, 1.0), True, True),
        (STEADY, (8 / 7.4, 0.0), False, False),
        ((8.0, 8.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 4.0), (5.0, 0.6), True, True),
        ((9.0, 9.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0), (9.0, 0.0), False, True),
        ((8.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 16.0, 16.0), (1.25, 0.6), False, True),
        ((0.0,) * 10, (0.0, 0.0), False, False),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0), (0.0, 0.0), False, False),
        ((4.0,), (1.0, 0.0), False, False),
        ((8.0, 1.0), (8.0, 0.0), False, True),
        ((8.0, 8.0, 0.0), (2.0, 0.5), False, True),  # 20 % and 50 % of three steps, rounded up: one and two
        ((1e38, 1e38, *[0.0] * 8), (math.inf, 1.0), True, True),
    ],
)
def test_how_a_path_is_judged(
    path: tuple[float, ...], ratios: tuple[float, float], *, both: bool, either: bool
) -> None:
    assert path_ratios(path, VPCS) == pytest.approx(ratios)
    assert path_ratios([-value for value in path], VPCS) == path_ratios(path, VPCS)
    assert is_extreme(*path_ratios(path, VPCS), VPCS) is both
    assert is_extreme(*path_ratios(path, VPCS), VPCS.model_copy(update={"require": "either"})) is either


def test_thresholds_are_reached_from_below() -> None:
    assert is_extreme(3.0, 0.5, VPCS)
    assert not is_extreme(2.999, 0.5, VPCS)
    assert not is_extreme(3.0, 0.499, VPCS)


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quiet", "lanes", "seed"), [*product([1.0, 0.1, 0.0], [1, 2], range(3))])
def test_no_guard_flags_a_node_for_being_short_or_quiet(quiet: float, lanes: int, seed: int) -> None:
    rng, guard = Random(seed), Guard(GuardsConfig(), lanes)
    rules = rules_of(**CALIBRATING | {"lanes": lanes, "min_nodes": 8, "steps": 10})
    for version in range(200):
        steps = 100 if version == 0 else 10
        common = [[rng.gauss(0, 1) for _ in range(steps)] for _ in range(lanes)]
        paths = {}
        for slot in range(8):
            path = [g + rng.gauss(0, 0.7) for g in common[slot % lanes]]
            if slot in (2, 5):
                decay = [quiet + (1 - quiet) * math.exp(-step / 15) for step in range(steps)]
                path = [g * part for g, part in zip(path, decay, strict=True)] if version == 0 else [quiet * path[0]]
            paths[slot] = tuple(path)
        judged = guard.judge(records_of(paths, version))
        assert [record.verdict for record in judged] == [Verdict.ACCEPTED] * 8
        if version == 0:
            judged = tuple(
                replace(record, verdict=Verdict.EARLY_STOPPED) if record.slot in (2, 5) else record for record in judged
            )
        guard.remember(judged)
        assert len(terms_of(judged, rules, version)) == 10 * lanes
    assert dict(guard.flagged) == {}
