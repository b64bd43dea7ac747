"""The chain in SQLite: a table of links, whose contents are hashes over the rows of the other tables. `chain` says why.

The rows of a thing are read by the queries below, and written down as JSON, bytes as {"hex": ...}. So a row enters with
the very types and values that SQLite holds, and one of an older server enters as it is, damaged or not.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from meerkat_mq.core.foreign import parse_json
from meerkat_mq.core.path import short_hash
from meerkat_mq.ledger.chain import BEFORE_FIRST, Chain, Link, link_after
from meerkat_mq.ledger.sqlite_rows import from_row

_ROWS: Final = {
    "run": ("SELECT run, created, descriptor, rules FROM run WHERE id = :number",),
    "term": ("SELECT server_id, host, taken FROM terms WHERE term = :number",),
    "slot": ("SELECT node, slot_version FROM nodes WHERE slot = :number",),
    "entry": (
        "SELECT term, closed, asked, overdue, entry, products FROM entries WHERE version = :number",
        """
        SELECT version, node, updates.slot, updates.boot, weight, scalars, loss, verdict, blob, size, steps
        FROM updates LEFT JOIN nodes USING (slot) WHERE version BETWEEN :oldest AND :number AND entry = :number
        ORDER BY version, updates.slot
        """,
        """
        SELECT slot, rho_later, rho_quiet, early_stopped FROM judgements WHERE version = :number ORDER BY slot
        """,
    ),
    "metrics": ("SELECT name, value FROM metrics WHERE version = :number ORDER BY name",),
}
_THINGS: Final = {  # in the order in which a server commits them first
    "run": "SELECT id AS number FROM run",
    "term": "SELECT term AS number FROM terms",
    "slot": "SELECT slot AS number FROM nodes WHERE slot IS NOT NULL",
    "entry": "SELECT version AS number FROM entries",
    "metrics": "SELECT DISTINCT version AS number FROM metrics",
}


def add_link(connection: sqlite3.Connection, kind: str, number: int) -> None:
    """Add a link for the rows of a thing, as the caller's own transaction has just written them."""
    row = connection.execute("SELECT link, hash FROM chain ORDER BY link DESC LIMIT 1").fetchone()
    last, before = row or (-1, BEFORE_FIRST)
    link = link_after(before, kind, number, _content(connection, kind, number))
    connection.execute("INSERT INTO chain VALUES (?, ?, ?, ?, ?)", (last + 1, *link))


def add_all(connection: sqlite3.Connection) -> None:
    """Add links for all there is, in the caller's transaction: servers wrote the ledger that kept no chain."""
    for kind, query in _THINGS.items():
        for (number,) in connection.execute(f"{query} ORDER BY number").fetchall():
            add_link(connection, kind, number)


def _content(connection: sqlite3.Connection, kind: str, number: int) -> bytes:
    place = {"number": number, "oldest": number - _window(connection)}
    rows = [connection.execute(query, place).fetchall() for query in _ROWS.get(kind, ())]
    return short_hash(json.dumps(rows, default=lambda data: {"hex": data.hex()}).encode())


def _window(connection: sqlite3.Connection) -> int:
    """How many versions older an update's theta may be than its entry, as the run's descriptor has it."""
    row = connection.execute("SELECT descriptor FROM run").fetchone()
    try:
        return max(0, int(parse_json(row[0])["max_staleness"]))
    except (TypeError, KeyError, ValueError, OverflowError):  # no run yet, one of a release without it, or damaged
        return 0


class SqliteChain(Chain):
    """The chain of a ledger's file.

    Args:
        words: makes errors in words of what SQLite, and a row that no server writes, raise.
    """

    def __init__(self, connection: sqlite3.Connection, words: Callable[[], AbstractContextManager[None]]) -> None:
        self._connection = connection
        self._words = words

    @contextmanager
    def still(self) -> Iterator[None]:
        with self._words():
            self._connection.execute("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def links(self, first: int, limit: int) -> Sequence[tuple[int, Link]]:
        query = "SELECT link, kind, number, content, hash FROM chain WHERE link >= ? ORDER BY link LIMIT ?"
        with self._words():
            return [(row[0], from_row(Link, row[1:])) for row in self._connection.execute(query, (first, limit))]

    def content_of(self, kind: str, number: int) -> bytes:
        with self._words():
            return _content(self._connection, kind, number)

    def unlinked(self) -> tuple[str, object] | None:
        for kind, query in _THINGS.items():
            unlinked = f"SELECT number FROM ({query}) WHERE number NOT IN (SELECT number FROM chain WHERE kind = ?)"  # noqa: S608
            with self._words():
                row = self._connection.execute(f"{unlinked} LIMIT 1", (kind,)).fetchone()
            if row is not None:
                return kind, row[0]
        return None
