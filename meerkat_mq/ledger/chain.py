"""What a ledger keeps beside its entries, names above all, is in a chain of its own.

The entries are chained by hashes that every node knows. But an entry says nothing of who contributed to it, when, and
what was measured: nodes need none of that. So each commit of what stays also adds a *link* in its own transaction:

    content = SHA-256 over the rows that the commit wrote, first 16 bytes
    hash    = SHA-256 over the hash before, the kind, the number and the content, first 16 bytes

Links are numbered from 0 without a gap. There is one for the run, for each term, slot and entry (how its round closed,
its products, its updates with the names of their nodes, its judgements), and for each time that metrics of a version
were kept. Of links for the same metrics, the newest counts.

Verification recomputes the content of each link, and all hashes, and looks for rows that have none. So whoever alters a
row must also alter the link that is of it, and all links after it. A chain has no secret: who rewrites a whole ledger
can compute it anew. Those notice that who know the hash of the newest link, which `meerkat verify` says
(docs/decisions/0017-a-chain-of-what-is-kept.md).
"""

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol

from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import RunMismatch

ALTERED: Final = "it was altered or damaged after it was written: restore a backup"
BEFORE_FIRST: Final = bytes(16)
_PAGE: Final = 500
_WHAT: Final = {  # by kind, what its content is made of
    "run": "descriptor, rules or time",
    "term": "server, host or time",
    "slot": "the name of its node",
    "entry": "term, time, products, updates, judgements or the names of nodes",
    "metrics": "what was measured",
}


class Link(NamedTuple):
    """One of a chain: what it is of, the hash over the rows that were kept of that, and the hash of the link."""

    kind: str
    number: int  # 1 of the run; else term, slot or version
    content: bytes
    hash: bytes


class Chain(Protocol):
    """The chain of a store."""

    def still(self) -> AbstractContextManager[None]:
        """What is read inside is one state of the ledger."""

    def links(self, first: int, limit: int) -> Sequence[tuple[int, Link]]:
        """At most `limit` links, from this number on, each with its number."""

    def content_of(self, kind: str, number: int) -> bytes:
        """The hash over the rows of a thing as they are now, 16 bytes."""

    def unlinked(self) -> tuple[str, object] | None:
        """Kind and number of a thing that no link is of; None: there is no such."""


def link_after(before: bytes, kind: str, number: int, content: bytes) -> Link:
    """The link that follows one of this hash."""
    return Link(kind, number, content, short_hash(before + kind.encode() + struct.pack("<q", number) + content))


def check_chain(chain: Chain) -> bytes:
    """Recompute a chain from the rows that it is of; returns the hash of its newest link.

    Raises:
        RunMismatch: names the first thing whose rows are not those that were committed, or that has no link.
    """
    before, expected, metrics = BEFORE_FIRST, 0, dict[int, bytes]()
    with chain.still():
        while page := chain.links(expected, _PAGE):
            for number, link in page:
                if number != expected or link != link_after(before, *link[:3]):
                    raise RunMismatch(f"link {expected}", "is missing, or not of the chain", ALTERED)
                if link.kind == "metrics":  # they may be measured again
                    metrics[link.number] = link.content
                else:
                    _compare(chain, link.kind, link.number, link.content)
                before, expected = link.hash, expected + 1
        for version, content in metrics.items():
            _compare(chain, "metrics", version, content)
        if (unlinked := chain.unlinked()) is not None:
            kind, thing = unlinked
            raise RunMismatch(f"{kind} {thing!r:.50}", "was not committed by a server: no link is of it", ALTERED)
    return before


def _compare(chain: Chain, kind: str, number: int, content: bytes) -> None:
    if chain.content_of(kind, number) != content:
        problem = f"is not as it was committed: {_WHAT.get(kind, 'it')} was altered"
        raise RunMismatch(f"{kind} {number}", problem, ALTERED)
