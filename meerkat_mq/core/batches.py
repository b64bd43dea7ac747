"""Which rows a local step sees: a fresh permutation an epoch, so that every shard is visited whole."""

import hashlib
import struct

import numpy as np


def batch_rows(run_id: bytes, node: str, rows: int, batch_size: int, step: int) -> list[int]:
    """Row numbers of local step `step` (counted over the node's whole run).

    Epoch e is the stable argsort of raw Philox words with key SHA-256(run id ‖ node ‖ u32 e)[:8]; a step takes the next
    `batch_size` rows and goes on into the next epoch where one ends.

    Returns:
        `batch_size` row numbers, each below `rows`; rows ≥ 1.
    """
    first = step * batch_size
    epochs = range(first // rows, (first + batch_size - 1) // rows + 1)
    order = np.concatenate([_permutation(run_id, node, rows, epoch) for epoch in epochs])
    start = first - epochs[0] * rows
    return [int(row) for row in order[start : start + batch_size]]


def _permutation(run_id: bytes, node: str, rows: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    key = hashlib.sha256(run_id + node.encode() + struct.pack("<I", epoch)).digest()[:8]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(rows)
    return np.argsort(np.atleast_1d(words), kind="stable")
