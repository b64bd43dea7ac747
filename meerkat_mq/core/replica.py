"""theta at a version: what a mask and the entries since make of it, on the server, on a node and in verification."""

from collections.abc import Sequence
from functools import partial

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import NO_DIGEST, Term, apply_terms, digest, digest_due, seed_for


class Replica:
    """One copy of theta.

    Attributes:
        theta: float32 (n,), mask order.
        version: number of entries applied.
    """

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

    def apply(self, terms: Sequence[Term]) -> bytes:
        """Apply the terms of entry `version`; returns the digest after it, or 16 zero bytes where none is due."""
        theta = self.theta.copy()
        apply_terms(theta, terms, partial(seed_for, self._run_id, self.version), self._stream)
        self.theta = theta
        self.version += 1
        return digest(theta) if digest_due(self.version, self._digest_every) else NO_DIGEST
