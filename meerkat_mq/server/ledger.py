"""The ledger: what a run is. Entries are here before anybody hears of them."""

from collections.abc import Sequence
from typing import Protocol

from meerkat_mq.core.path import Entry
from meerkat_mq.rounds.events import UpdateRecord


class Ledger(Protocol):
    """Where a run's entries, updates and slots are kept. A method returns when what it was given is kept."""

    term: int

    async def commit_term(self, term: int) -> None:
        """Keep the term under which this server works."""

    async def commit_slot(self, node: str, slot: int) -> None:
        """Keep a node's slot."""

    async def commit_updates(self, records: Sequence[UpdateRecord]) -> None:
        """Keep accepted updates, as one group."""

    async def commit_entry(self, entry: Entry, records: Sequence[UpdateRecord]) -> None:
        """Keep an entry and the updates that it is made of."""

    def entries(self, first: int, limit: int) -> tuple[Entry, ...]:
        """At most `limit` entries from version `first` on."""


class MemoryLedger:
    """A ledger that ends with its process."""

    def __init__(self) -> None:
        self.term = 0
        self.slots: dict[str, int] = {}
        self.updates: list[UpdateRecord] = []
        self._entries: list[Entry] = []

    async def commit_term(self, term: int) -> None:
        """Keep the term."""
        self.term = term

    async def commit_slot(self, node: str, slot: int) -> None:
        """Keep a slot."""
        self.slots[node] = slot

    async def commit_updates(self, records: Sequence[UpdateRecord]) -> None:
        """Keep updates."""
        self.updates.extend(records)

    async def commit_entry(self, entry: Entry, records: Sequence[UpdateRecord]) -> None:
        """Keep an entry."""
        self._entries.append(entry)

    def entries(self, first: int, limit: int) -> tuple[Entry, ...]:
        """Entries from `first` on."""
        return tuple(self._entries[first : first + limit])
