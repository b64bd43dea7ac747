"""Displacements of values nodes: what the guards say of one, and the mean that closes with an entry."""

import math
from collections.abc import Sequence

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import root_mean_square
from meerkat_mq.core.values import mean_displacement
from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.records import Share, Verdict

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
