"""What only a ledger in memory has: crashes at every point, backups, several processes in one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.errors import AnotherServer
from meerkat_mq.ledger.store import Store
from meerkat_mq.simulate.checkers import check
from meerkat_mq.simulate.history import History
from meerkat_mq.worlds.ledger import MemoryLedger
from meerkat_mq.worlds.store import MemoryStore
from tests.ledger.ledgers import Writer, close_all
from tests.ledger.stores import begin, close, everything, round_, sent, update


class Crash(BaseException):
    """The process is no more."""


def crashing(after: int) -> Callable[[], None]:
    """A step that crashes at the call after so many."""
    left = iter(range(after))

    def step() -> None:
        if next(left, None) is None:
            raise Crash

    return step


def a_group(store: Store) -> None:
    with store.group():
        records = [update(1, slot) for slot in range(3)]
        store.commit_updates(records)
        sent(store, 0, 3) if store.version == 0 else store.keep_blob(b"mean")
        close(store, *records)


READ = ("entries", "entry_terms", "records", "products", "judgements", "terms", "open_updates", "blobs")
COMMITS: dict[str, Callable[[Store], object]] = {
    "group": a_group,
    "updates": lambda store: store.commit_updates([update(1, 0)]),
    "entry": close,
    "metrics": lambda store: store.commit_metrics(1, {"loss": 0.5}),
    "term": lambda store: store.take_term(5, "b" * 16, "there"),
    "snapshot": lambda store: store.keep_snapshot(1, b"snapshot"),
}


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("after", [0, 1])
def test_a_crash_leaves_a_commit_done_or_undone(commit: str, after: int) -> None:
    ledger = MemoryLedger()
    store = MemoryStore(ledger)
    begin(store)
    round_(store)
    backup, files, before = ledger.backup(), dict(ledger.files), everything(store)

    dying = MemoryStore(ledger, step=crashing(after))
    with pytest.raises(Crash):
        COMMITS[commit](dying)
    found = everything(MemoryStore(ledger))
    if after == 0:
        assert found == before
        return

    ledger.restore(backup)
    ledger.files = files
    COMMITS[commit](MemoryStore(ledger))
    assert found == everything(MemoryStore(ledger)) != before


def test_a_snapshot_without_its_row_is_swept_by_the_next_process() -> None:
    ledger = MemoryLedger()
    begin(MemoryStore(ledger))
    with pytest.raises(Crash):
        MemoryStore(ledger, step=crashing(0)).keep_snapshot(4, b"snapshot")
    assert (ledger.files, ledger.snapshots) == ({4: b"snapshot"}, {})
    MemoryStore(ledger).sweep()
    assert ledger.files == {}


def test_a_backup_is_what_the_ledger_was() -> None:
    ledger = MemoryLedger()
    store = MemoryStore(ledger, now=lambda: 5.0)
    begin(store)
    round_(store)
    store.commit_updates([update(1, 0)])
    store.keep_snapshot(1, b"early")
    then, backup = everything(store), ledger.backup()
    close(store, update(1, 0))
    round_(store)
    store.commit_metrics(0, {"loss": 0.5})
    store.keep_snapshot(3, b"late")
    for _ in range(2):
        ledger.restore(backup)
        again = MemoryStore(ledger)
        assert everything(again) == then
        assert ledger.files == {1: b"early", 3: b"late"}  # beside the ledger, as files are
        again.commit_updates([update(1, 1)])
    assert backup.files == {}


def test_a_server_whose_ledger_was_put_back_is_no_more_in_charge() -> None:
    ledger = MemoryLedger()
    store = MemoryStore(ledger)
    begin(store)
    backup = ledger.backup()
    store.take_term(0, "a" * 16, "here")
    ledger.restore(backup)
    with pytest.raises(AnotherServer):
        round_(store)
    ledger.restore(MemoryLedger())
    with pytest.raises(AnotherServer):
        round_(store)
    assert ledger.entries == {}


def test_times_are_the_worlds() -> None:
    times = iter(range(1, 10))
    store = MemoryStore(now=lambda: float(next(times)))
    begin(store)
    round_(store)
    assert (store.ledger.begun[1].created, store.terms()[0].taken, store.closed(0, 1)[0].closed) == (1.0, 2.0, 3.0)


def test_checkers_read_the_same_history_from_every_store(tmp_path: Path) -> None:
    ways: dict[str, Any] = {"max_staleness": 2, "absent": [(1, 1)], "ages": {(2, 1): 1}, "values": {2: "int8"}}
    histories = []
    for store in (None, MemoryStore()):
        writer = Writer(tmp_path, store=store, **ways)
        for _ in range(writer.count - 1):
            writer.round()
        writer.hear()
        history = History(writer.mask, writer.settings)
        history.take_ledger(writer.ledger)
        histories.append(history)
    close_all()
    of_sqlite, of_memory = ([getattr(history, name) for name in READ] for history in histories)
    assert of_sqlite == of_memory
    assert (len(histories[1].entries), len(histories[1].open_updates)) == (5, 3)
    for name in ("coefficients recomputable", "displacements recomputable", "judgements recomputable"):
        assert check(histories[1])[name] == []
