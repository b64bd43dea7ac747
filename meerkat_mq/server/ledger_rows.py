"""Updates as rows of the ledger, and back."""

import math
import struct
from typing import Any

from meerkat_mq.rounds.events import UpdateRecord, Verdict

_FLOAT = struct.Struct("<f")
Row = tuple[Any, ...]


def update_row(record: UpdateRecord) -> Row:
    """Version, slot, boot, weight, scalars, loss, verdict; SQLite makes NULL of a NaN, so that one goes as bytes."""
    scalars = struct.pack(f"<{len(record.scalars)}f", *record.scalars)
    loss = _FLOAT.pack(record.loss) if math.isnan(record.loss) else record.loss
    return record.version, record.slot, record.boot, record.weight, scalars, loss, int(record.verdict)


def update_record(row: Row) -> UpdateRecord:
    """From version, node, slot, boot, weight, scalars, loss, verdict."""
    version, node, slot, boot, weight, packed, loss, verdict = row
    scalars = struct.unpack(f"<{len(packed) // 4}f", packed)
    if isinstance(loss, bytes):
        (loss,) = _FLOAT.unpack(loss)
    return UpdateRecord(version, node, slot, boot, weight, scalars, loss, Verdict(verdict))
