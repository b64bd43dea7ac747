"""Which rows a local step sees: a fresh permutation an epoch, so that every shard is visited whole."""

import hashlib
import struct
from collections.abc import Sequence
from typing import overload

import numpy as np

from meerkat_mq.core.step import Row


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


class Batches(Sequence[list[Row]]):
    """The rows of consecutive local steps, each looked up when it is asked for: in memory, one step's and no more.

    Args:
        run_id, node, batch_size: as of `batch_rows`.
        data: all rows of the node; at least one.
        steps: numbers of the local steps.
    """

    def __init__(self, run_id: bytes, node: str, data: Sequence[Row], batch_size: int, steps: range) -> None:
        self._run_id, self._node, self._data, self._batch_size = run_id, node, data, batch_size
        self._steps = steps

    def __len__(self) -> int:
        """How many local steps there are."""
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> list[Row]: ...

    @overload
    def __getitem__(self, index: slice) -> "Batches": ...

    def __getitem__(self, index: int | slice) -> "list[Row] | Batches":
        """The rows of a local step, or some of the steps."""
        if isinstance(index, slice):
            return Batches(self._run_id, self._node, self._data, self._batch_size, self._steps[index])
        rows = batch_rows(self._run_id, self._node, len(self._data), self._batch_size, self._steps[index])
        return [self._data[row] for row in rows]


def _permutation(run_id: bytes, node: str, rows: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    key = hashlib.sha256(run_id + node.encode() + struct.pack("<I", epoch)).digest()[:8]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(rows)
    return np.argsort(np.atleast_1d(words), kind="stable")
