"""What a ledger in memory is made of: tables, and a journal that takes back what a transaction did to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple, TypeVar

from meerkat_mq.ledger.chain import Link
from meerkat_mq.ledger.store import Closed, KeptSnapshot, NodeRow, Products, Term
from meerkat_mq.rounds.records import Judgement, UpdateRecord
from meerkat_mq.wire.descriptor import RunDescriptor

_NOTHING: Final = object()
Key = TypeVar("Key")
Value = TypeVar("Value")
KeptUpdate = tuple[int | None, UpdateRecord]  # with the entry that it closed with; None while in none


class Begun(NamedTuple):
    """A run as it was begun; `created` in seconds since 1970."""

    descriptor: RunDescriptor
    rules: Mapping[str, Any]
    created: float


@dataclass(slots=True)
class MemoryLedger:
    """The tables. Whoever tests what becomes of a damaged ledger writes into them.

    Attributes:
        begun: by 1, the run.
        terms: by number, in order.
        slots: by slot, the node.
        nodes: by name.
        entries: by version.
        products: by version of the entry.
        judgements: by version of the calibration round, by slot.
        updates: by version of their theta and slot.
        blobs: displacements, by hash.
        displaced: the entry whose displacement has this hash.
        named: how many updates and entries name a displacement, by hash.
        snapshots: by version.
        metrics: by version and name.
        chain: links, by number.
        is_full: whether its disk takes nothing just now.
        files: bytes of snapshots, by version. They are beside the ledger: a backup has none, and a restore leaves them.
    """

    begun: dict[int, Begun] = field(default_factory=dict)
    terms: dict[int, Term] = field(default_factory=dict)
    slots: dict[int, str] = field(default_factory=dict)
    nodes: dict[str, NodeRow] = field(default_factory=dict)
    entries: dict[int, Closed] = field(default_factory=dict)
    products: dict[int, Products] = field(default_factory=dict)
    judgements: dict[int, dict[int, Judgement]] = field(default_factory=dict)
    updates: dict[int, dict[int, KeptUpdate]] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    displaced: dict[bytes, int] = field(default_factory=dict)
    named: dict[bytes, int] = field(default_factory=dict)
    snapshots: dict[int, KeptSnapshot] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    chain: dict[int, Link] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)
    is_full: bool = False

    def backup(self) -> "MemoryLedger":
        """A copy of the ledger as it is, which shares nothing that changes; without snapshots' bytes."""
        made = MemoryLedger()
        made.restore(self)
        return made

    def restore(self, backup: "MemoryLedger") -> None:
        """Become what a backup holds."""
        for name in {table.name for table in fields(self)} - {"files", "is_full"}:
            table = getattr(backup, name)
            setattr(self, name, {key: dict(row) if isinstance(row, dict) else row for key, row in table.items()})


class Journal:
    """What stood in tables before they were changed."""

    def __init__(self) -> None:
        self._was: list[tuple[dict[Any, Any], Any, Any]] = []  # table, key, value

    def put(self, table: dict[Key, Value], key: Key, value: Value) -> None:
        """Write into a table."""
        self._was.append((table, key, table.get(key, _NOTHING)))
        table[key] = value

    def drop(self, table: dict[Key, Value], key: Key) -> None:
        """Remove from a table, if it is there."""
        if key in table:
            self._was.append((table, key, table.pop(key)))

    def clear(self) -> None:
        """What was done stays."""
        self._was.clear()

    def roll_back(self) -> None:
        """Put back what was there, the newest change first."""
        while self._was:
            table, key, was = self._was.pop()
            if was is _NOTHING:
                del table[key]
            else:
                table[key] = was
