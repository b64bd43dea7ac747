"""Displacements of values nodes: what the guards say of one, what they know of it, the mean that an entry adds."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import Float64Array, each_inner_product, root_mean_square, tree_sum
from meerkat_mq.core.values import mean_displacement
from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.clipping import FEWEST
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import Moved, Share, UpdateRecord, Verdict

FARTHEST = 1000.0  # weights of models lie within ±100, and 2³² versions that each move one so far stay in float32


def verdict_on(values: Float32Array, loss: float, reach: float = math.inf) -> Verdict:
    """What the guards say of a displacement alone, float32 (n,): NOT_FINITE, TOO_LARGE or ACCEPTED.

    Args:
        values: the displacement.
        loss: that came with it.
        reach: the largest root mean square: the run's `max_step` for each of its local steps.
    """
    farthest = float(np.abs(values).max())
    if not (math.isfinite(farthest) and math.isfinite(loss)):
        return Verdict.NOT_FINITE
    return Verdict.ACCEPTED if farthest <= FARTHEST and root_mean_square(values) <= reach else Verdict.TOO_LARGE


def mean_of(shares: Sequence[Share], ledger: Store, weights: int) -> Float32Array:
    """The mean of displacements that a ledger keeps, in the order of the shares: float32 (n,), n = `weights`.

    One of them is in memory at a time.

    Raises:
        LedgerError: one of them is missing or damaged.
    """
    return mean_displacement(((share.weight, ledger.values(share.blob, weights)) for share in shares), weights)


def measured(
    records: Sequence[UpdateRecord], load: Callable[[bytes], Float32Array], settings: RoundSettings
) -> tuple[UpdateRecord, ...]:
    """The updates that close with an entry, with what the guards know of those displacements that they compare.

    All in float64 by `tree_sum`, rounded once. One displacement is in memory at a time.

    Args:
        load: a displacement that is kept, by the hash of its blob; what it raises is raised.
    """
    blobs = [record.values.blob for record in records if settings.compares(record) and record.values is not None]
    total = (
        _total(_unit(values, root_mean_square(values)) for values in map(load, blobs)) if len(blobs) >= FEWEST else None
    )
    found = []
    for record in records:
        moved = None
        if settings.compares(record) and record.values is not None:
            values = load(record.values.blob)
            size = root_mean_square(values)
            along = tuple(_along(values, size, settings, record.version))
            agreement = 0.0 if total is None else _cosine(_unit(values, size), total)
            moved = Moved(_float32(size), _float32(agreement), along)
        found.append(record if record.moved == moved else replace(record, moved=moved))
    return tuple(found)


def _total(parts: Iterator[Float64Array]) -> Float64Array:
    total = next(parts).copy()
    for part in parts:
        np.add(total, part, out=total)
    return total


def _unit(values: Float32Array, size: float) -> Float64Array:
    """Of root mean square 1, or zero, from one of this size; float64 (n,)."""
    return np.divide(values, size if size > 0 else 1.0, dtype=np.float64)


def _along(values: Float32Array, size: float, settings: RoundSettings, version: int) -> Iterator[float]:
    (lanes, steps), run_id, stream = settings.compared(version), settings.run_id, settings.stream
    length = size * math.sqrt(values.size)
    for product in each_inner_product(values, run_id, version, lanes=lanes, steps=steps, stream=stream):
        yield _float32(-product / length) if length > 0 else 0.0


def _cosine(own: Float64Array, total: Float64Array) -> float:
    """Of a vector with what the others come to; `total` is of all."""
    others = np.subtract(total, own)
    scale = math.sqrt(tree_sum(np.square(own)) * tree_sum(np.square(others)))
    return tree_sum(np.multiply(own, others)) / scale if scale > 0 else 0.0


def _float32(value: float) -> float:
    return float(np.float32(value)) + 0.0  # a zero is +0
