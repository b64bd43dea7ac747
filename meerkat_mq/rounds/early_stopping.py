"""Meerkat-vp: which nodes' virtual paths show extremely skewed data (docs/early-stopping.md)."""

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.gradip import gradip
from meerkat_mq.rounds.policy import RoundSettings, lane_of, share
from meerkat_mq.rounds.records import NOT_REFUSED, Judgement, UpdateRecord, Verdict


class EarlyStopping:
    """Who is early-stopped: the newest judgement of each node, which the ledger keeps."""

    def __init__(self, settings: RoundSettings, judgements: Iterable[Judgement] = ()) -> None:
        self._settings = settings
        self._newest: dict[str, Judgement] = {}
        self.remember(judgements)

    def remember(self, judgements: Iterable[Judgement]) -> None:
        """A calibration round was committed with these."""
        self._newest |= {judgement.node: judgement for judgement in judgements}

    @property
    def nodes(self) -> frozenset[str]:
        """Those that are early-stopped."""
        return frozenset(node for node, judgement in self._newest.items() if judgement.early_stopped)

    def steps_of(self, version: int, node: str) -> int:
        """Local steps that round `version` asks of a node."""
        settings, judgement = self._settings, self._newest.get(node)
        stopped = judgement is not None and judgement.early_stopped and settings.early_stops
        if not stopped or settings.calibrates(version):
            return settings.steps_of(version)
        return settings.early_stopping.steps


def judgements_of(
    version: int,
    records: Sequence[UpdateRecord],
    products: Sequence[Sequence[float]],
    settings: RoundSettings,
) -> tuple[Judgement, ...]:
    """What a calibration round shows of its accepted updates, in their order; nothing of any other round.

    The records come by slot, with the guards' verdicts. As they stand after that they show the same, so the ledger's
    updates and products prove its judgements.
    """
    if not settings.calibrates(version):
        return ()
    config = settings.early_stopping
    accepted = [
        record
        for record in records
        if record.verdict in NOT_REFUSED and record.version == version and record.values is None
    ]
    drawn = _drawn(version, [record.slot for record in accepted], settings)
    found = []
    for record in accepted:
        lane = lane_of(record.slot, settings.directions)
        rhos = path_ratios(gradip(record.scalars, products[lane]), config) if products else (0.0, 0.0)
        stopped = record.slot in drawn if config.by == "random" else is_extreme(*rhos, config)
        found.append(Judgement(version, record.node, *rhos, stopped))
    return tuple(found)


def path_ratios(path: Sequence[float], config: EarlyStoppingConfig) -> tuple[float, float]:
    """(rho_later, rho_quiet) of a virtual path's GradIP, by step, MEERKAT (arXiv 2506.03337), section on VPCS.

    rho_later = mean |GradIP| of the initial part ÷ that of the later part; infinite where only the latter is 0, and 0
    where both are, since a path of zeros shows no decay.
    rho_quiet = share of the later part's steps with |GradIP| < σ, σ = `quiet` · mean |GradIP| of the initial part.
    """
    sizes = [abs(value) for value in path]
    initial, later = sizes[: share(config.initial, len(sizes))], sizes[-share(config.later, len(sizes)) :]
    first, last = math.fsum(initial) / len(initial), math.fsum(later) / len(later)
    level = config.quiet * first
    quiet = sum(size < level for size in later) / len(later)
    if last > 0:
        return first / last, quiet
    return (math.inf if first > 0 else 0.0), quiet


def is_extreme(rho_later: float, rho_quiet: float, config: EarlyStoppingConfig) -> bool:
    """Whether both conditions hold, or, where that is required, either."""
    holds = (rho_later >= config.rho_later, rho_quiet >= config.rho_quiet)
    return all(holds) if config.require == "both" else any(holds)


def with_verdicts(records: Sequence[UpdateRecord], judgements: Iterable[Judgement]) -> tuple[UpdateRecord, ...]:
    """The records, those that show a node to be early-stopped marked: only their first steps count."""
    stopped = {(judgement.version, judgement.node) for judgement in judgements if judgement.early_stopped}
    return tuple(
        replace(record, verdict=Verdict.EARLY_STOPPED) if (record.version, record.node) in stopped else record
        for record in records
    )


def _drawn(version: int, slots: Sequence[int], settings: RoundSettings) -> frozenset[int]:
    """The control's slots: those with the lowest SHA-256(run id ‖ "early" ‖ u32 version ‖ u32 slot)."""
    if settings.early_stopping.by != "random":
        return frozenset()

    def rank(slot: int) -> bytes:
        return hashlib.sha256(settings.run_id + b"early" + struct.pack("<II", version, slot)).digest()

    return frozenset(sorted(slots, key=rank)[: share(settings.early_stopping.random_share, len(slots))])
