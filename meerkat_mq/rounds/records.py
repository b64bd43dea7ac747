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


# those that other updates, or the path, decide; the rest shows in the update alone
JUDGED = {Verdict.ACCEPTED, Verdict.OUTLIER, Verdict.AGAINST, Verdict.EARLY_STOPPED}
NOT_REFUSED = {Verdict.ACCEPTED, Verdict.EARLY_STOPPED}


@dataclass(frozen=True, slots=True)
class Moved:
    """What the guards know of a displacement d, which they do not see; each number is exactly a float32.

    Attributes:
        size: its root mean square.
        agreement: its cosine with the sum of the entry's other displacements, each of size 1; 0 of fewer than three.
        along: −⟨d, z⟩ ÷ ‖d‖ of the first directions of its round, lane after lane: projected gradients that go with it,
            about standard normal where it has nothing to do with them.
    """

    size: float
    agreement: float
    along: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """An update as the ledger keeps it: the first of its node from theta of its version, accepted or refused."""

    version: int
    node: str
    slot: int
    boot: int
    weight: int
    scalars: tuple[float, ...]
    loss: float
    verdict: Verdict = Verdict.ACCEPTED
    values: Values | None = None  # the displacement of a values node, whose scalars are ()
    moved: Moved | None = None  # measured as the entry closes, in a run with the clipped mean; None of others


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a calibration round showed of a node's virtual path; a node's newest counts (docs/early-stopping.md)."""

    version: int  # of the calibration round
    node: str
    rho_later: float  # mean |GradIP| of the initial part ÷ that of the later part; infinite where only the latter is 0
    rho_quiet: float  # share of quiet steps in the later part
    early_stopped: bool  # the verdict


@dataclass(frozen=True, slots=True)
class Share:
    """What part of an entry's mean displacement a kept displacement is."""

    blob: bytes
    weight: float


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What a closed round comes to."""

    records: tuple[UpdateRecord, ...]  # its updates with their final verdicts, by base version and slot
    judgements: tuple[Judgement, ...]  # what it showed of the nodes, where it calibrates
    terms: tuple[Coefficient, ...]  # of its entry
    shares: tuple[Share, ...]  # of its entry's mean displacement
    flagged: Mapping[str, Verdict]  # nodes that stand out, this round included, and the verdict that they got most
