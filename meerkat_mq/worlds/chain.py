"""The chain of a ledger in memory: links in a table, whose contents are hashes over what stands in the others."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from meerkat_mq.core.path import short_hash
from meerkat_mq.ledger.chain import BEFORE_FIRST, Chain, Link, link_after
from meerkat_mq.worlds.ledger import KeptUpdate, MemoryLedger

_FIRST: Final = Link("", 0, b"", BEFORE_FIRST)


class MemoryChain(Chain):
    """The chain of a ledger; `window` is how many versions old an update's theta may be."""

    def __init__(self, ledger: MemoryLedger, window: int) -> None:
        self._ledger = ledger
        self._window = window

    def next(self, kind: str, number: int) -> tuple[int, Link]:
        """The link, and its number, of a thing that was just written into the tables."""
        links = self._ledger.chain
        last = next(reversed(links), -1)
        return last + 1, link_after(links.get(last, _FIRST).hash, kind, number, self.content_of(kind, number))

    def still(self) -> AbstractContextManager[None]:
        return nullcontext()

    def links(self, first: int, limit: int) -> Sequence[tuple[int, Link]]:
        found = self._ledger.chain
        return [(number, found[number]) for number in sorted(found) if first <= number < first + limit]

    def content_of(self, kind: str, number: int) -> bytes:
        return short_hash(repr(list(self._rows(kind, number))).encode())

    def _rows(self, kind: str, number: int) -> Iterator[object]:
        ledger = self._ledger
        match kind:
            case "run":
                yield ledger.begun.get(number)
            case "term":
                yield ledger.terms.get(number)
            case "slot":
                node = ledger.slots.get(number, "")
                yield node, ledger.nodes[node].slot_version if node in ledger.nodes else None
            case "entry":
                yield ledger.entries.get(number)
                yield ledger.products.get(number)
                yield from self._updates(number)
                yield ledger.judgements.get(number)
            case "metrics":
                yield ledger.metrics.get(number)

    def _updates(self, entry: int) -> Iterator[KeptUpdate]:
        for base in range(entry - self._window, entry + 1):
            updates = self._ledger.updates.get(base, {})
            yield from (updates[slot] for slot in sorted(updates) if updates[slot][0] == entry)

    def unlinked(self) -> tuple[str, object] | None:
        ledger = self._ledger
        linked = {(link.kind, link.number) for link in ledger.chain.values()}
        things: dict[str, Collection[int]] = {
            "run": ledger.begun, "term": ledger.terms, "slot": ledger.slots, "entry": ledger.entries,
            "metrics": ledger.metrics,
        }  # fmt: skip
        found = ((kind, number) for kind, table in things.items() for number in table)
        return next((thing for thing in found if thing not in linked), None)
