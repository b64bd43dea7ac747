"""Buffered rounds on the server: when they close, what they take, and what it weighs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.config import EarlyStoppingConfig, GuardsConfig
from meerkat_mq.core.path import Coefficient, coefficient, seed_for
from meerkat_mq.errors import ConfigError
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import RoundSettings, lane_of, terms_of
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.wire.frames import Reason, encode
from tests.rounds.support import RUN, AnsweredServer, answered_server, base_after, chain, only, reasons, settings

BUFFERED: dict[str, Any] = {"mode": "buffered", "buffer_size": 2, "max_staleness": 2, "min_nodes": 1}


def record(version: int, slot: int, *scalars: float, weight: int = 1) -> UpdateRecord:
    return UpdateRecord(version, f"n{slot}", slot, 1, weight, scalars, 1.0)


def buffered(*slow: type[object], nodes: str = "abc", **changes: Any) -> AnsweredServer:
    server = answered_server(*slow, **BUFFERED | changes)
    server.born(0, *nodes)
    return server


def made_of(server: AnsweredServer) -> list[list[tuple[str, int]]]:
    """Of each entry: whose update, and of which base version."""
    return [[(record.node, record.version) for record in closed.records] for closed in server.entries]


# --- closing --------------------------------------------------------------------------------------------------------


def test_an_entry_closes_when_the_buffer_is_full_whoever_else_is_asked() -> None:
    server = buffered()
    server.update(1, "c")
    assert server.entries == []
    server.update(1, "a")
    assert made_of(server) == [[("a", 0), ("c", 0)]]
    assert server.round.asked == {0, 1, 2}


def test_at_the_deadline_one_update_is_enough_and_without_any_it_doubles() -> None:
    server = buffered()
    assert "round extended" in reasons(server.tick(100))
    assert server.round.deadline_ms == 200_000
    server.update(150, "b")
    server.tick(299)
    assert server.entries == []
    server.tick(300)
    assert made_of(server) == [[("b", 0)]]
    assert server.entries[0].overdue


def test_where_everybody_was_heard_nobody_waits_for_a_larger_buffer() -> None:
    server = buffered(buffer_size=8)
    for node in "abc":
        server.update(1, node)
    assert made_of(server) == [[("a", 0), ("b", 0), ("c", 0)]]
    server.gone(2, "b")
    server.update(3, "a")
    server.update(3, "c")
    server.tick(11)
    assert len(server.entries) == 1
    server.tick(12)
    assert made_of(server)[1:] == [[("a", 1), ("c", 1)]]


def test_a_node_that_joins_is_asked_at_once() -> None:
    server = buffered(nodes="a")
    server.born(5, "b")
    assert server.round.asked == {0, 1}
    server.update(6, "b")
    server.update(6, "a")
    assert made_of(server) == [[("a", 0), ("b", 0)]]


def test_the_commit_that_fills_the_buffer_does_not_wait_for_others() -> None:
    server = buffered(nodes="abcd", buffer_size=2)
    server.update(1, "a")
    server.update(1, "b")
    assert [commit.last for commit in only(e.CommitUpdate, server.seen)] == [False, True]


def test_a_calibration_waits_for_everybody() -> None:
    config = EarlyStoppingConfig(by="random", calibration_steps=4)
    server = buffered(steps=2, early_stopping=config, min_nodes=3)
    for node in "ab":
        server.update(1, node, *[1.0] * 4)
    assert server.entries == []
    server.update(1, "c", *[1.0] * 4)
    assert len(server.entries[0].judgements) == 3
    for node in "ab":
        server.update(2, node, 1.0)
    assert len(server.entries) == 2


# --- what is taken --------------------------------------------------------------------------------------------------


def test_updates_from_older_theta_count_up_to_max_staleness() -> None:
    server = buffered(nodes="abcd")
    for version in range(3):
        server.update(version, "a")
        server.update(version, "b")
    assert server.machine.version == 3
    assert reasons(server.update(4, "c", version=0)) == ["late"]
    server.update(4, "c", version=1)
    server.update(4, "d", version=2)
    assert made_of(server)[3] == [("c", 1), ("d", 2)]


def test_one_update_a_node_and_base_version_and_none_from_an_older_one_after_it() -> None:
    server = buffered(buffer_size=3)
    server.update(1, "a", 1.0)
    assert reasons(server.update(1, "a", 2.0, boot=9)) == ["duplicate"]
    server.update(1, "b")
    server.update(1, "c")
    server.update(2, "a")
    assert reasons(server.update(2, "a", version=0)) == ["duplicate"]
    server.update(2, "b")
    server.update(2, "c")
    assert made_of(server) == [[(node, version) for node in "abc"] for version in (0, 1)]


def test_a_node_may_be_in_an_entry_with_two_base_versions() -> None:
    server = buffered(buffer_size=3)
    server.update(1, "b")
    server.tick(100)
    server.update(101, "a", version=0)
    server.update(102, "a", version=1)
    server.update(103, "c", version=1)
    assert made_of(server) == [[("b", 0)], [("a", 0), ("a", 1), ("c", 1)]]


def test_what_arrives_while_an_entry_closes_goes_into_the_next() -> None:
    server = buffered(e.ApplyTerms, e.CommitEntry, nodes="abcd")
    server.update(1, "a")
    server.update(1, "b")
    server.update(2, "c")
    server.update(2, "d")
    server.answer(3)
    server.answer(4)
    assert server.machine.version == 1
    server.answer(5)
    server.answer(6)
    assert made_of(server) == [[("a", 0), ("b", 0)], [("c", 0), ("d", 0)]]
    assert [term.age for closed in server.entries for term in closed.entry.terms] == [0, 1]


def test_what_is_too_old_for_the_next_entry_is_not_taken_while_one_closes() -> None:
    server = buffered(e.ApplyTerms, max_staleness=0)
    server.update(1, "a")
    server.update(1, "b")
    assert reasons(server.update(2, "c")) == ["late"]


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_what_is_committed_too_late_for_any_entry_is_not_acknowledged(mode: str) -> None:
    changes: dict[str, Any] = {"mode": mode, "buffer_size": 1, "max_staleness": 0, "quorum": 0.5, "min_nodes": 2}
    server = answered_server(e.CommitUpdate, e.ApplyTerms, values_accepted=True, **changes)
    server.born(0, "a", "b")
    server.update(1, "a")
    server.update(1, "b")
    first, second = (effect.record for effect in only(e.CommitUpdate, server.held))
    server.held = []
    server.give(e.UpdatesCommitted(2, (first,)))
    server.tick(100)
    assert reasons(server.give(e.UpdatesCommitted(101, (second,)))) == ["late"]
    server.answer(102)
    assert made_of(server) == [[("a", 0)]]
    assert server.round.heard_before == ((0, 1),)


@pytest.mark.parametrize(("scalars", "reason"), [(1, None), (4, None), (6, None), (3, None), (7, Reason.WRONG_STEPS)])
def test_a_partial_path_has_whole_steps(scalars: int, reason: Reason | None) -> None:
    server = buffered(steps=3, perturbations=2)
    expected = Reason.WRONG_STEPS if scalars % 2 else reason
    replies = only(e.Reply, server.update(1, "a", *[1.0] * scalars))
    assert [reply.frame.reason for reply in replies] == ([expected] if expected else [])  # type: ignore[union-attr]


def test_a_synchronous_round_takes_no_partial_path() -> None:
    server = answered_server(steps=3)
    server.born(0, "a", "b")
    assert only(e.Reply, server.update(1, "a", 1.0, 1.0))[0].frame.reason is Reason.WRONG_STEPS  # type: ignore[union-attr]


def test_seeds_and_digest_are_those_of_the_base_version() -> None:
    server = buffered()
    server.update(1, "a")
    server.update(1, "b")
    assert only(e.Reply, server.update(2, "c", version=0, base=base_after(0)[:8]))
    assert only(e.Reply, server.update(2, "c", version=0, seeds=(seed_for(RUN, 1, 0, 0),)))
    assert not only(e.Reply, server.update(2, "c", version=0, seeds=(seed_for(RUN, 0, 0, 0),)))


def test_a_node_that_was_early_stopped_meanwhile_may_still_send_what_it_was_asked_for() -> None:
    config = EarlyStoppingConfig(by="random", random_share=1.0, calibration_steps=4, every=2)
    server = buffered(steps=3, early_stopping=config, min_nodes=3)
    for node in "abc":
        server.update(1, node, *[1.0] * 4)
    judged = {judgement.node for judgement in server.entries[0].judgements if judgement.early_stopped}
    assert judged == set("abc")
    assert only(e.Reply, server.update(2, "a", 1.0, 1.0))
    server.update(2, "a", 1.0)
    server.update(2, "b", 1.0)
    assert server.machine.version == 2
    assert not only(e.Reply, server.update(3, "c", *[1.0] * 3, version=1))


# --- acknowledgement ------------------------------------------------------------------------------------------------


def test_a_round_says_whose_updates_are_heard_and_from_how_far_back() -> None:
    server = buffered(nodes="abcd", buffer_size=3)
    for node in "abc":
        server.update(1, node)
    server.update(2, "d", version=0)
    server.update(2, "a")
    server.tick(26)
    assert (set(server.round.heard), server.round.heard_before) == ({0}, ((1, 1), (2, 1), (3, 1)))
    encode(server.round)
    for version in (1, 2, 3):
        for node in "abc":
            server.update(30 + version, node)
    assert dict(server.round.heard_before).keys() == {0, 1, 2}  # of the fourth, nobody asks any more


# --- weights --------------------------------------------------------------------------------------------------------


def test_staleness_weights() -> None:
    rules = settings(**BUFFERED | {"max_staleness": 4})
    assert [rules.staleness_weight(age) for age in range(6)] == [256, 181, 148, 128, 114, 0]
    constant = rules.model_copy(update={"staleness": "constant"})
    assert [constant.staleness_weight(age) for age in range(6)] == [256] * 5 + [0]
    steep = rules.model_copy(update={"staleness_exponent": 10.0})
    assert [steep.staleness_weight(age) for age in range(5)] == [256, 1, 1, 1, 1]


def test_a_stale_update_weighs_less_and_counts_whole_in_the_divisor() -> None:
    rules = settings(**BUFFERED, lr=1.0)
    found = terms_of([record(3, 0, 4.0), record(5, 1, 8.0, weight=3)], rules, 5)
    assert found == (Coefficient(0, 0, 6.0), Coefficient(0, 0, float(np.float32(4.0 * 148 / 256 / 4)), 2))


def test_each_age_lane_and_step_is_a_term_in_that_order() -> None:
    rules = (
        settings(**BUFFERED, lanes=2, steps=2) if False else settings(**BUFFERED | {"min_nodes": 2}, lanes=2, steps=2)
    )
    records = [record(5, 1, 1.0), record(4, 0, 1.0, 1.0), record(5, 0, 1.0, 1.0), record(3, 3, 1.0)]
    found = terms_of(records, rules, 5)
    assert [(term.age, term.lane, term.step) for term in found] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (2, 1, 0),
    ]  # fmt: skip


def synchronous_terms(records: list[UpdateRecord], rules: RoundSettings) -> tuple[Coefficient, ...]:
    """The rule of synchronous rounds, as it was before there were ages."""
    total, terms = sum(record.weight for record in records), []
    for lane in range(rules.directions):
        members = [record for record in records if lane_of(record.slot, rules.directions) == lane]
        for step in range(max([len(record.scalars) for record in members], default=0)):
            scalars = [(record.weight, record.scalars[step]) for record in members if step < len(record.scalars)]
            c = coefficient(rules.lr, scalars, total)
            if c != 0.0:
                terms.append(Coefficient(lane, step, c))
    return tuple(terms)


single = st.floats(-(2.0**100), 2.0**100, width=32)
paths = st.lists(st.tuples(st.lists(single, min_size=1, max_size=3), st.integers(1, 2**24)), min_size=1, max_size=9)


@given(paths, st.integers(1, 3), st.integers(0, 9))
def test_at_age_0_the_rule_is_that_of_synchronous_rounds_to_the_bit(
    fleet: list[tuple[list[float], int]], lanes: int, version: int
) -> None:
    records = [record(version, slot, *path, weight=weight) for slot, (path, weight) in enumerate(fleet)]
    plain = settings(lanes=lanes, min_nodes=lanes, steps=3)
    rules = plain.model_copy(update={"mode": "buffered", "max_staleness": 3})
    assert terms_of(records, plain, version) == terms_of(records, rules, version) == synchronous_terms(records, plain)


@given(paths, st.integers(0, 5), st.sampled_from(["constant", "polynomial"]))
def test_terms_do_not_depend_on_the_order_of_arrival(
    fleet: list[tuple[list[float], int]], oldest: int, staleness: str
) -> None:
    rules = settings(**BUFFERED | {"max_staleness": oldest, "steps": 3}, staleness=staleness)
    records = [record(9 - slot % (oldest + 1), slot, *path, weight=weight) for slot, (path, weight) in enumerate(fleet)]
    assert terms_of(records, rules, 9) == terms_of(records[::-1], rules, 9)


def test_more_versions_than_an_entry_has_room_for_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"rounds\.local_steps: 1000 × 1 perturbations × 1 lanes × 13 versions"):
        settings(**BUFFERED | {"steps": 1000, "max_staleness": 12})


def test_guards_compare_what_walked_the_same_directions() -> None:
    guard = Guard(GuardsConfig(), 1)
    for version in range(12):
        guard.remember([record(version, slot, 1.0 + slot / 10) for slot in range(5)])
    stale = [record(10, slot, -1e6 - slot) for slot in range(4)]  # far from the others, not from each other
    fresh = [record(12, slot, 1.0 + slot / 10) for slot in range(4)]
    alone = [replace(found, version=11) for found in stale[:1]]
    assert {found.verdict for found in guard.judge(fresh)} == {Verdict.ACCEPTED}
    judged = guard.judge([*fresh, replace(stale[0], version=12)])
    assert judged[-1].verdict is Verdict.OUTLIER
    assert guard.judge([*fresh, *alone])[-1].verdict is Verdict.OUTLIER
    assert {found.verdict for found in guard.judge([*fresh, *stale])[:4]} == {Verdict.ACCEPTED}


# --- a new term -----------------------------------------------------------------------------------------------------


def resumed(**more: Any) -> AnsweredServer:
    entries = chain(5)
    fields = {
        "term": 2, "base": base_after(4), "version": 5, "head": entries[-1].hash(RUN), "entries": entries,
        "slots": {"a": 0, "b": 1, "c": 2}, "bases": {version: base_after(version - 1) for version in (3, 4, 5)},
    }  # fmt: skip
    server = answered_server(resume=fields | more, **BUFFERED | {"buffer_size": 3})
    server.born(0, "a", "b", "c")
    return server


def test_a_new_term_goes_on_in_the_middle_of_the_window() -> None:
    server = resumed(updates=(record_of("a", 0, 3), record_of("b", 1, 5)), heard={"a": 3, "b": 5, "c": 4})
    assert (set(server.round.heard), dict(server.round.heard_before)) == ({1}, {0: 2, 2: 1})
    assert reasons(server.update(1, "c", version=4, term=2)) == ["duplicate"]
    assert reasons(server.update(1, "c", version=2, term=2)) == ["late"]
    server.update(1, "a", version=4, term=2)
    assert made_of(server) == [[("a", 3), ("a", 4), ("b", 5)]]
    assert [term.age for term in server.entries[0].entry.terms] == [0, 1, 2]


def record_of(node: str, slot: int, version: int) -> UpdateRecord:
    return UpdateRecord(version, node, slot, 1, 1, (1.0,), 1.0)


def test_what_is_too_old_in_a_new_term_is_in_no_entry() -> None:
    server = resumed(updates=(record_of("a", 0, 2),))
    server.update(1, "b", term=2)
    server.update(1, "c", term=2)
    server.update(1, "a", term=2)
    assert made_of(server) == [[("a", 5), ("b", 5), ("c", 5)]]
