"""No round closes with fewer usable updates than the guards can compare, unless the run has opted out."""

import math
from typing import Any

import pytest

from meerkat_mq.config import RoundsConfig
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.policy import sample
from meerkat_mq.rounds.records import Verdict
from tests.rounds.support import RUN, AnsweredServer, answered_server, only, reasons, settings

NAMES = ("a", "b", "c", "d")
BUFFERED = {"mode": "buffered", "max_staleness": 4, "buffer_size": 1}


def with_nodes(*nodes: str, **changes: Any) -> AnsweredServer:
    made = answered_server(**{"min_nodes": len(nodes), "min_updates": 3, "quorum": 0.1, **changes})
    made.born(0, *nodes)
    return made


def test_three_updates_are_the_default_of_a_configuration() -> None:
    rounds = RoundsConfig()
    assert (rounds.min_nodes, rounds.min_updates) == (1, 3)
    assert settings(min_nodes=1, min_updates=3).fewest_nodes == 3
    assert settings(min_nodes=7, min_updates=3).fewest_nodes == 7


@pytest.mark.parametrize("buffered", [False, True])
def test_a_round_waits_for_three_usable_updates_also_at_its_deadline(buffered: bool) -> None:
    it = with_nodes(*NAMES, **(BUFFERED if buffered else {}))
    it.update(1, "a", 1e10)
    it.update(2, "b", math.nan)
    effects = it.tick(101)
    assert "too few updates can be used" in reasons(effects)
    assert "round extended" in reasons(effects)
    named = [effect.node for effect in only(e.Count, effects) if "cannot be used, and the round waits" in effect.reason]
    assert named == ["b"]
    it.update(102, "c", 0.5)
    assert it.machine.version == 0
    it.update(103, "d", 0.25)
    it.tick(400)
    assert it.machine.version == 1
    (closed,) = only(e.CommitEntry, it.seen)
    assert sorted(record.verdict is not Verdict.NOT_FINITE for record in closed.records) == [False, True, True, True]


def test_without_the_rule_one_update_closes_a_round() -> None:
    it = with_nodes(*NAMES, min_updates=1)
    it.update(1, "a", 0.5)
    it.tick(101)
    assert it.machine.version == 1


def test_several_updates_of_one_node_are_one() -> None:
    it = with_nodes("a", "b", "c", **BUFFERED | {"min_updates": 2})
    it.update(1, "a", 0.5)
    it.update(1, "b", 0.5)
    assert it.machine.version == 1
    it.update(2, "a", 0.5)
    it.update(2, "c", 0.5, version=0)
    it.update(2, "c", 0.5)
    assert it.machine.version == 2
    assert len(only(e.CommitEntry, it.seen)[-1].records) == 2


def test_updates_of_which_none_can_be_used_close_a_round_that_changes_nothing() -> None:
    it = with_nodes("a", "b", "c")
    for node in ("a", "b"):
        it.update(1, node, math.inf)
    it.tick(101)
    assert it.machine.version == 0
    it.update(102, "c", math.nan)
    assert it.machine.version == 1
    assert only(e.CommitEntry, it.seen)[0].entry.terms == ()


def test_a_fraction_asks_as_many_as_a_round_needs() -> None:
    assert len(sample(RUN, 0, range(8), 0.125, 3)) == 3
    assert len(sample(RUN, 0, range(2), 0.5, 3)) == 2
    assert settings(min_nodes=6, fraction=0.2, min_updates=3, lanes=3).directions == 3
