"""The toy engine: a quadratic bowl for tests and fault drills, without torch.

It has extreme nodes too: rows of one seed pull to one point, where their gradient vanishes; rows of many seeds pull
each elsewhere, and the gradient of a batch goes on oscillating.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.step import Row
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.errors import DataError
from meerkat_mq.tasks.data import no_rows
from meerkat_mq.tasks.sources import records

_REMEDY = 'give JSON lines such as {"seed": 7}'


class QuadraticEngine:
    """loss(theta; row) = ½·mean((theta − target(row))²), target(row) = direction(mk1, row["seed"])."""

    def __init__(self, size: int) -> None:
        self._theta = np.zeros(size, dtype=np.float32)

    def write(self, theta: Float32Array) -> None:
        """Keep a copy of theta."""
        self._theta = theta.astype(np.float32, copy=True)

    def prepare(self, rows: Sequence[Row]) -> Float32Array:
        """Targets, float32 (rows, n)."""
        return np.stack([direction("mk1", int(row["seed"]), 0, self._theta.size) for row in rows])

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """All of them: they were checked when they were read."""
        return list(rows)

    def losses(self, batch: Float32Array) -> Float32Array:
        """Float32 (rows,)."""
        squares: npt.NDArray[np.float64] = np.square(self._theta[None, :] - batch, dtype=np.float64)
        return np.asarray(0.5 * squares.mean(axis=1), dtype=np.float32)

    def gradient(self, batch: Float32Array) -> tuple[Float32Array, float]:
        """(theta − mean target) / n, float32 (n,), and the mean loss."""
        distance = self._theta - batch.mean(axis=0, dtype=np.float64)
        return (distance / distance.size).astype(np.float32), float(np.mean(self.losses(batch), dtype=np.float64))


def toy_mask(size: int) -> Mask:
    """A mask of `size` weights, all of one matrix "toy", that start at zero; its g_p is direction(mk1, 0)."""
    indices, theta_0 = np.arange(size, dtype=np.uint32), np.zeros(size, dtype=np.float32)
    matrix = MaskedMatrix("toy", (size,), indices, theta_0, direction("mk1", 0, 0, size))
    return Mask((matrix,), bytes(32), bytes(32))


def make(setup: Setup) -> QuadraticEngine:
    """The engine of a run."""
    return QuadraticEngine(setup.mask.size)


def read_seeds(source: Path | str) -> list[Row]:
    """Rows with a seed each, 0 to 2**64 - 1.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    try:
        rows: list[Row] = []
        for row in records(source, ("seed",), "seed"):
            if type(row.get("seed")) is not int or not 0 <= row["seed"] < 2**64:
                raise DataError(row.where, "has no integer seed from 0 to 2**64 - 1")
            rows.append(row)
    except DataError as error:
        raise DataError(error.where, error.problem, _REMEDY) from error
    if not rows:
        raise no_rows(source, _REMEDY)
    return rows
