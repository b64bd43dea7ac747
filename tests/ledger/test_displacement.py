"""What is measured of displacements, before the guards compare them."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import seeds_of
from meerkat_mq.ledger.displacement import measured
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.wire.frames import Values
from tests.rounds.support import settings

WEIGHTS = 300
RULES = settings(values_accepted=True, aggregate="clipped-mean", lanes=2, min_nodes=2, steps=5)


def drawn(*seeds: int) -> list[Float32Array]:
    return [np.random.default_rng(seed).normal(0, 0.01, WEIGHTS).astype(np.float32) for seed in seeds]


def measures(values: Sequence[Float32Array], rules: RoundSettings = RULES) -> tuple[UpdateRecord, ...]:
    kept = {bytes([slot] * 16): found for slot, found in enumerate(values)}
    records = [
        UpdateRecord(3, f"n{slot}", slot, 1, 1, (), 1.0, values=Values(name, 9, 5)) for slot, name in enumerate(kept)
    ]
    return measured(records, kept.__getitem__, rules)


def test_size_and_what_it_says_of_the_directions_of_its_round() -> None:
    (values,) = drawn(1)
    (found,) = measures([values])
    assert found.moved is not None
    assert found.moved.size == pytest.approx(float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))))
    assert found.moved.agreement == 0.0
    expected = [
        -float(np.dot(values, direction("mk1", seed, 0, WEIGHTS))) / float(np.linalg.norm(values))
        for lane in range(2)
        for seed in seeds_of(RULES.run_id, 3, lane, 5)
    ]
    assert found.moved.along == pytest.approx(expected, abs=1e-5)
    assert all(np.float32(x) == x for x in (found.moved.size, *found.moved.along))


def test_a_step_down_a_direction_agrees_with_a_positive_projected_gradient() -> None:
    (seed, *_) = seeds_of(RULES.run_id, 3, 1, 5)
    (found,) = measures([-0.1 * direction("mk1", seed, 0, WEIGHTS)])
    assert found.moved is not None
    assert found.moved.along[5] == pytest.approx(math.sqrt(WEIGHTS), rel=0.1)


def test_agreement_is_the_cosine_with_the_others_whatever_their_sizes() -> None:
    a, b, c = drawn(1, 2, 3)
    for scale in (1.0, 700.0):
        found = [record.moved for record in measures([a, a + 0.1 * b, np.float32(-scale) * (a + 0.1 * c)])]
        assert [moved.agreement > -0.1 for moved in found if moved is not None] == [True, True, False]
        assert [moved.agreement < -0.9 for moved in found if moved is not None] == [False, False, True]
    first, second = (record.moved for record in measures([a, -a]))
    assert first is not None
    assert second is not None
    assert (first.agreement, second.agreement) == (0.0, 0.0)


def test_what_moves_nothing_agrees_with_nobody() -> None:
    (a,) = drawn(1)
    still, *others = (record.moved for record in measures([np.zeros(WEIGHTS, np.float32), a, a]))
    assert still is not None
    assert (still.size, still.agreement, set(still.along)) == (0.0, 0.0, {0.0})
    assert [moved.agreement for moved in others if moved is not None] == [1.0, 1.0]


def test_only_what_the_guards_compare_is_measured() -> None:
    records = [
        UpdateRecord(3, "a", 0, 1, 1, (0.5,) * 5, 1.0),
        UpdateRecord(3, "b", 1, 1, 1, (), 1.0, Verdict.TOO_LARGE, Values(bytes(16), 9, 5)),
    ]
    assert measured(records, lambda blob: pytest.fail("read"), RULES) == tuple(records)
    mean = RULES.model_copy(update={"aggregate": "mean"})
    assert [record.moved for record in measures(drawn(1, 2, 3), mean)] == [None] * 3
