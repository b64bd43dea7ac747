"""What ledger/store.py promises, of every store: what is kept, and what is forgotten."""

from dataclasses import replace
from typing import Any

import pytest

from meerkat_mq.core.path import Displacement, short_hash
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.store import REFUSING_KEPT, Sighting, Store
from meerkat_mq.rounds.records import Judgement, Moved, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import REFUSES
from meerkat_mq.wire.entries import entry_bytes
from tests.ledger.stores import NODES, Kept, blob_of, close, round_, sent, update
from tests.rounds.support import settings

MEASURED = settings(lanes=2, steps=2)


# --- what waits, and what is forgotten ---


def test_an_update_closes_with_the_entry_that_names_it_and_waits_until_then(buffered: Store) -> None:
    first, second, third = update(0, 0), update(0, 1), update(1, 0)
    buffered.commit_updates([first, second])
    close(buffered, first)
    assert (buffered.records(0), buffered.open_updates()) == ((first,), (second,))
    buffered.commit_updates([third])
    refused = replace(second, verdict=Verdict.OUTLIER)
    close(buffered, refused, third)
    assert (buffered.records(1), buffered.open_updates()) == ((refused, third), ())
    assert (buffered.past(9), buffered.past(1)) == ([(first,), (refused, third)], [(refused, third)])
    assert buffered.updates_of(0, 1) == [(0, first), (1, refused), (1, third)]
    assert buffered.updates(0, 9, "n0") == [(0, first), (1, third)]
    assert buffered.updates(1, 2, "n0") == [(1, third)]
    assert buffered.updates(0, 9, "n9") == []


def test_who_was_heard_within_the_window(buffered: Store) -> None:
    buffered.commit_updates([update(0, 0), update(0, 1)])
    close(buffered, update(0, 0))
    buffered.commit_updates([update(1, 0), update(1, 2)])
    assert buffered.heard() == {"n0": 1, "n1": 0, "n2": 1}
    close(buffered)
    close(buffered)
    assert buffered.heard() == {"n0": 1, "n2": 1}


def test_who_was_heard_of_a_synchronous_run(store: Store) -> None:
    round_(store)
    assert store.heard() == {"n0": 0, "n1": 0, "n2": 0}
    store.commit_updates([update(1, 1)])
    close(store, update(1, 1))
    assert store.heard() == {"n1": 1}


def test_what_a_displacement_was_measured_to_be_is_kept_with_the_entry(store: Store) -> None:
    came, path = sent(store, 0, 1), update(0, 0)
    store.commit_updates([path])
    assert store.open_updates() == (path, came)
    measured = replace(came, verdict=Verdict.AGAINST, moved=Moved(0.25, -0.5, (1.5, -2.0)))
    close(store, path, measured)
    assert store.records(0) == (path, measured)


def test_what_is_too_old_for_any_entry_is_forgotten(buffered: Store) -> None:
    waits = list[UpdateRecord]()
    for version in range(3):
        waits.append(update(version, 0))
        buffered.commit_updates(waits[-1:])
        assert list(buffered.open_updates()) == waits
        close(buffered)
    for left in (waits[1:], waits[2:], []):
        assert list(buffered.open_updates()) == left
        close(buffered)
    late = update(buffered.version - 3, 1)  # on its way when the last entry that could take it closed
    buffered.commit_updates([late])
    assert (buffered.open_updates(), buffered.astray()) == ((), None)
    close(buffered)
    assert (buffered.updates(0, 99, "n1"), buffered.astray()) == ([], None)


def test_a_displacement_stays_as_long_as_an_update_or_an_entry_names_it(buffered: Store) -> None:
    taken, refused = sent(buffered, 0, 1), sent(buffered, 1, 2, verdict=Verdict.TOO_LARGE)
    waiting = sent(buffered, 2, 3)
    mean, nobodys = buffered.keep_blob(b"mean"), buffered.keep_blob(b"nobody's")
    close(buffered, taken, refused, displacement=Displacement(mean, 4))
    assert None not in [blob_of(buffered, record) for record in (taken, refused, waiting)]
    assert (buffered.blob(mean), buffered.blob(nobodys)) == (b"mean", None)
    for _ in range(4):
        close(buffered)
    assert [blob_of(buffered, record) is None for record in (taken, refused, waiting)] == [False, False, True]
    assert buffered.blob(mean) == b"mean"


def test_two_updates_may_name_one_displacement(buffered: Store) -> None:
    taken, waiting = sent(buffered, 0, 1), sent(buffered, 1, 1)
    close(buffered, taken)
    for _ in range(4):
        close(buffered)
    assert buffered.open_updates() == ()
    assert blob_of(buffered, waiting) is not None


def test_what_a_killed_server_kept_for_nobody_goes_with_the_next_term(kept: Kept, store: Store) -> None:
    taken, nobodys = sent(store, 0, 1), store.keep_blob(b"nobody's")
    again = kept.open()
    again.take_term(0, "6" * 16, "here")
    assert blob_of(again, taken) is not None
    assert again.blob(nobodys) is None


def test_nodes_get_the_displacements_of_entries_only(store: Store) -> None:
    record, mean = sent(store, 0, 1), store.keep_blob(b"mean")
    close(store, record, displacement=Displacement(mean, 4))
    assert record.values is not None
    assert (store.displacement(mean), store.displacement(record.values.blob)) == (b"mean", None)
    assert store.stretch(0) == (1, entry_bytes(store.entries(0, 1)[0]), 4)


def test_a_damaged_displacement_is_named(kept: Kept, store: Store) -> None:
    record = sent(store, 0, 3)
    assert record.values is not None
    assert store.values(record.values.blob, 40).tolist() == [3.0] * 40
    kept.alter_blob(record.values.blob, b"damaged")
    with pytest.raises(LedgerError, match="holds a displacement that no server writes"):
        store.values(record.values.blob, 40)
    with pytest.raises(LedgerError, match="lacks the displacement 0000"):
        store.values(bytes(16), 40)


# --- snapshots ---


def test_two_snapshots_are_kept(kept: Kept, store: Store) -> None:
    for version in (2, 3, 4):
        store.keep_snapshot(version, bytes([version]))
    for found in (store, kept.open()):
        assert [(s.version, s.hash, s.size) for s in found.snapshots()] == [
            (4, short_hash(b"\4"), 1), (3, short_hash(b"\3"), 1),
        ]  # fmt: skip
        assert [found.snapshot(s) for s in found.snapshots()] == [b"\4", b"\3"]
        assert [found.has_whole(s) for s in found.snapshots()] == [True, True]


@pytest.mark.parametrize(("blob", "left"), [(b"", b""), (b"damaged", b"damaged"), (None, None)])
def test_a_damaged_snapshot_is_not_whole(kept: Kept, store: Store, blob: bytes | None, left: bytes | None) -> None:
    store.keep_snapshot(4, b"snapshot")
    (snapshot,) = store.snapshots()
    assert [store.has_whole(snapshot) for _ in range(2)] == [True, True]
    kept.write_snapshot(4, blob)
    assert not store.has_whole(snapshot)
    assert store.snapshot(snapshot) == left
    kept.write_snapshot(4, b"snapshot")
    assert store.has_whole(snapshot)


def test_bytes_that_no_row_names_are_swept(kept: Kept, store: Store) -> None:
    store.keep_snapshot(4, b"snapshot")
    kept.write_snapshot(6, b"interrupted before its row")
    store.sweep()
    (snapshot,) = store.snapshots()
    assert store.snapshot(snapshot) == b"snapshot"
    assert store.snapshot(replace(snapshot, version=6)) is None


# --- GradIP, judgements, news ---


def judged(version: int, *stopped: bool) -> tuple[Judgement, ...]:
    return tuple(Judgement(version, f"n{slot}", 1.5 + version, 0.25, early) for slot, early in enumerate(stopped))


def calibrate(store: Store, *stopped: bool) -> None:
    version = store.version
    records = tuple(update(version, slot) for slot in range(3))
    store.commit_updates(records)
    products = ((0.5, -1.5), (2.0**-149, float(version)))
    close(store, *records, products=products, judgements=judged(version, *stopped))


def test_products_come_back(store: Store) -> None:
    calibrate(store)
    close(store)
    assert store.products(0, MEASURED) == ((0.5, -1.5), (2.0**-149, 0.0))
    assert (store.products(1, MEASURED), store.products(2, MEASURED)) == ((), None)
    with pytest.raises(LedgerError):
        store.products(0, settings(lanes=2, steps=3))


def test_the_newest_judgement_of_a_node_counts(store: Store) -> None:
    calibrate(store, True, False)
    calibrate(store)
    calibrate(store, True)
    assert [store.judgements(version) for version in range(4)] == [judged(0, True, False), (), judged(2, True), ()]
    assert store.newest_judgements() == (*judged(2, True), judged(0, True, False)[1])
    assert store.early_stopped_since() == {"n0": 0}
    assert store.judged_while_open() is None


def test_since_when_a_node_is_early_stopped(store: Store) -> None:
    for stopped in [(True, True), (False, True), (True, True), (True, False)]:
        calibrate(store, *stopped)
    assert store.early_stopped_since() == {"n0": 2}


def test_news_of_nodes(store: Store) -> None:
    store.commit_sightings([Sighting("n1", 7, "h", "online", 30, 10.0, 2, 100), Sighting("x", 1, "h", "lost", 0, 1.0)])
    store.commit_sightings([Sighting("n1", 8, "h", "lost", 31, 12.0, 1, 50)])
    row = store.nodes()[1]
    assert (row.node, row.boot, row.host, row.status, row.rows) == ("n1", 8, "h", "lost", 31)
    assert (row.first_seen, row.last_seen, row.updates, row.packet_bytes) == (10.0, 12.0, 3, 150)
    assert len(store.nodes()) == 3


def refusing(node: str, seen: float = 1.0, **changes: Any) -> Sighting:
    return replace(Sighting(node, 7, "h", f"{REFUSES}policy.mask: another", 30, seen, 1, 50), **changes)


def test_who_refuses_the_run_is_kept_without_a_slot_until_it_takes_part(kept: Kept, store: Store) -> None:
    store.commit_sightings([refusing("y"), refusing("x"), replace(refusing("z"), status="online")])
    store.commit_sightings([refusing("x", 2.0)])
    for found in (store, kept.open()):
        assert [(row.node, row.slot, row.slot_version) for row in found.refusing()] == [
            ("x", None, None), ("y", None, None),
        ]  # fmt: skip
        row = found.refusing()[0]
        assert (row.status, row.first_seen, row.last_seen) == (f"{REFUSES}policy.mask: another", 1.0, 2.0)
        assert (row.rows, row.updates, row.packet_bytes) == (30, 2, 100)
        assert [row.node for row in found.nodes()] == list(NODES)
    store.commit_sightings([refusing("x", 3.0, status="online")])
    assert [row.status for row in store.refusing()] == ["online", f"{REFUSES}policy.mask: another"]
    store.commit_slot("x", 3, 0)
    assert [row.node for row in store.refusing()] == ["y"]
    assert (store.nodes()[3].node, store.nodes()[3].status, store.nodes()[3].updates) == ("x", None, 0)


def test_news_of_one_commit_count_whole_for_who_refuses_in_it(store: Store) -> None:
    store.commit_sightings([refusing("x", status="online"), refusing("x", 2.0)])
    assert [(row.first_seen, row.updates) for row in store.refusing()] == [(1.0, 2)]


def test_a_node_with_a_slot_that_refuses_keeps_it(store: Store) -> None:
    store.commit_sightings([refusing("n1")])
    assert store.refusing() == ()
    assert store.nodes()[1].status == f"{REFUSES}policy.mask: another"


def test_of_those_who_refuse_a_hundred_are_kept(store: Store) -> None:
    store.commit_sightings([refusing(f"x{number:03}") for number in range(60)])
    store.commit_sightings([refusing(f"x{number:03}", 2.0) for number in range(40, 140)])
    rows = store.refusing()
    assert [row.node for row in rows] == [f"x{number:03}" for number in range(REFUSING_KEPT)]
    assert [row.last_seen for row in rows] == [1.0] * 40 + [2.0] * 60


def test_metrics_by_version_and_name(store: Store) -> None:
    store.commit_metrics(2, {"loss": 1.5, "accuracy": 0.5})
    store.commit_metrics(0, {"loss": 2.5})
    store.commit_metrics(2, {"loss": 1.0})
    assert store.metrics() == {0: {"loss": 2.5}, 2: {"accuracy": 0.5, "loss": 1.0}}
