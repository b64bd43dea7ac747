"""theta at a version: what a mask and the entries since make of it, on the server, on a node and in verification."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import NO_DIGEST, Coefficient, apply_terms, digest, digest_due, displace, seed_for

Change = tuple[Sequence[Coefficient], Float32Array | None]


class Replica:
    """One copy of theta, float32 (n,) in mask order, and its version, the number of entries applied."""

    def __init__(self, mask: Mask, *, run_id: bytes, stream: str, digest_every: int) -> None:
        self._mask = mask
        self._run_id = run_id
        self._stream = stream
        self._digest_every = digest_every
        self.theta = mask.theta_0
        self.version = 0

    def reset(self) -> None:
        """Back to theta_0."""
        self.theta = self._mask.theta_0
        self.version = 0

    def load(self, theta: Float32Array, version: int) -> None:
        """Stand at `version` with this theta, of a snapshot."""
        self.theta = theta
        self.version = version

    def apply(self, terms: Sequence[Coefficient], displacement: Float32Array | None = None) -> bytes:
        """Apply entry `version`: its terms, then what its displacement decodes to, float32 (n,).

        Returns the digest after it, or 16 zero bytes where none is due.

        Raises:
            RunError: theta is not finite after it; nothing is applied.
        """
        (after,) = self.replay([(terms, displacement)])
        return after

    def replay(self, changes: Iterable[Change]) -> tuple[bytes, ...]:
        """Apply entry `version` and those after it, all or none; returns and raises what `apply` does, for each.

        Who holds an earlier theta keeps it: all work is on one copy.
        """
        theta, version, digests = self.theta.copy(), self.version, list[bytes]()
        scratch = np.empty_like(theta)
        for terms, displacement in changes:
            apply_terms(theta, terms, partial(self._seed, version), self._stream, scratch)
            if displacement is not None:
                displace(theta, displacement)
            version += 1
            digests.append(digest(theta) if digest_due(version, self._digest_every) else NO_DIGEST)
        self.theta, self.version = theta, version
        return tuple(digests)

    def _seed(self, version: int, term: Coefficient) -> int:
        return seed_for(self._run_id, version - term.age, term.lane, term.step)
