"""The path of theta: seeds, coefficients, the update itself, ledger entries and digests (specification, section 2).

Everything here enters the ledger, so it uses no reduction, no BLAS and no torch: the bits must be the same everywhere.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.errors import BadValue, NotFinite

HASH_BYTES = 16
NO_DIGEST = bytes(HASH_BYTES)
MAX_WEIGHT = 2**24  # of a node
ROUNDED_UP = 2.0**-20  # by so much, or less, a coefficient at the bound is over it as a float32
LARGEST_PRODUCT = 2**32  # of a node's weight and a staleness weight in 256ths


def short_hash(data: bytes | memoryview) -> bytes:
    """First 16 bytes of SHA-256."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def seed_for(run_id: bytes, version: int, lane: int, step: int) -> int:
    """Seed of a local step: first 8 bytes, little-endian, of SHA-256(run id ‖ u32 version ‖ u32 lane ‖ u32 step)."""
    message = run_id + struct.pack("<III", version, lane, step)
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")


def seeds_of(run_id: bytes, version: int, lane: int, count: int) -> tuple[int, ...]:
    """Seeds of the first `count` directions of a lane."""
    return tuple(seed_for(run_id, version, lane, step) for step in range(count))


def coefficient(lr: float, scalars: Iterable[tuple[int, float]], total_weight: float) -> float:
    """The factor of one direction: float32(lr · (fsum(n_k · g_k) / total_weight)), computed in float64.

    A product of a float32 and an integer weight up to 2**24 is exact, one with a larger weight is rounded once, and so
    is the sum (`math.fsum`): the order of arrival does not matter.

    Args:
        scalars: (n_k, g_k) of the nodes that made this step; 1 ≤ n_k ≤ 2**32, g_k a float32.
        total_weight: of a mean, Σ n_k over all accepted nodes of the round, those of other lanes and with fewer steps
            included; of a trimmed mean, that reduced as the lane's weight is (`rounds.policy.terms_of`); ≥ 1.

    Returns:
        A float that is exactly a float32; a zero is +0.

    Raises:
        BadValue: a weight out of range, a g_k or a result that is not finite.
    """
    weighted = list(scalars)
    products = [weight * scalar for weight, scalar in weighted]
    if not all(map(math.isfinite, products)) or not all(1 <= weight <= LARGEST_PRODUCT for weight, _ in weighted):
        _refuse(weighted)
    if total_weight < 1:
        raise BadValue("total weight", f"{total_weight} is below 1")
    with np.errstate(over="ignore"):
        value = float(np.float32(lr * (math.fsum(products) / total_weight)))
    if not math.isfinite(value):
        raise BadValue("coefficient", f"{value} is not finite", "lower the learning rate")
    return value + 0.0  # −0 would be another entry hash for the same theta


def _refuse(weighted: Iterable[tuple[int, float]]) -> None:
    for weight, scalar in weighted:
        if not 1 <= weight <= LARGEST_PRODUCT:
            raise BadValue("weight", f"{weight} is outside 1…2**32")
        if not math.isfinite(scalar):
            raise BadValue("projected gradient", f"{scalar} is not finite")


def apply(theta: Float32Array, z: Float32Array, c: float, scratch: Float32Array) -> None:
    """theta -= c·z in place: the one update that node, server and verification share; float32 (n,) each.

    Raises:
        NotFinite: theta is not finite after it.
    """
    try:
        with np.errstate(over="raise", invalid="raise"):
            np.multiply(z, np.float32(c), out=scratch)
            np.subtract(theta, scratch, out=theta)
    except FloatingPointError as error:
        raise _not_finite(f"a step of coefficient {c:.9g}") from error


def displace(theta: Float32Array, displacement: Float32Array) -> None:
    """theta += displacement in place; float32 (n,) each.

    Raises:
        NotFinite: theta is not finite after it.
    """
    try:
        with np.errstate(over="raise", invalid="raise"):
            np.add(theta, displacement, out=theta)
    except FloatingPointError as error:
        raise _not_finite("a displacement") from error


def _not_finite(what: str) -> NotFinite:
    return NotFinite("theta", f"is not finite after {what}", "lower the learning rate, and begin a new run")


def digest(theta: Float32Array) -> bytes:
    """First 16 bytes of SHA-256 over theta's little-endian float32 bytes."""
    return short_hash(np.ascontiguousarray(theta, dtype="<f4").data.cast("B"))


def virtual_path(
    theta: Float32Array, scalars: Sequence[float], seeds: Sequence[int], *, perturbations: int, stream: str, lr: float
) -> Iterator[Float32Array]:
    """A node's theta after each local step of a round, rebuilt from what it sent.

    Args:
        theta: float32 (n,), theta of the round; unchanged.
        scalars: its T·K projected gradients.
        seeds: of its lane, as many.
        perturbations: K, projected gradients a local step.

    Returns:
        One array, float32 (n,), changed from step to step.

    Raises:
        BadValue: a projected gradient is not finite, or its coefficient is not a float32.
        NotFinite: the path leads out of float32.
    """
    walker, scratch = theta.copy(), np.empty_like(theta)
    for index, (scalar, seed) in enumerate(zip(scalars, seeds, strict=True)):
        z = direction(stream, seed, 0, theta.size)
        apply(walker, z, coefficient(lr / perturbations, [(1, scalar)], 1), scratch)
        if (index + 1) % perturbations == 0:
            yield walker


@dataclass(frozen=True, slots=True)
class Coefficient:
    """One direction of an entry: theta -= coefficient · direction(seed of (version − age, lane, step))."""

    lane: int
    step: int
    coefficient: float
    age: int = 0  # by how many versions the update was stale, τ; 0 in a synchronous run


@dataclass(frozen=True, slots=True)
class Displacement:
    """What values nodes add to an entry: theta += what the blob decodes to, after the terms."""

    blob: bytes  # hash of the encoded mean displacement, 16 bytes
    size: int  # bytes of the blob


@dataclass(frozen=True)
class Entry:
    """What turns theta_v into theta_(v+1), v = `version`.

    `previous` is the hash of the entry before it (of entry 0: the mask hash); `digest` is that of theta_(v+1),
    or 16 zero bytes where the run's `digest_every` skips it.
    """

    version: int
    terms: tuple[Coefficient, ...]
    previous: bytes
    digest: bytes
    displacement: Displacement | None = None

    @cached_property
    def aged(self) -> bool:
        """Whether the age of each term is written down: one of them is not 0."""
        return any(term.age for term in self.terms)

    @cached_property
    def body(self) -> bytes:
        """Terms, displacement, previous and digest, as they are hashed and sent."""
        added = self.displacement
        displaced = added.blob + struct.pack("<I", added.size) if added is not None else b""
        return pack_terms(self.terms, self.aged) + displaced + self.previous + self.digest

    def hash(self, run_id: bytes) -> bytes:
        """SHA-256(run id ‖ u32 version ‖ u32 number of terms and flags ‖ terms ‖ displacement ‖ previous ‖ digest).

        The first 16 bytes. Flags: bit 31 where terms have ages, bit 30 where there is a displacement
        (protocol/SPECIFICATION.md, section 2.5).
        """
        flags = self.aged << 31 | (self.displacement is not None) << 30
        return short_hash(run_id + struct.pack("<II", self.version, len(self.terms) | flags) + self.body)


def check_steps(entry: Entry, max_step: float) -> None:
    """Refuse an entry with a longer step than the run's bound.

    Raises:
        BadValue: names the coefficient.
    """
    for term in entry.terms:
        if abs(term.coefficient) > max_step * (1 + ROUNDED_UP):
            problem = f"{term.coefficient:.9g} in entry {entry.version} is over the run's max_step, {max_step:.9g}"
            raise BadValue("coefficient", problem)


def pack_terms(terms: Iterable[Coefficient], aged: bool) -> bytes:
    """u16 lane, u16 step, f32 coefficient each; with ages, a u16 age before each."""
    if aged:
        return b"".join([struct.pack("<HHHf", term.age, term.lane, term.step, term.coefficient) for term in terms])
    return b"".join([struct.pack("<HHf", term.lane, term.step, term.coefficient) for term in terms])


def digest_due(version: int, digest_every: int) -> bool:
    """Whether theta_version's digest is computed; theta_0's always is."""
    return version % digest_every == 0


def apply_terms(
    theta: Float32Array,
    terms: Iterable[Coefficient],
    seed: Callable[[Coefficient], int],
    stream: str,
    scratch: Float32Array | None = None,
) -> None:
    """Apply terms in order to theta in place; `seed(term)` names each direction; calls may share a scratch.

    Raises:
        NotFinite: theta is not finite after one of them.
    """
    scratch = np.empty_like(theta) if scratch is None else scratch
    for term in terms:
        apply(theta, direction(stream, seed(term), 0, theta.size), term.coefficient, scratch)
