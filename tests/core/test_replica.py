"""theta at a version."""

import numpy as np
import pytest

from meerkat_mq.core.directions import direction
from meerkat_mq.core.path import NO_DIGEST, Coefficient, apply, digest, seed_for
from meerkat_mq.core.replica import Change, Replica
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import RunError

RUN_ID = bytes(range(16))
ADDED = np.linspace(-1, 1, 300, dtype=np.float32)
ROUNDS: list[Change] = [
    ((Coefficient(0, 0, 0.5), Coefficient(1, 2, -0.25)), None),
    ((), None),
    ((Coefficient(3, 0, 1e-3), Coefficient(3, 0, 0.5, 2)), ADDED),
    ((Coefficient(0, 0, 2.0, 1),), None),
]


def replica(digest_every: int = 1) -> Replica:
    return Replica(toy_mask(300), run_id=RUN_ID, stream="mk1", digest_every=digest_every)


def test_replay_is_one_apply_after_the_other() -> None:
    one, all_at_once = replica(2), replica(2)
    digests = tuple(one.apply(*change) for change in ROUNDS)
    assert all_at_once.replay(ROUNDS) == digests
    assert [found == NO_DIGEST for found in digests] == [True, False, True, False]
    assert one.theta.tobytes() == all_at_once.theta.tobytes()
    assert one.version == all_at_once.version == len(ROUNDS)


def test_each_term_is_the_direction_of_its_base_version_lane_and_step() -> None:
    theta, scratch = np.zeros(300, np.float32), np.empty(300, np.float32)
    for version, (terms, displacement) in enumerate(ROUNDS):
        for term in terms:
            z = direction("mk1", seed_for(RUN_ID, version - term.age, term.lane, term.step), 0, 300)
            apply(theta, z, term.coefficient, scratch)
        if displacement is not None:
            theta += displacement
    assert replica().replay(ROUNDS)[-1] == digest(theta)


def test_who_holds_an_earlier_theta_keeps_it() -> None:
    standing = replica()
    standing.apply(*ROUNDS[0])
    held = standing.theta
    before = held.tobytes()
    standing.replay(ROUNDS[1:])
    assert held.tobytes() == before != standing.theta.tobytes()


@pytest.mark.parametrize(
    ("ruinous", "words"),
    [
        (((Coefficient(0, 0, 3e38),), None), r"theta: is not finite after a step of coefficient 3e\+38; lower the"),
        (((), np.full(300, 3e38, np.float32)), "theta: is not finite after a displacement; lower the"),
    ],
    ids=["term", "displacement"],
)
def test_what_leads_out_of_float32_is_not_applied(ruinous: Change, words: str) -> None:
    standing = replica()
    standing.apply((), np.full(300, 3e38, np.float32))
    before = standing.theta.tobytes()
    with pytest.raises(RunError, match=words):
        standing.apply(*ruinous)
    assert (standing.version, standing.theta.tobytes()) == (1, before)


def test_from_a_snapshot_it_goes_on_as_from_the_entries() -> None:
    whole, loaded = replica(), replica()
    whole.replay(ROUNDS[:2])
    loaded.load(whole.theta, whole.version)
    assert loaded.replay(ROUNDS[2:]) == whole.replay(ROUNDS[2:])
    loaded.reset()
    assert (loaded.version, digest(loaded.theta)) == (0, digest(toy_mask(300).theta_0))
