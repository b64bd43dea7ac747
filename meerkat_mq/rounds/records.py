"""What the ledger keeps of a round besides its entry: updates, the verdicts on them, judgements of nodes."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from meerkat_mq.core.path import Coefficient
from meerkat_mq.wire.frames import Values


class Verdict(IntEnum):
    """What the guards say of an update; the ledger keeps the number."""

    ACCEPTED = 0
    NOT_FINITE = 1  # a projected gradient or the loss is NaN or infinite
    TOO_LARGE = 2  # theta could leave float32
    OUTLIER = 3  # far from the lane's other nodes and from the node's own past
    AGAINST = 4  # the node has been working against the lane's others
    EARLY_STOPPED = 5  # only its first steps count: the virtual path shows extremely skewed data


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """An update as the ledger keeps it: the first of its node from theta of its version, accepted or refused.

    Attributes:
        values: the displacement of a values node, whose scalars are ().
    """

    version: int
    node: str
    slot: int
    boot: int
    weight: int
    scalars: tuple[float, ...]
    loss: float
    verdict: Verdict = Verdict.ACCEPTED
    values: Values | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a calibration round showed of a node's virtual path; the newest of a node counts (docs/early-stopping.md).

    Attributes:
        version: of the calibration round.
        rho_later: mean |GradIP| of the initial part ÷ that of the later part; infinite where only the latter is 0.
        rho_quiet: share of quiet steps in the later part.
        early_stopped: the verdict.
    """

    version: int
    node: str
    rho_later: float
    rho_quiet: float
    early_stopped: bool


@dataclass(frozen=True, slots=True)
class Share:
    """What part of an entry's mean displacement a kept displacement is."""

    blob: bytes
    weight: float


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What a closed round comes to.

    Attributes:
        records: its updates with their final verdicts, by base version and slot.
        judgements: what it showed of the nodes, where it calibrates.
        terms: of its entry.
        shares: of its entry's mean displacement.
        flagged: nodes that stand out, this round included, and the verdict that they got most.
    """

    records: tuple[UpdateRecord, ...]
    judgements: tuple[Judgement, ...]
    terms: tuple[Coefficient, ...]
    shares: tuple[Share, ...]
    flagged: Mapping[str, Verdict]
