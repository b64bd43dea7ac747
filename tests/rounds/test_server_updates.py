"""Which updates count, slots, weights, and how a new term resumes."""

import math
from typing import Any

import pytest

from meerkat_mq.core.path import Coefficient, seed_for
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.policy import sample
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.rounds.server_state import LARGEST_STEP
from meerkat_mq.wire.frames import MAX_SLOTS, Header, Reason, Want, encode
from tests.rounds.support import (
    MASK,
    RUN,
    THETA_0,
    AnsweredServer,
    answered_server,
    base_after,
    chain,
    header,
    only,
    reasons,
)


def with_open_round(*slow: type[object], **changes: Any) -> AnsweredServer:
    server = answered_server(*slow, **changes)
    server.born(0, "a", "b")
    return server


def record(node: str, slot: int, version: int = 0, g: float = 1.0, boot: int = 1) -> UpdateRecord:
    return UpdateRecord(version, node, slot, boot, 1, (g,), 1.0)


def test_the_first_update_of_a_node_counts_against_its_restarted_self() -> None:
    server = with_open_round()
    server.update(1, "a", 3.0, boot=1)
    server.gone(2, "a")
    server.born(3, "a", boot=2, link=2)
    assert reasons(server.update(4, "a", 5.0, boot=2)) == ["duplicate"]
    server.update(5, "b", 1.0)
    assert [(r.node, r.boot, r.scalars) for r in server.entries[0].records] == [("a", 1, (3.0,)), ("b", 1, (1.0,))]


def test_a_duplicate_is_one_also_before_the_first_is_committed() -> None:
    server = with_open_round(e.CommitUpdate)
    server.update(1, "a", 3.0)
    assert reasons(server.update(1, "a", 3.0)) == ["duplicate"]
    assert len(server.held) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 1}, "early"),
        ({"term": 0}, "of another term"),
        ({"header": Header.of(bytes(16), 1, 0, MASK)}, "of another run"),
        ({"header": Header.of(RUN, 1, 0, RUN)}, "of another run"),
    ],
)
def test_what_is_dropped_and_why(changes: dict[str, Any], reason: str) -> None:
    server = with_open_round()
    effects = server.update(1, "a", **changes)
    assert reasons(effects) == [reason]
    assert len(effects) == 1


def test_a_late_update_is_dropped() -> None:
    server = with_open_round()
    server.update(1, "a")
    server.update(1, "b")
    assert reasons(server.update(2, "a", version=0)) == ["late"]
    assert reasons(server.update(2, "stranger")) == ["not asked"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": bytes(8)}, Reason.RESYNCHRONISE),
        ({"scalars": (1.0, 2.0)}, Reason.WRONG_STEPS),
        ({"seeds": (7,)}, Reason.WRONG_SEEDS),
    ],
)
def test_what_is_refused_and_why(changes: dict[str, Any], reason: Reason) -> None:
    server = with_open_round()
    (reply,) = only(e.Reply, server.update(1, "a", boot=9, **changes))
    assert reply.node == "a"
    assert (reply.frame.boot, reply.frame.reason) == (9, reason)  # type: ignore[union-attr]
    server.update(2, "a")
    server.update(2, "b")
    assert server.machine.version == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"scalars": (math.nan,)}, "not finite"),
        ({"scalars": (-math.inf,)}, "not finite"),
        ({"loss": math.inf}, "not finite"),
        ({"scalars": (3e38,)}, "too large"),
    ],
)
def test_an_update_that_cannot_be_applied_is_kept_acknowledged_and_left_out(changes: dict[str, Any], why: str) -> None:
    server = with_open_round(lr=10.0)
    effects = server.update(1, "a", **changes)
    assert reasons(effects) == [f"refused: {why}"]
    (reply,) = only(e.Reply, effects)
    assert reply.frame.reason is Reason.OUT_OF_RANGE  # type: ignore[union-attr]
    assert reasons(server.update(1, "a", 1.0, boot=2)) == ["duplicate"]
    server.update(2, "b", 3.0)
    (closed,) = server.entries
    assert closed.entry.terms == (Coefficient(0, 0, 30.0),)
    assert [(r.node, bool(r.verdict)) for r in closed.records] == [("a", True), ("b", False)]


def test_a_round_of_refused_updates_alone_changes_nothing() -> None:
    server = with_open_round()
    server.update(1, "a", math.nan)
    server.update(1, "b", math.nan)
    assert server.entries[0].entry.terms == ()
    assert server.machine.version == 1


@pytest.mark.parametrize("way", ["update", "want"])
def test_a_server_whose_nodes_have_seen_a_higher_term_takes_one_above_it_once(way: str) -> None:
    server, seen = with_open_round(), header(9, 7)
    asked = server.give(e.WantCame(1, "a", Want(seen, 1))) if way == "want" else server.update(1, "a", header=seen)
    assert only(e.TakeTerm, asked) == [e.TakeTerm(7)]
    assert not only(e.TakeTerm, server.update(2, "b", term=9))


def test_a_term_that_no_server_takes_does_not_hide_a_real_one() -> None:
    server = with_open_round()
    forged = server.update(1, "a", term=1 + LARGEST_STEP)
    assert reasons(forged)[:1] == ["a term that no server takes"]
    assert not only(e.TakeTerm, forged)
    assert only(e.TakeTerm, server.update(2, "b", term=LARGEST_STEP)) == [e.TakeTerm(LARGEST_STEP)]


def test_snapshots_are_kept_where_a_digest_is_due() -> None:
    server = with_open_round(snapshot_every=3, digest_every=2)
    for version in range(9):
        server.update(version, "a", base=server_base(version))
        server.update(version, "b", base=server_base(version))
    kept = only(e.KeepSnapshot, server.seen)
    assert [snapshot.version for snapshot in kept] == [4, 6]
    assert kept[0].head == server.entries[3].entry.hash(RUN)


def server_base(version: int) -> bytes:
    """The first bytes of the newest digest at or before a version, where every second is due."""
    return (base_after(version // 2 * 2 - 1) if version >= 2 else THETA_0)[:8]


def test_the_explicit_seeds_of_the_own_lane_are_taken() -> None:
    server = with_open_round(lanes=2, steps=2)
    seeds = tuple(seed_for(RUN, 0, 1, step) for step in range(2))
    assert only(e.CommitUpdate, server.update(1, "b", 1.0, 2.0, seeds=seeds))


def test_the_base_is_the_newest_due_digest() -> None:
    server = with_open_round(digest_every=2)
    for version, base in enumerate((THETA_0, THETA_0, base_after(1), base_after(1), base_after(3))):
        server.update(version, "a", base=base[:8])
        server.update(version, "b", base=base[:8])
    assert server.machine.version == 5


def test_an_entry_is_the_mean_by_lane() -> None:
    server = with_open_round(lanes=2)
    server.update(1, "a", 3.0)
    server.update(1, "b", 5.0)
    entry = server.entries[0].entry
    assert entry.terms == (Coefficient(0, 0, 0.75), Coefficient(1, 0, 1.25))
    assert entry.previous == MASK
    assert entry.digest == base_after(0)


def test_rows_weigh_when_they_are_to_and_are_capped() -> None:
    server = answered_server(weigh_by_rows=True)
    server.born(0, "a", rows=2**31)
    server.born(0, "b", rows=0)
    server.update(1, "a")
    server.update(1, "b")
    assert [r.weight for r in server.entries[0].records] == [2**24, 1]


def test_no_number_of_rows_makes_a_node_the_mean() -> None:
    """One node said that it had 16 million rows, and 0.0: nothing was learned, and nothing stood out."""
    server = answered_server(min_nodes=4, quorum=1.0, weigh_by_rows=True)
    for node, rows in zip("abcd", (100, 90, 110, 2**31), strict=True):
        server.born(0, node, rows=rows)
    for node in "abc":
        server.update(1, node, 8.0)
    assert "weighs less than its rows" in reasons(server.update(1, "d", 0.0))
    assert [r.weight for r in server.entries[0].records] == [100, 90, 110, 4 * 100]
    (term,) = server.entries[0].entry.terms
    assert term.coefficient == pytest.approx(0.5 * 8.0 * 300 / 700)


def test_the_largest_gradients_still_make_a_finite_entry() -> None:
    server = with_open_round(lr=0.5, weigh_by_rows=True)
    largest = 2.0**65
    server.update(1, "a", largest)
    server.update(1, "b", largest)
    assert math.isfinite(server.entries[0].entry.terms[0].coefficient)


def test_slots_stay_with_their_nodes_and_are_kept_of_those_that_answered() -> None:
    server = with_open_round()
    server.gone(1, "a", "stopped")
    server.born(2, "c")
    server.born(3, "a", boot=2, link=2)
    server.update(4, "b")
    server.tick(101)  # the round is extended, and asks them all
    for node in ("a", "c"):
        server.update(102, node)
    kept = [(commit.node, commit.slot) for commit in only(e.CommitSlot, server.seen)]
    assert kept == [("b", 1), ("a", 0), ("c", 2)]
    assert [reply.frame.slot for reply in only(e.Reply, server.seen) if reply.node == "a"] == [0, 0]  # type: ignore[union-attr]


def test_a_slot_is_committed_before_the_update_that_names_it() -> None:
    server = with_open_round(e.CommitSlot, e.CommitUpdate)
    server.update(1, "b")
    assert [type(effect) for effect in server.held] == [e.CommitSlot, e.CommitUpdate]


def test_there_are_no_more_slots_than_a_frame_can_name() -> None:
    server = answered_server(resume={"slots": {"a": MAX_SLOTS - 1}})
    assert reasons(server.born(0, "b")) == ["no slot left"]
    server.born(0, "a")
    encode(server.round)


def test_wants_are_answered() -> None:
    server = with_open_round()
    welcome = server.give(e.WantCame(1, "a", Want(header(), 7, welcome=True)))
    assert only(e.Reply, welcome)[0].frame.boot == 7
    assert only(e.PublishRound, welcome)
    entries = server.give(e.WantCame(1, "a", Want(header(), 7, entries_from=3)))
    assert entries == [e.SendEntries("a", 3)]
    chunks = Want(header(), 7, blob=MASK, chunks=(1,))
    assert server.give(e.WantCame(1, "a", chunks)) == [e.SendChunks("a", chunks)]
    assert server.give(e.WantCame(1, "stranger", Want(header(), 7, welcome=True))) == []


@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_a_fraction_of_the_nodes_is_asked_another_one_each_round(fraction: float) -> None:
    names = [f"n{number}" for number in range(10)]
    server = answered_server(fraction=fraction, min_nodes=10)
    server.born(0, *names)
    asked = []
    for version in range(5):
        asked.append(server.round.asked)
        assert server.round.asked == sample(RUN, version, range(10), fraction)
        for slot in sorted(asked[-1]):
            server.update(version, names[slot])
    assert {len(slots) for slots in asked} == {round(10 * fraction)}
    assert len(set(asked)) > 1


def test_answers_that_nobody_waits_for_change_nothing() -> None:
    server = with_open_round(e.ApplyTerms, e.CommitEntry)
    for junk in (
        e.SlotCommitted(1, "a"),
        e.SlotCommitted(1, "z"),
        e.TermsApplied(1, 0, MASK),
        e.EntryCommitted(1, e.CommitEntry(chain(1)[0], (), 2, overdue=False)),
    ):
        assert reasons(server.give(junk)) == ["unexpected answer"]
    server.update(2, "a", 3.0)
    server.give(e.UpdatesCommitted(3, (record("a", 0, g=9.0),)))
    server.update(4, "b", 1.0)
    server.answer(5)
    assert reasons(server.give(e.TermsApplied(6, 0, MASK))) == ["unexpected answer"]
    assert reasons(server.give(e.EntryCommitted(6, e.CommitEntry(chain(2)[1], (), 2, overdue=False)))) == [
        "unexpected answer"
    ]
    server.answer(7)
    assert [r.scalars for r in server.entries[0].records] == [(3.0,), (1.0,)]
    assert server.machine.version == 1


def test_what_the_ledger_says_it_holds_counts_whoever_asked_for_it() -> None:
    server = with_open_round()
    server.give(e.UpdatesCommitted(1, (record("b", 1, g=9.0), record("z", 7, g=2.0))))
    server.update(2, "a", 3.0)
    assert [r.scalars for r in server.entries[0].records] == [(3.0,), (9.0,), (2.0,)]


# --- a new term -----------------------------------------------------------------------------------------------------


def resumed(**more: Any) -> AnsweredServer:
    entries = chain(3)
    fields = {"term": 2, "base": base_after(2), "version": 3, "head": entries[-1].hash(RUN), "entries": entries}
    return answered_server(resume=fields | {"slots": {"a": 0, "b": 1}} | more)


def test_a_new_term_goes_on_where_the_ledger_ends() -> None:
    server = resumed()
    assert (server.round.header.term, server.round.header.version, server.round.is_open) == (2, 3, False)
    server.born(0, "b", "a")
    assert server.round.asked == {0, 1}
    assert reasons(server.update(1, "a", term=1)) == ["of another term"]
    server.update(1, "a", term=2)
    server.update(1, "b", term=2)
    entry = server.entries[0].entry
    assert (entry.version, entry.previous) == (3, chain(3)[-1].hash(RUN))
    server.born(2, "c")
    for node in ("a", "b", "c"):
        server.update(3, node, term=2)
    server.update(4, "c", term=2)
    assert only(e.CommitSlot, server.seen) == [e.CommitSlot("c", 2)]


def test_committed_updates_stay_heard_in_a_new_term() -> None:
    server = resumed(updates=(record("a", 0, 3, g=7.0),))
    server.born(0, "a", "b")
    assert server.round.heard == {0}
    assert reasons(server.update(1, "a", 9.0, term=2, boot=2)) == ["duplicate"]
    server.update(1, "b", 1.0, term=2)
    assert [r.scalars for r in server.entries[0].records] == [(7.0,), (1.0,)]


def test_an_update_heard_in_a_former_term_counts_when_its_node_is_gone() -> None:
    server = resumed(slots={"a": 0, "b": 1, "c": 2}, updates=(record("c", 2, 3, g=7.0), record("b", 1, 2)))
    server.born(0, "a", "b")
    assert (set(server.round.asked), set(server.round.heard)) == ({0, 1, 2}, {2})
    server.update(1, "a", term=2)
    server.update(1, "b", term=2)
    assert [r.node for r in server.entries[0].records] == ["a", "b", "c"]


def test_a_round_whose_updates_are_all_committed_closes_as_it_opens() -> None:
    server = resumed(updates=(record("a", 0, 3), record("b", 1, 3)))
    server.born(0, "a", "b")
    assert server.machine.version == 4
    assert server.round.is_open


def test_the_round_frame_keeps_its_size_when_a_long_ledger_is_resumed() -> None:
    entries = chain(100)
    server = answered_server(resume={"version": 100, "entries": entries, "head": entries[-1].hash(RUN)}, count=200)
    assert 0 < len(server.round.entries) < 30
    assert server.round.entries[-1] == entries[-1]


def test_a_finished_run_stays_finished() -> None:
    server = answered_server(resume={"version": 10})
    assert only(e.PublishState, server.seen) == [e.PublishState()]
    server.born(0, "a", "b")
    assert not server.round.is_open
