"""Values nodes: what the server asks for, takes, and adds."""

import math
from typing import Any

import pytest

from meerkat_mq.core.path import Coefficient, Displacement, short_hash
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.policy import shares_of
from meerkat_mq.rounds.records import Share, UpdateRecord, Verdict
from meerkat_mq.wire.frames import Reason, Values, encode
from tests.rounds.support import AnsweredServer, answered_server, only, reasons, settings

VALUES = Values(short_hash(b"displacement"), 100, 1)


def accepting(*slow: type[object], **changes: Any) -> AnsweredServer:
    server = answered_server(*slow, values_accepted=True, **changes)
    server.born(0, "a", "b")
    return server


def fetch(server: AnsweredServer, now: float, node: str, **changes: Any) -> e.FetchValues:
    (order,) = only(e.FetchValues, server.update(now, node, values=VALUES, **changes))
    server.held.remove(order)
    return order


def test_a_displacement_is_fetched_then_committed_then_added_after_the_terms() -> None:
    server = accepting(e.FetchValues)
    order = fetch(server, 1, "a")
    assert only(e.CommitUpdate, server.seen) == []
    server.give(e.ValuesFetched(2, "a", order.update, Verdict.ACCEPTED))
    (kept,) = only(e.CommitUpdate, server.seen)
    assert (kept.record.values, kept.record.scalars) == (VALUES, ())
    server.update(3, "b", 4.0)
    (applied,) = only(e.ApplyTerms, server.seen)
    assert applied.terms == (Coefficient(0, 0, 1.0),)  # lr · 4 / 2: the values node counts in the divisor
    assert applied.shares == (Share(VALUES.blob, 0.5),)
    assert server.entries[0].entry.displacement == Displacement(short_hash(b"mean"), 9)
    encode(server.round)


def test_a_run_that_takes_none_says_so() -> None:
    server = answered_server()
    server.born(0, "a", "b")
    (reply,) = only(e.Reply, server.update(1, "a", values=VALUES))
    assert reply.frame.reason is Reason.NO_VALUES  # type: ignore[union-attr]


@pytest.mark.parametrize(("steps", "refused"), [(1, False), (3, False), (4, True), (65535, True)])
def test_nobody_does_more_steps_than_the_round_asks_for(steps: int, refused: bool) -> None:
    server = accepting(e.FetchValues, steps=3)
    effects = server.update(1, "a", values=Values(VALUES.blob, VALUES.size, steps))
    reasons_given = [reply.frame.reason for reply in only(e.Reply, effects)]  # type: ignore[union-attr]
    assert reasons_given == [Reason.WRONG_STEPS] * refused
    assert len(only(e.FetchValues, effects)) == (not refused)


def test_a_displacement_that_does_not_come_may_be_announced_again() -> None:
    server = accepting(e.FetchValues)
    order = fetch(server, 1, "a")
    assert reasons(server.update(2, "a", values=VALUES)) == ["duplicate"]
    assert reasons(server.give(e.ValuesFetched(3, "a", order.update, None))) == ["values missed"]
    fetch(server, 4, "a")


def test_a_fetch_that_ends_after_its_version_is_gone_adds_nothing() -> None:
    server = accepting(e.FetchValues, quorum=0.5)
    order = fetch(server, 1, "a")
    server.update(2, "b")
    server.tick(100)
    assert server.machine.version == 1
    assert reasons(server.give(e.ValuesFetched(101, "a", order.update, Verdict.ACCEPTED))) == ["late"]
    assert len(only(e.CommitUpdate, server.seen)) == 1


def test_a_fetch_that_ends_in_the_window_counts_with_its_age() -> None:
    server = accepting(e.FetchValues, mode="buffered", max_staleness=2, buffer_size=1, min_nodes=1)
    order = fetch(server, 1, "a")
    server.update(2, "b")
    server.give(e.ValuesFetched(3, "a", order.update, Verdict.ACCEPTED))
    (_, applied) = only(e.ApplyTerms, server.seen)
    assert applied.shares == (Share(VALUES.blob, 181 / 256),)
    assert server.round.heard_before == ((0, 2), (1, 2))


def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    server = accepting(e.FetchValues)
    order = fetch(server, 1, "a")
    server.give(e.ValuesFetched(2, "a", order.update, Verdict.ACCEPTED))
    assert reasons(server.give(e.ValuesFetched(2, "a", order.update, Verdict.ACCEPTED))) == ["unexpected answer"]
    assert reasons(server.give(e.ValuesFetched(2, "a", order.update, None))) == ["unexpected answer"]


@pytest.mark.parametrize(
    ("verdict", "loss", "kept"),
    [
        (Verdict.ACCEPTED, math.nan, Verdict.NOT_FINITE),
        (Verdict.NOT_FINITE, 1.0, Verdict.NOT_FINITE),
        (Verdict.TOO_LARGE, 1.0, Verdict.TOO_LARGE),
    ],
)
def test_a_displacement_that_cannot_be_added_is_kept_and_left_out(verdict: Verdict, loss: float, kept: Verdict) -> None:
    server = accepting(e.FetchValues)
    order = fetch(server, 1, "a", loss=loss)
    effects = server.give(e.ValuesFetched(2, "a", order.update, verdict))
    assert only(e.Reply, effects)[0].frame.reason is Reason.OUT_OF_RANGE  # type: ignore[union-attr]
    server.update(3, "b", 4.0)
    assert [record.verdict for record in server.entries[0].records] == [kept, Verdict.ACCEPTED]
    assert server.entries[0].entry.displacement is None
    assert server.entries[0].entry.terms == (Coefficient(0, 0, 2.0),)


def test_shares_are_by_base_version_and_slot_whatever_the_order_of_arrival() -> None:
    rules = settings(mode="buffered", max_staleness=3, values_accepted=True)
    records = [
        UpdateRecord(version, f"n{slot}", slot, 1, weight, (), 1.0, values=Values(bytes([slot] * 16), 9, 1))
        for version, slot, weight in ((5, 1, 1), (4, 7, 2), (5, 0, 1))
    ]
    found = shares_of(records, rules, 5)
    assert [share.blob[0] for share in found] == [7, 0, 1]
    assert [share.weight for share in found] == [2 * 181 / (256 * 4), 0.25, 0.25]
    assert shares_of(records[::-1], rules, 5) == found


def test_a_synchronous_run_tells_a_values_node_that_its_last_update_was_heard() -> None:
    server = accepting()
    server.update(1, "a", values=VALUES)
    server.update(2, "b")
    assert server.round.heard_before == ((0, 1), (1, 1))
