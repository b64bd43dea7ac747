"""Of which run and version a file of theta is: snapshots and difference files begin alike."""

import struct
from pathlib import Path

from meerkat_mq.wire import difference, snapshot

_STAMP = struct.Struct("<8s16sI")
_MAGIC = {difference.MAGIC, snapshot.MAGIC}


def stamp_of(file: Path) -> tuple[bytes, int] | None:
    """(run id, version) of a snapshot or difference file; None where it is neither, or cannot be read."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_STAMP.size)
    except OSError:
        return None
    if len(head) < _STAMP.size:
        return None
    magic, run_id, version = _STAMP.unpack(head)
    return (run_id, version) if magic in _MAGIC else None
