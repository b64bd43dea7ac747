"""Rows of the ledger: what they are in Python, and that they are what a server writes."""

import math
import struct
from typing import Any, TypeVar, get_type_hints

from meerkat_mq.rounds.events import UpdateRecord, Verdict

_FLOAT = struct.Struct("<f")
Row = tuple[Any, ...]
RowT = TypeVar("RowT")
LATEST = 1e11  # seconds since 1970, in the year 5138


def from_row(kind: type[RowT], row: Row) -> RowT:
    """A row as a dataclass with the same fields; its floats are times.

    Raises:
        TypeError: a value is not of its field's type; SQLite itself takes text for a number.
        ValueError: a time that no clock shows.
    """
    for (name, hint), value in zip(get_type_hints(kind).items(), row, strict=True):
        if not isinstance(value, hint):
            raise TypeError(f"{name} is {value!r:.50}")
        if isinstance(value, float) and not abs(value) < LATEST:
            raise ValueError(f"{name} is {value}")
    return kind(*row)


def update_row(record: UpdateRecord) -> Row:
    """Version, slot, boot, weight, scalars, loss, verdict; SQLite makes NULL of a NaN, so that one goes as bytes."""
    scalars = struct.pack(f"<{len(record.scalars)}f", *record.scalars)
    loss = _FLOAT.pack(record.loss) if math.isnan(record.loss) else record.loss
    return record.version, record.slot, record.boot, record.weight, scalars, loss, int(record.verdict)


def update_record(row: Row) -> UpdateRecord:
    """From version, node, slot, boot, weight, scalars, loss, verdict.

    Raises:
        TypeError: a value is not of its column's type, or nobody has the slot.
        ValueError: there is no such verdict.
        struct.error: scalars or loss do not have whole floats.
    """
    version, node, slot, boot, weight, packed, loss, verdict = row
    if node is None:
        raise TypeError(f"no node has slot {slot}")
    for name, value in (("slot", slot), ("boot", boot), ("weight", weight), ("verdict", verdict)):
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r:.50}")
    if not isinstance(loss, float | bytes):
        raise TypeError(f"loss is {loss!r:.50}")
    scalars = struct.unpack(f"<{len(packed) // 4}f", packed)
    if isinstance(loss, bytes):
        (loss,) = _FLOAT.unpack(loss)
    return UpdateRecord(version, node, slot, boot, weight, scalars, loss, Verdict(verdict))
