"""What ledger/store.py promises, of every store: the fence, groups, what is durable, order, the first one wins."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import AnotherServer, LedgerError
from meerkat_mq.ledger.store import Sighting, Store
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.wire.entries import entry_bytes
from tests.ledger.stores import Kept, begin, close, entry, everything, round_, sent, update

# --- the run ---


def test_an_empty_ledger_holds_nothing(empty: Store) -> None:
    assert (empty.run, empty.rules, empty.version, empty.term, empty.window) == (None, {}, 0, 0, 0)
    assert (empty.terms(), empty.nodes(), empty.open_updates(), empty.snapshots()) == ((), (), (), ())
    assert (empty.heard(), empty.metrics(), empty.past(5), empty.updates_of(0, 5)) == ({}, {}, [], [])
    assert (empty.newest_judgements(), empty.early_stopped_since(), empty.astray()) == ((), {}, None)


def test_of_two_servers_that_begin_at_once_one_does(kept: Kept, empty: Store) -> None:
    begin(empty)
    assert empty.run is not None
    with pytest.raises(AnotherServer, match="another server has just begun a run here"):
        kept.open().begin(empty.run.model_copy(update={"run": "0" * 32}), {})
    assert empty.run.run != "0" * 32


def test_the_run_tells_how_old_an_update_may_be(buffered: Store) -> None:
    assert buffered.window == 2


# --- the fence ---


def test_a_term_is_higher_than_every_earlier_one(kept: Kept, store: Store) -> None:
    assert (store.term, store.in_charge) == (1, True)
    other = kept.open()
    assert not other.in_charge
    assert other.take_term(6, "b" * 16, "there") == 7
    assert (other.in_charge, store.in_charge) == (True, False)
    assert other.take_term(3, "b" * 16, "there") == 8
    assert [(taken.term, taken.server_id, taken.host) for taken in other.terms()] == [
        (1, "a" * 16, "here"), (7, "b" * 16, "there"), (8, "b" * 16, "there"),
    ]  # fmt: skip


COMMITS: dict[str, Callable[[Store], object]] = {
    "slot": lambda store: store.commit_slot("n9", 9, 0),
    "updates": lambda store: store.commit_updates([update(1, 0)]),
    "no updates": lambda store: store.commit_updates([]),
    "blob": lambda store: store.keep_blob(b"blob"),
    "entry": close,
    "snapshot": lambda store: store.keep_snapshot(1, b"snapshot"),
    "sightings": lambda store: store.commit_sightings([Sighting("n0", 1, "h", "online", 5, 1.0)]),
    "metrics": lambda store: store.commit_metrics(0, {"loss": 1.0}),
    "term": lambda store: store.take_term(100, "a" * 16, "here"),
}


@pytest.mark.parametrize("commit", COMMITS)
def test_whoever_takes_a_term_fences_all_before(kept: Kept, store: Store, commit: str) -> None:
    other = kept.open()
    other.take_term(6, "b" * 16, "there")
    round_(other)
    before = everything(other)
    with pytest.raises(AnotherServer, match=r"a server of term 7 .*has taken over from this one, of term 1"):
        COMMITS[commit](store)
    assert everything(other) == before
    assert not store.in_charge


def test_a_server_id_is_part_of_the_fence(kept: Kept, store: Store) -> None:
    assert kept.open().term == 1
    again = kept.open()
    assert not again.in_charge  # a new process has to take a term of its own
    again.take_term(0, "a" * 16, "here")
    with pytest.raises(AnotherServer):
        round_(store)


def test_the_fence_holds_between_the_groups_of_one_server(kept: Kept, store: Store) -> None:
    with store.group():
        round_(store)
    kept.open().take_term(0, "b" * 16, "there")
    with pytest.raises(AnotherServer), store.group():
        pytest.fail("the group begins")
    assert store.version == 1


# --- groups ---


def fail_after(store: Store, *commits: Callable[[Store], object]) -> None:
    def fail() -> None:
        with store.group():
            for commit in commits:
                commit(store)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("commit", COMMITS)
def test_a_group_that_fails_leaves_no_trace(store: Store, commit: str) -> None:
    round_(store)
    before = everything(store)
    fail_after(store, lambda store: sent(store, 1, 1), COMMITS[commit])
    assert everything(store) == before
    round_(store)  # it can be tried again
    assert (store.version, store.in_charge) == (2, True)


def test_a_group_sees_what_it_wrote(store: Store) -> None:
    with store.group():
        records = round_(store)
        assert (store.version, store.records(0)) == (1, records)
        with store.group():
            round_(store)
        assert store.version == 2
    assert store.version == 2


def test_a_commit_that_is_refused_takes_its_group_with_it(store: Store) -> None:
    def commit_twice() -> None:
        with store.group():
            round_(store)
            store.commit_updates([update(0, 0)])

    with pytest.raises(LedgerError):
        commit_twice()
    assert (store.version, store.open_updates()) == (0, ())


def test_a_term_that_was_taken_in_a_failed_group_is_not_taken(kept: Kept, store: Store) -> None:
    other = kept.open()
    fail_after(other, lambda other: other.take_term(5, "b" * 16, "there"))
    assert (other.term, other.in_charge, store.in_charge) == (1, False, True)


def test_a_displacement_of_a_failed_group_can_be_kept_again(store: Store) -> None:
    fail_after(store, lambda store: store.keep_blob(b"blob"))
    name = short_hash(b"blob")
    assert store.blob(name) is None
    assert store.keep_blob(b"blob") == name
    close(store)
    assert store.blob(name) is None  # nobody names it


def test_a_group_of_nothing(store: Store) -> None:
    before = everything(store)
    with store.group():
        store.commit_updates([])
        store.commit_sightings([])
        store.commit_metrics(0, {})
    assert everything(store) == before


# --- what is durable ---


def test_what_was_committed_is_there_for_another_process(kept: Kept, store: Store) -> None:
    round_(store)
    store.commit_updates([update(1, 0)])
    store.commit_metrics(1, {"loss": 0.5})
    store.keep_snapshot(1, b"snapshot")
    assert everything(kept.open()) == everything(store)


def test_what_a_killed_process_had_not_committed_has_never_been(kept: Kept, store: Store) -> None:
    round_(store)
    before = everything(store)
    fail_after(store, round_, lambda store: store.take_term(9, "a" * 16, "here"))
    assert everything(kept.open()) == before


# --- order ---


def test_entries_come_back_in_order(store: Store) -> None:
    rounds = [round_(store) for _ in range(5)]
    assert store.version == 5
    assert [found.version for found in store.entries(1, 3)] == [1, 2, 3]
    assert store.entries(4, 3) == (entry(4),)
    assert store.entries(5, 3) == ()
    assert [(found.term, found.asked, found.overdue) for found in store.closed(3, 1)] == [(1, 3, False)]
    assert [store.records(version) for version in range(5)] == rounds
    assert (store.past(2), store.past(99)) == (rounds[3:], rounds)


def test_an_entry_is_the_next_one(store: Store) -> None:
    for version in (1, 7):
        with pytest.raises(AssertionError):
            store.commit_entry(entry(version), (), 3, overdue=False)
    assert store.version == 0


def test_updates_come_back_by_version_and_slot(buffered: Store) -> None:
    close(buffered)
    records = [update(1, 2), update(0, 2), update(1, 0), update(0, 1)]
    buffered.commit_updates(records)
    assert buffered.open_updates() == (records[3], records[1], records[2], records[0])
    close(buffered, *records)
    assert buffered.records(1) == (records[3], records[1], records[2], records[0])


def test_a_slot_is_one_nodes_and_a_node_has_one(store: Store) -> None:
    for node, slot in (("n0", 5), ("n5", 0)):
        with pytest.raises(LedgerError):
            store.commit_slot(node, slot, 0)
    assert store.slots() == {"n0": 0, "n1": 1, "n2": 2}
    assert [(row.node, row.slot, row.slot_version, row.status) for row in store.nodes()] == [
        ("n0", 0, 0, None), ("n1", 1, 0, None), ("n2", 2, 0, None),
    ]  # fmt: skip


def test_entries_within_a_size(store: Store) -> None:
    for _ in range(4):
        close(store)
    size = entry_bytes(entry(0))
    assert [found.version for found in store.entries_within(1, 9, 2 * size)] == [1, 2]
    assert [found.version for found in store.entries_within(1, 2, 99 * size)] == [1, 2]
    assert [found.version for found in store.entries_within(2, 9, 1)] == [2]
    assert store.entries_within(4, 9, 99) == ()
    assert store.stretch(2) == (2, 2 * size, 0)


# --- the first one wins ---


@pytest.mark.parametrize("changes", [{}, {"scalars": (9.0,)}, {"boot": 8}, {"verdict": Verdict.OUTLIER}])
def test_the_first_update_of_a_node_from_a_version_stays(kept: Kept, store: Store, changes: dict[str, Any]) -> None:
    first, other = update(0, 0), update(0, 1)
    store.commit_updates([first])
    for server in (store, kept.open()):
        server.take_term(0, "c" * 16, "here")
        with pytest.raises(LedgerError):
            server.commit_updates([other, update(0, 0, **changes)])
        assert server.open_updates() == (first,)


def test_an_update_stays_the_first_when_it_is_in_an_entry(buffered: Store) -> None:
    first = update(0, 0)
    buffered.commit_updates([first])
    close(buffered, first)
    with pytest.raises(LedgerError):
        buffered.commit_updates([update(0, 0, scalars=(9.0,))])
    assert (buffered.records(0), buffered.open_updates()) == ((first,), ())


def test_the_entry_brings_the_final_verdicts(store: Store) -> None:
    committed = [update(0, 0), update(0, 1)]
    store.commit_updates(committed)
    judged = (committed[0], replace(committed[1], verdict=Verdict.OUTLIER))
    store.commit_entry(entry(0), judged, 3, overdue=True)
    assert store.records(0) == judged
    assert store.closed(0, 1)[0].overdue is True


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e-45])
def test_numbers_that_no_node_should_send_come_back(store: Store, loss: float) -> None:
    hostile = update(0, 0, loss=loss, verdict=Verdict.NOT_FINITE, scalars=(math.nan, math.inf, -math.inf))
    store.commit_updates([hostile])
    assert repr(store.open_updates()) == repr((hostile,))
