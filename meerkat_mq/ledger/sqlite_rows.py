"""Rows of `ledger.sqlite`: what they are in Python, and that they are what a server writes."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, TypeVar, get_type_hints

from meerkat_mq.core.gradip import by_lane
from meerkat_mq.ledger.store import Products
from meerkat_mq.rounds.records import Judgement, Moved, UpdateRecord, Verdict
from meerkat_mq.wire.messages import Values

_FLOAT = struct.Struct("<f")
Row = tuple[Any, ...]
RowT = TypeVar("RowT")
SIGHTING = """
    UPDATE nodes SET boot = :boot, host = :host, status = :status, rows = :rows, last_seen = :seen,
                     first_seen = COALESCE(first_seen, :seen), updates = updates + :updates,
                     packet_bytes = packet_bytes + :packet_bytes WHERE node = :node
"""
REFUSING = """
    INSERT OR IGNORE INTO nodes (node) SELECT ? WHERE (SELECT COUNT(*) FROM nodes WHERE slot IS NULL) < ?
"""
UPDATE = """
    INSERT INTO updates (version, slot, boot, weight, scalars, loss, verdict, blob, size, steps)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
CLOSED = """
    UPDATE updates SET entry = ?, verdict = ?, scalars = ? WHERE version = ? AND slot = ?
"""
UPDATES = """
    SELECT entry, version, node, updates.slot, updates.boot, weight, scalars, loss, verdict, blob, size, steps
    FROM updates LEFT JOIN nodes USING (slot)
"""
JUDGED = """
    SELECT version, node, judgements.slot, rho_later, rho_quiet, early_stopped,
           EXISTS (SELECT 1 FROM entries WHERE entries.version = judgements.version)
    FROM judgements LEFT JOIN nodes USING (slot)
"""
LATEST = 1e11  # seconds since 1970, in the year 5138
_UPDATE = {"slot": int, "boot": int, "weight": int, "verdict": int, "loss": float | bytes}
_VALUES = get_type_hints(Values)
_JUDGEMENT = {"version": int, "rho_later": float, "rho_quiet": float, "early_stopped": int}


def from_row(kind: type[RowT], row: Row) -> RowT:
    """A row as a dataclass with the same fields; its floats are times.

    Raises:
        TypeError: a value is not of its field's type; SQLite itself takes text for a number.
        ValueError: a time that no clock shows.
    """
    hints = get_type_hints(kind)
    _check(hints, row)
    for name, value in zip(hints, row, strict=True):
        if isinstance(value, float) and not abs(value) < LATEST:
            raise ValueError(f"{name} is {value}")
    return kind(*row)


def _check(types: Mapping[str, Any], row: Row) -> None:
    for (name, kind), value in zip(types.items(), row, strict=True):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.50}")


def _check_node(node: object, slot: object) -> None:
    if node is None:
        raise TypeError(f"no node has slot {slot!s:.50}")


def _numbers(record: UpdateRecord) -> bytes:
    """Projected gradients, or what a displacement was measured to be, as little-endian float32."""
    moved = record.moved
    numbers = record.scalars if moved is None else (moved.size, moved.agreement, *moved.along)
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _moved(numbers: tuple[float, ...]) -> Moved | None:
    if not numbers:
        return None
    if len(numbers) < 3 or not all(map(math.isfinite, numbers)) or numbers[0] < 0:
        raise ValueError(f"a displacement is measured as {numbers!s:.50}")
    return Moved(numbers[0], numbers[1], numbers[2:])


def update_row(record: UpdateRecord) -> Row:
    """Version, slot, boot, weight, scalars, loss, verdict, blob, size, steps; the last three NULL for a path.

    SQLite makes NULL of a NaN, so that one goes as bytes.
    """
    loss = _FLOAT.pack(record.loss) if math.isnan(record.loss) else record.loss
    values = (None, None, None) if record.values is None else astuple(record.values)
    version, numbers = record.version, _numbers(record)
    return version, record.slot, record.boot, record.weight, numbers, loss, int(record.verdict), *values


def closed_row(record: UpdateRecord) -> Row:
    """What closing an entry changes, verdict and numbers; then which update it is, version and slot."""
    return int(record.verdict), _numbers(record), record.version, record.slot


def update_record(row: Row) -> UpdateRecord:
    """From version, node, slot, boot, weight, scalars, loss, verdict, blob, size, steps.

    Raises:
        TypeError: a value is not of its column's type, or nobody has the slot.
        ValueError: there is no such verdict, or no displacement is measured so.
        struct.error: scalars or loss do not have whole floats.
    """
    version, node, slot, boot, weight, packed, loss, verdict, *described = row
    _check_node(node, slot)
    _check(_UPDATE, (slot, boot, weight, verdict, loss))
    scalars = struct.unpack(f"<{len(packed) // 4}f", packed)
    if isinstance(loss, bytes):
        (loss,) = _FLOAT.unpack(loss)
    values, moved = None, None
    if described != [None, None, None]:
        _check(_VALUES, tuple(described))
        values = Values(*described)
        scalars, moved = (), _moved(scalars)
    return UpdateRecord(version, node, slot, boot, weight, scalars, loss, Verdict(verdict), values, moved)


def pack_products(products: Sequence[Sequence[float]]) -> bytes:
    """⟨g_p, z⟩ by lane and step, as little-endian float32; empty where there are none."""
    return b"".join(struct.pack(f"<{len(lane)}f", *lane) for lane in products)


def unpack_products(packed: bytes, lanes: int, steps: int) -> Products:
    """What was packed, of `steps` directions a lane.

    Raises:
        TypeError: it is not bytes.
        ValueError: it has another size, and is not empty either.
    """
    if not isinstance(packed, bytes):
        raise TypeError(f"{packed!r:.50}")
    if not packed:
        return ()
    size = 4 * lanes * steps
    if len(packed) != size:
        raise ValueError(f"{len(packed)} bytes; {lanes} × {steps} directions have {size}")
    return by_lane(struct.unpack(f"<{lanes * steps}f", packed), lanes)


def judgement(row: Row) -> Judgement:
    """From version, node, slot, rho_later, rho_quiet, early_stopped, and whether the round closed.

    Raises:
        TypeError: a value is not of its column's type, or nobody has the slot.
        ValueError: early_stopped is neither 0 nor 1, or the round did not close.
    """
    version, node, slot, rho_later, rho_quiet, early_stopped, closed = row
    _check_node(node, slot)
    _check(_JUDGEMENT, (version, rho_later, rho_quiet, early_stopped))
    if early_stopped not in (0, 1):
        raise ValueError(f"early_stopped is {early_stopped}")
    if not closed:
        raise ValueError(f"round {version} did not close")
    return Judgement(version, node, rho_later, rho_quiet, bool(early_stopped))
