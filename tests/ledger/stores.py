"""The stores that the contract holds for: what is durable, how to open and to damage it; and a small run in them."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from meerkat_mq.config import RoundsConfig
from meerkat_mq.core.path import Coefficient, Displacement, Entry
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.ledger.files import snapshot_file
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.wire.messages import Values
from meerkat_mq.wire.values import encode_values
from meerkat_mq.worlds.ledger import MemoryLedger
from meerkat_mq.worlds.store import MemoryStore
from tests.ledger.ledgers import alter, alter_entry, descriptor

NODES = ("n0", "n1", "n2")


class Kept(Protocol):
    """What outlives a process."""

    def open(self) -> Store:
        """What a new process has of it."""

    def alter_entry(self, entry: Entry) -> None: ...

    def lose_entry(self, version: int) -> None: ...

    def alter_update(self, version: int, slot: int, loss: float, entry: int | None) -> None: ...

    def alter_blob(self, name: bytes, blob: bytes) -> None: ...

    def write_snapshot(self, version: int, blob: bytes | None) -> None:
        """Put other bytes where a snapshot's are; None: remove them."""

    def close(self) -> None: ...


class InSqlite:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: list[Ledger] = []

    def open(self) -> Ledger:
        self._opened.append(Ledger.open(self._folder / LEDGER_FILE))
        return self._opened[-1]

    def alter_entry(self, entry: Entry) -> None:
        alter_entry(self._folder, entry.version, entry)

    def lose_entry(self, version: int) -> None:
        alter(self._folder, "DELETE FROM entries WHERE version = ?", version)

    def alter_update(self, version: int, slot: int, loss: float, entry: int | None) -> None:
        where = "WHERE version = ? AND slot = ?"
        alter(self._folder, f"UPDATE updates SET loss = ?, entry = ? {where}", loss, entry, version, slot)

    def alter_blob(self, name: bytes, blob: bytes) -> None:
        alter(self._folder, "UPDATE blobs SET data = ? WHERE hash = ?", blob, name)

    def write_snapshot(self, version: int, blob: bytes | None) -> None:
        file = snapshot_file(self._folder, version)
        file.unlink(missing_ok=True)
        if blob is not None:
            file.write_bytes(blob)

    def close(self) -> None:
        for ledger in self._opened:
            ledger.close()


class InMemory:
    """Tables."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger()

    def open(self) -> MemoryStore:
        return MemoryStore(self.ledger)

    def alter_entry(self, entry: Entry) -> None:
        closed = self.ledger.entries[entry.version]
        self.ledger.entries[entry.version] = replace(closed, entry=entry)

    def lose_entry(self, version: int) -> None:
        del self.ledger.entries[version]

    def alter_update(self, version: int, slot: int, loss: float, entry: int | None) -> None:
        _, record = self.ledger.updates[version][slot]
        self.ledger.updates[version][slot] = entry, replace(record, loss=loss)

    def alter_blob(self, name: bytes, blob: bytes) -> None:
        self.ledger.blobs[name] = blob

    def write_snapshot(self, version: int, blob: bytes | None) -> None:
        self.ledger.files.pop(version, None)
        if blob is not None:
            self.ledger.files[version] = blob

    def close(self) -> None:
        pass


# --- a small run, without theta ---


def begin(store: Store, window: int = 0) -> None:
    mode: dict[str, Any] = {"mode": "buffered", "max_staleness": window} if window else {}
    rounds = RoundsConfig(count=10, directions=1, **mode)
    store.begin(descriptor(toy_mask(40), rounds, "toy", accept=True), {})
    store.take_term(0, "a" * 16, "here")
    for slot, node in enumerate(NODES):
        store.commit_slot(node, slot, 0)


def update(version: int, slot: int, **changes: Any) -> UpdateRecord:
    return replace(UpdateRecord(version, f"n{slot}", slot, 7, 1, (0.5,), 0.5), **changes)


def entry(version: int, coefficient: float = 0.5, displacement: Displacement | None = None) -> Entry:
    return Entry(version, (Coefficient(0, 0, coefficient),), bytes(16), bytes([version] * 16), displacement)


def close(store: Store, *records: UpdateRecord, displacement: Displacement | None = None, **more: Any) -> None:
    store.commit_entry(entry(store.version, displacement=displacement), records, 3, overdue=False, **more)


def round_(store: Store) -> tuple[UpdateRecord, ...]:
    records = tuple(update(store.version, slot) for slot in range(3))
    store.commit_updates(records)
    close(store, *records)
    return records


def displacement(number: int) -> bytes:
    return encode_values(np.full(40, number, dtype=np.float32), "int8")


def sent(store: Store, version: int, number: int, **changes: Any) -> UpdateRecord:
    """The update of a values node, with its displacement."""
    blob = displacement(number)
    found = update(version, 2, scalars=(), values=Values(store.keep_blob(blob), len(blob), 5), **changes)
    store.commit_updates([found])
    return found


def blob_of(store: Store, record: UpdateRecord) -> bytes | None:
    assert record.values is not None
    return store.blob(record.values.blob)


def everything(store: Store) -> dict[str, object]:
    """All that can be read, but times."""
    version = store.version
    closed = [(found.entry, found.term, found.asked, found.overdue) for found in store.closed(0, version + 1)]
    blobs = [record.values.blob for found in store.past(version) for record in found if record.values]
    snapshots = store.snapshots()
    return {
        "run": (store.run, store.window, version, store.term),
        "terms": [(found.term, found.server_id, found.host) for found in store.terms()],
        "nodes": store.nodes(),
        "refusing": store.refusing(),
        "slots": store.slots(),
        "closed": closed,
        "updates": repr([store.records(number) for number in range(version)]),
        "open": repr(store.open_updates()),
        "given": repr([store.updates(0, version + 1, node) for node in NODES]),
        "heard": store.heard(),
        "past": repr((store.past(2), store.past(99))),
        "newest updates": repr(store.updates_of(version - 3, version - 1)),
        "astray": store.astray(),
        "judgements": [store.judgements(number) for number in range(version)],
        "newest": (store.newest_judgements(), store.early_stopped_since(), store.judged_while_open()),
        "blobs": [(name, store.blob(name), store.displacement(name)) for name in blobs],
        "stretch": [store.stretch(first) for first in range(version + 1)],
        "snapshots": [(found, store.snapshot(found), store.has_whole(found)) for found in snapshots],
        "metrics": store.metrics(),
    }
