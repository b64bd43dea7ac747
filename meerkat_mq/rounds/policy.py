"""The rules of a round that need no state: who is asked, who walks which lane, what an entry says."""

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from meerkat_mq.config import GuardsConfig
from meerkat_mq.core.path import Entry, Term, coefficient
from meerkat_mq.errors import ConfigError
from meerkat_mq.rounds.events import UpdateRecord, Verdict
from meerkat_mq.wire.frames import entry_bytes

DEADLINE_CAP = 10
ANNOUNCE_AT = (0.25, 0.5, 0.75)
ROUND_ENTRY_BYTES = 1024
MAX_STEP = 2.0**127


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """What rules a run's rounds; see `config.RoundsConfig` for each."""

    run_id: bytes
    mask_hash: bytes
    count: int
    steps: int
    lanes: int
    lr: float
    eps: float
    min_nodes: int
    fraction: float
    quorum: float
    deadline_s: float
    grace_s: float
    weigh_by_rows: bool
    aggregate: Literal["mean", "trimmed-mean"] = "mean"
    trim: float = 0.2
    snapshot_every: int = 500
    digest_every: int = 1
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    def __post_init__(self) -> None:
        """Refuse, as ConfigError, more lanes than a round can have nodes."""
        fewest = share(self.fraction, self.min_nodes)
        if self.lanes > fewest:
            raise ConfigError(
                "rounds.directions",
                f"{self.lanes} lanes are more than the {fewest} nodes that a round may have",
                "lower directions, or raise min_nodes or fraction",
            )


def default_lanes(min_nodes: int, fraction: float) -> int:
    """As many lanes as leave each three nodes, which robust statistics inside a lane want; at least one."""
    return max(1, share(fraction, min_nodes) // 3)


def lane_of(slot: int, lanes: int) -> int:
    """The direction lane that the node in a slot walks."""
    return slot % lanes


def sample(run_id: bytes, version: int, slots: Iterable[int], fraction: float) -> frozenset[int]:
    """The slots that a round asks: those with the lowest SHA-256(run id ‖ "sample" ‖ u32 version ‖ u32 slot)."""

    def rank(slot: int) -> bytes:
        return hashlib.sha256(run_id + b"sample" + struct.pack("<II", version, slot)).digest()

    ranked = sorted(slots, key=rank)
    return frozenset(ranked[: share(fraction, len(ranked))])


def share(part: float, count: int) -> int:
    """`part` of `count`, rounded up, at least one; 0.55 of 100 is 55, although 0.55 · 100 > 55 in floating point."""
    return max(1, math.ceil(round(part * count, 9)))


def needed(asked: int, quorum: float) -> int:
    """How many of the nodes asked a round needs."""
    return share(quorum, asked)


def fewest_needed(settings: RoundSettings) -> int:
    """What a round of `min_nodes` nodes would need: leaves do not take a quorum below it."""
    return needed(share(settings.fraction, settings.min_nodes), settings.quorum)


def applicable(scalars: Iterable[float], lr: float) -> bool:
    """Whether every lr·g, and so any weighted mean of such, stays a finite float32."""
    return all(abs(lr * g) <= MAX_STEP for g in scalars)


def deadline_length(deadline_s: float, attempt: int) -> float:
    """Seconds from the opening of an attempt to its end: doubles, up to ten times the first."""
    return deadline_s * min(1 << attempt, DEADLINE_CAP)


def snapshot_due(version: int, settings: RoundSettings) -> bool:
    """Whether theta of this version is kept: the first with a digest of each `snapshot_every` versions."""
    every, step = settings.snapshot_every, settings.digest_every
    return version % step == 0 and version // every != (version - step) // every


def terms_of(records: Sequence[UpdateRecord], settings: RoundSettings) -> tuple[Term, ...]:
    """FedAvg of the accepted nodes' end points as directions: one term a lane and step, zero coefficients left out.

    Σ_k p_k·theta_k^T = theta_v − lr·Σ_t (Σ_k p_k g_k^t)·z_t (DESIGN section 2): p_k = n_k ÷ N with N = Σ n over the
    accepted nodes of all lanes, and a node that did fewer steps counts in N and adds nothing to the later ones.

    "mean": c = float32(lr · (fsum(n_k·g_k) / N)). "trimmed-mean": of the m accepted nodes that walked the lane's step,
    sorted by (g, slot), the first and the last ⌊trim·m⌋ are left out (trim·m rounded to nine decimals first; at least
    one node stays). With A = Σ n over the m and K = Σ n over those kept, c = float32(lr · (fsum(n_k·g_k) / (N·K/A))),
    the sum over those kept: the trimmed lane's weighted mean, with the weight that the whole lane has in the mean.
    The quotient N·K/A of integers is rounded once to float64; where nothing is left out it is N, and c as of "mean".

    Without an accepted record there are no terms.
    """
    accepted = [record for record in records if record.verdict == Verdict.ACCEPTED]
    total = sum(record.weight for record in accepted)
    trim = settings.trim if settings.aggregate == "trimmed-mean" else 0.0
    lanes: dict[int, list[UpdateRecord]] = {}
    for record in accepted:
        lanes.setdefault(lane_of(record.slot, settings.lanes), []).append(record)
    terms = []
    for lane, members in sorted(lanes.items()):
        for step in range(max(len(record.scalars) for record in members)):
            walked = [record for record in members if step < len(record.scalars)]
            kept = trimmed(walked, step, trim)
            lane_weight, kept_weight = sum(record.weight for record in walked), sum(record.weight for record in kept)
            scalars = [(record.weight, record.scalars[step]) for record in kept]
            c = coefficient(settings.lr, scalars, total * kept_weight / lane_weight)
            if c != 0.0:
                terms.append(Term(lane, step, c))
    return tuple(terms)


def trimmed(records: Sequence[UpdateRecord], step: int, trim: float) -> Sequence[UpdateRecord]:
    """The records without the ⌊trim·m⌋ smallest and as many largest projected gradients of a step; ties by slot."""
    cut = min(math.floor(round(trim * len(records), 9)), (len(records) - 1) // 2)
    if cut == 0:
        return records
    ordered = sorted(records, key=lambda record: (record.scalars[step], record.slot))
    return ordered[cut:-cut]


def newest_that_fit(entries: Sequence[Entry], limit: int = ROUND_ENTRY_BYTES) -> tuple[Entry, ...]:
    """The longest run of newest entries that encodes to at most `limit` bytes."""
    size, first = 0, len(entries)
    while first > 0 and (size := size + entry_bytes(entries[first - 1])) <= limit:
        first -= 1
    return tuple(entries[first:])
