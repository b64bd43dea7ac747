"""A ledger in memory.

`MemoryLedger` is what outlives a process: tables, like those of `ledger.sqlite`, and snapshots' bytes. `MemoryStore` is
what one process has of it: it knows the term that it took, and costs next to nothing to make. Any number of stores may
share a ledger, one transaction at a time.

A transaction writes at once and notes what was there before; where it fails, that is put back. So a commit copies
nothing, and whoever reads inside a group sees what the group wrote.

`step` is called where a power cut makes a difference: just before and just after each transaction. A snapshot's bytes
come before the transaction of its row. A simulator raises there: what was not committed has never been.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Entry, short_hash
from meerkat_mq.errors import AnotherServer, LedgerError, LedgerUnavailable
from meerkat_mq.ledger.store import (
    REFUSING_KEPT,
    SNAPSHOTS_KEPT,
    Closed,
    KeptSnapshot,
    NodeRow,
    Products,
    Sighting,
    Store,
    Term,
)
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.wire.descriptor import REFUSES, RunDescriptor
from meerkat_mq.worlds.chain import MemoryChain
from meerkat_mq.worlds.ledger import Begun, Journal, KeptUpdate, Key, MemoryLedger, Value


class MemoryStore(Store):
    """One process's hold on a ledger in memory.

    Args:
        ledger: may be shared.
        now: seconds since 1970.
        step: is called where a crash makes a difference.
    """

    def __init__(
        self,
        ledger: MemoryLedger | None = None,
        *,
        now: Callable[[], float] = time.time,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self.ledger = MemoryLedger() if ledger is None else ledger
        self._now = now
        self._step = step
        self._mine: tuple[int, str] | None = None
        self._loose = set[bytes]()  # displacements kept since the last entry
        self._journal = Journal()
        self._put, self._drop = self._journal.put, self._journal.drop
        self._in_group = False
        self._whole = dict[bytes, bytes]()  # by its hash, a snapshot that was seen whole

    # --- commits ---

    @contextmanager
    def group(self) -> Iterator[None]:
        if self._in_group:
            yield
            return
        if self.ledger.is_full:
            raise LedgerUnavailable(self.where, "no space is left on its disk")
        self._assert_in_charge()
        before, self._in_group = (self._mine, set(self._loose)), True
        try:
            yield
            self._step()
            self._journal.clear()
        except BaseException:
            self._journal.roll_back()
            self._mine, self._loose = before
            raise
        finally:
            self._in_group = False
        self._step()

    def _add(self, table: dict[Key, Value], key: Key, value: Value) -> None:
        """Put what must not be there yet."""
        if key in table:
            raise LedgerError(self.where, f"holds {key!r:.50} already", "report this line")
        self._put(table, key, value)

    def _link(self, kind: str, number: int) -> None:
        """What a group has just written goes into the chain."""
        self._put(self.ledger.chain, *self.chain.next(kind, number))

    @property
    def in_charge(self) -> bool:
        return self._mine is not None and self._newest_rank == self._mine

    @property
    def _newest_rank(self) -> tuple[int, str]:
        taken = next(reversed(self.ledger.terms.values()), None)
        return (0, "") if taken is None else (taken.term, taken.server_id)

    def _assert_in_charge(self) -> None:
        if self._mine is not None and not self.in_charge:
            problem = f"a server of term {self.term} has taken over from this one, of term {self._mine[0]}"
            raise AnotherServer(self.where, problem, "leave it in charge, or stop it and start this one again")

    def begin(self, descriptor: RunDescriptor, rules: Mapping[str, Any]) -> None:
        with self.group():
            if self.ledger.begun:
                problem = "another server has just begun a run here"
                raise AnotherServer(self.where, problem, "start this one again, with --replace to take it over")
            self._put(self.ledger.begun, 1, Begun(descriptor, rules, self._now()))
            self._link("run", 1)

    def take_term(self, above: int, server_id: str, host: str) -> int:
        with self.group():
            term = 1 + max(above, self.term)
            self._put(self.ledger.terms, term, Term(term, server_id, host, self._now()))
            self._link("term", term)
            self._forget_unnamed(list(self.ledger.blobs))
        self._mine = (term, server_id)
        return term

    def checkpoint(self) -> None:
        pass

    def commit_slot(self, node: str, slot: int, version: int) -> None:
        with self.group():
            self._add(self.ledger.slots, slot, node)
            if (row := self.ledger.nodes.get(node)) is not None and row.slot is None:
                self._drop(self.ledger.nodes, node)
            self._add(self.ledger.nodes, node, NodeRow(node, slot, version, *(None,) * 6, 0, 0))
            self._link("slot", slot)

    def commit_updates(self, records: Iterable[UpdateRecord]) -> None:
        updates = self.ledger.updates
        with self.group():
            for record in records:
                if record.version not in updates:
                    self._put(updates, record.version, {})
                self._add(updates[record.version], record.slot, (None, record))
                if record.values is not None:
                    self._name(record.values.blob, 1)

    def keep_blob(self, blob: bytes) -> bytes:
        name = short_hash(blob)
        with self.group():
            self._put(self.ledger.blobs, name, blob)
        self._loose.add(name)
        return name

    def _name(self, blob: bytes, more: int) -> None:
        self._put(self.ledger.named, blob, self.ledger.named.get(blob, 0) + more)

    def _forget_unnamed(self, blobs: Iterable[bytes]) -> None:
        for name in blobs:
            if not self.ledger.named.get(name):
                self._drop(self.ledger.blobs, name)
                self._drop(self.ledger.named, name)

    def commit_entry(
        self,
        entry: Entry,
        records: Sequence[UpdateRecord],
        asked: int,
        overdue: bool,
        *,
        products: Products = (),
        judgements: Sequence[Judgement] = (),
    ) -> None:
        ledger, version = self.ledger, entry.version
        with self.group():
            assert version == self.version
            term = self._mine[0] if self._mine else 0
            self._put(ledger.entries, version, Closed(entry, term, self._now(), asked, overdue))
            self._put(ledger.products, version, products)
            if entry.displacement is not None:
                self._put(ledger.displaced, entry.displacement.blob, version)
                self._name(entry.displacement.blob, 1)
            if judgements:
                slots = {record.node: record.slot for record in records}
                by_slot = {slots[judgement.node]: judgement for judgement in judgements}
                self._put(ledger.judgements, version, dict(sorted(by_slot.items())))
            self._close(version, records)
            self._link("entry", version)
            self._forget_too_old(version - self.window)

    def _close(self, entry: int, records: Sequence[UpdateRecord]) -> None:
        """The updates that closed with an entry, and their verdicts."""
        changed = dict[int, dict[int, KeptUpdate]]()
        for record in records:
            base, slot = record.version, record.slot
            if base not in changed:
                changed[base] = dict(self.ledger.updates.get(base, {}))
            if slot in changed[base]:
                kept = changed[base][slot][1]
                changed[base][slot] = entry, replace(kept, verdict=record.verdict, moved=record.moved)
        for base, updates in changed.items():
            self._put(self.ledger.updates, base, updates)

    def _forget_too_old(self, version: int) -> None:
        """Forget the updates in no entry from theta of this version, and displacements that nobody names now."""
        for base in (version - 1, version):  # one of the older version may have been on its way at its last entry
            updates = self.ledger.updates.get(base, {})
            for slot in [slot for slot, (entry, _) in updates.items() if entry is None]:
                values = updates[slot][1].values
                self._drop(updates, slot)
                if values is not None:
                    self._name(values.blob, -1)
                    self._loose.add(values.blob)
        if self._loose:
            self._forget_unnamed(self._loose)
            self._loose.clear()

    def commit_sightings(self, sightings: Iterable[Sighting]) -> None:
        news = list(sightings)
        with self.group():
            for seen in news:
                if seen.status.startswith(REFUSES) and seen.node not in self.ledger.nodes:
                    self._keep_refusing(seen.node)
            for seen in news:
                if (row := self.ledger.nodes.get(seen.node)) is not None:
                    known = replace(
                        row, boot=seen.boot, host=seen.host, status=seen.status, rows=seen.rows,
                        first_seen=seen.seen if row.first_seen is None else row.first_seen, last_seen=seen.seen,
                        updates=row.updates + seen.updates, packet_bytes=row.packet_bytes + seen.packet_bytes,
                    )  # fmt: skip
                    self._put(self.ledger.nodes, seen.node, known)

    def _keep_refusing(self, node: str) -> None:
        if len(self.refusing()) < REFUSING_KEPT:
            self._put(self.ledger.nodes, node, NodeRow(node, *(None,) * 8, 0, 0))

    def commit_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        with self.group():
            found = {**self.ledger.metrics.get(version, {}), **metrics}
            if found:
                self._put(self.ledger.metrics, version, dict(sorted(found.items())))
            if metrics:
                self._link("metrics", version)

    def keep_mask(self, mask: Mask) -> None:
        pass

    def close(self) -> None:
        pass

    # --- snapshots ---

    def keep_snapshot(self, version: int, blob: bytes) -> None:
        self.ledger.files[version] = blob
        with self.group():
            self._put(self.ledger.snapshots, version, KeptSnapshot(version, short_hash(blob), len(blob)))
            for old in sorted(self.ledger.snapshots)[:-SNAPSHOTS_KEPT]:
                self._drop(self.ledger.snapshots, old)
        self.sweep()

    def snapshots(self) -> tuple[KeptSnapshot, ...]:
        return tuple(self.ledger.snapshots[version] for version in sorted(self.ledger.snapshots, reverse=True))

    def snapshot(self, kept: KeptSnapshot) -> bytes | None:
        return self.ledger.files.get(kept.version)

    def has_whole(self, kept: KeptSnapshot) -> bool:
        blob = self.snapshot(kept)
        if blob is not None and self._whole.get(kept.hash) is not blob and short_hash(blob) == kept.hash:
            self._whole = {kept.hash: blob}
        return blob is not None and self._whole.get(kept.hash) is blob

    def snapshot_name(self, version: int) -> str:
        return f"snapshot-{version}"

    def sweep(self) -> None:
        for version in self.ledger.files.keys() - self.ledger.snapshots.keys():
            del self.ledger.files[version]

    # --- what there is to read ---

    @property
    def where(self) -> str:
        return "ledger in memory"

    @property
    def chain(self) -> MemoryChain:
        return MemoryChain(self.ledger, self.window)

    @property
    def run(self) -> RunDescriptor | None:
        return self.ledger.begun[1].descriptor if self.ledger.begun else None

    @property
    def rules(self) -> dict[str, Any]:
        return dict(self.ledger.begun[1].rules) if self.ledger.begun else {}

    @property
    def version(self) -> int:
        return next(reversed(self.ledger.entries), -1) + 1

    def terms(self) -> tuple[Term, ...]:
        return tuple(self.ledger.terms.values())

    def nodes(self) -> tuple[NodeRow, ...]:
        return tuple(self.ledger.nodes[self.ledger.slots[slot]] for slot in sorted(self.ledger.slots))

    def refusing(self) -> tuple[NodeRow, ...]:
        return tuple(row for _, row in sorted(self.ledger.nodes.items()) if row.slot is None)

    def closed(self, first: int, limit: int) -> tuple[Closed, ...]:
        entries = self.ledger.entries
        found = (entries[version] for version in range(max(first, 0), self.version) if version in entries)
        return tuple(islice(found, limit))

    def blob(self, name: bytes) -> bytes | None:
        return self.ledger.blobs.get(name)

    def displacement(self, name: bytes) -> bytes | None:
        return self.blob(name) if name in self.ledger.displaced else None

    def updates_of(self, first: int, last: int) -> list[tuple[int, UpdateRecord]]:
        bases = range(first - self.window, last + 1)
        found = [(entry, record) for entry, record in self._based_on(bases) if entry is not None]
        return sorted(((entry, record) for entry, record in found if first <= entry <= last), key=lambda kept: kept[0])

    def _based_on(self, versions: Iterable[int]) -> Iterator[KeptUpdate]:
        """The updates from theta of these versions, by version and slot."""
        for version in versions:
            updates = self.ledger.updates.get(version, {})
            yield from (updates[slot] for slot in sorted(updates))

    def updates(self, first: int, end: int, node: str | None = None) -> list[KeptUpdate]:
        versions = range(first, min(end, self.version + 1))
        return [kept for kept in self._based_on(versions) if node in (None, kept[1].node)]

    def astray(self) -> object | None:
        window, newest = self.window, self.version - 1
        for entry, record in self._based_on(range(self.version + 1)):
            base = record.version
            if base < newest - window if entry is None else not base <= entry <= min(base + window, newest):
                return base
        return None

    def products(self, version: int, settings: RoundSettings) -> Products | None:
        found = self.ledger.products.get(version)
        expected = [settings.scalars_of(version)] * settings.directions
        if found and [len(lane) for lane in found] != expected:
            raise LedgerError(self.where, f"holds products of {list(map(len, found))}, not {expected} directions")
        return found

    def judgements(self, version: int | None = None) -> tuple[Judgement, ...]:
        rounds = self.ledger.judgements
        versions = rounds if version is None else (version,)
        return tuple(found for number in versions for found in rounds.get(number, {}).values())

    def judged_while_open(self) -> object | None:
        return next((version for version in self.ledger.judgements if version not in self.ledger.entries), None)

    def metrics(self) -> dict[int, dict[str, float]]:
        return dict(sorted(self.ledger.metrics.items()))
