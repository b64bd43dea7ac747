"""What a server tells whoever watches a run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meerkat_mq.mqtt.message import MessageCount
from meerkat_mq.rounds.records import Judgement
from meerkat_mq.tasks.task import Evaluation
from meerkat_mq.wire.descriptor import RunDescriptor


@dataclass(frozen=True)
class RunStarted:
    """The first round can be asked as soon as nodes are there."""

    descriptor: RunDescriptor


@dataclass(frozen=True)
class RoundClosed:
    """A round was committed.

    Attributes:
        round: its number, which is that of its ledger entry; the first is round 0.
        seconds: since the run's first round opened.
        loss: mean over the nodes that contributed, of the loss on their own batches.
        heard: nodes that contributed.
        online: nodes at hand.
        bytes_up: payload bytes of all updates so far.
        gradip: of each of these nodes, by local step; empty where the run does not measure it.
        judgements: what a calibration round showed of the nodes.
    """

    round: int
    seconds: float
    loss: float
    heard: int
    online: int
    bytes_up: int
    gradip: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    judgements: tuple[Judgement, ...] = ()

    @property
    def version(self) -> int:
        """theta's version from here on, so the number of rounds closed."""
        return self.round + 1


@dataclass(frozen=True, kw_only=True)
class Evaluated(Evaluation):
    """theta was evaluated on held-out data.

    Attributes:
        version: theta's version, so the number of rounds closed before.
        seconds: since the run's first round opened; 0 before; NaN: not known.
    """

    version: int
    seconds: float = math.nan


@dataclass(frozen=True)
class RunFinished:
    """All rounds are closed, and the nodes at hand had time to say where they stand.

    Attributes:
        digest: of the server's theta, hex.
        updates: of each node, the updates that came: number, payload and packet bytes.
        counts: everything counted, by reason.
    """

    version: int
    seconds: float
    digest: str
    updates: Mapping[str, MessageCount]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Warned:
    """Something is wrong with the run: `text` says what, and the remedy."""

    text: str


RunEvent = RunStarted | RoundClosed | Evaluated | Warned | RunFinished
Observer = Callable[[RunEvent], None]
