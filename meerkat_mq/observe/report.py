"""What a finished run comes to; `summary` prints it, `page` draws it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.observe.charts import Point
from meerkat_mq.observe.events import Evaluated, RoundClosed
from meerkat_mq.rounds.records import Judgement
from meerkat_mq.wire.descriptor import RunDescriptor

MASKED_VALUE_BYTES = 4
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class NodeReport:
    """One node of a run.

    Attributes:
        labels: rows of each class.
        updates: updates that reached the server.
        payload_bytes: of these updates.
        packet_bytes: of these updates, as MQTT packets.
        sent_bytes: everything that the node sent, as MQTT packets.
        received_bytes: everything that it received, as MQTT packets.
        peak_rss_mib: largest resident memory, MiB.
        digest: of its theta, hex.
    """

    labels: Sequence[int]
    updates: int
    payload_bytes: int
    packet_bytes: int
    sent_bytes: int
    received_bytes: int
    peak_rss_mib: float
    digest: str


@dataclass(frozen=True)
class Cost:
    """What the node that sent most has sent in updates, and what weights would have cost it, as often; bytes.

    Attributes:
        updates: rounds that it took part in.
        payload: of its updates.
        packets: of its updates, as MQTT packets.
        masked: the masked values in each of these rounds, float32.
        weights: all weights of the model in each of these rounds, in the run's dtype.
    """

    updates: int
    payload: int
    packets: int
    masked: int
    weights: int

    def saving(self, other: int) -> float:
        """How many times the packets go into another size."""
        return other / max(1, self.packets)


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        model: name, for people.
        parameters: d, all weights of the model.
        classes: names of the classes.
        digest: of the server's theta, hex.
        bound: held-out accuracy of first-order training on the same mask; None where it was not measured.
        seconds: from the opening of the first round to the close of the last.
        counts: everything that the server counted, by reason.
        covered: weights of the matrices that the mask covers; None where it is not known.
        magnitudes: |GradIP| over the local steps of each node; empty where it was not measured.
        judgements: the newest of each node; empty where no round calibrated.
        early_stopping: the run's rules of it.
    """

    descriptor: RunDescriptor
    model: str
    parameters: int
    classes: Sequence[str]
    rounds: Sequence[RoundClosed]
    evaluations: Sequence[Evaluated]
    nodes: Mapping[str, NodeReport]
    digest: str
    bound: float | None
    seconds: float
    counts: Mapping[str, int]
    covered: int | None = None
    magnitudes: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    judgements: Mapping[str, Judgement] = field(default_factory=dict)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)

    @property
    def gained(self) -> float | None:
        """Accuracy after minus before; None without an evaluation."""
        return self.evaluations[-1].accuracy - self.evaluations[0].accuracy if self.evaluations else None

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from before to the first-order bound; None where there is no such way."""
        if self.bound is None or self.gained is None or self.bound <= self.evaluations[0].accuracy:
            return None
        return self.gained / (self.bound - self.evaluations[0].accuracy)

    @property
    def astray(self) -> list[str]:
        """Nodes whose digest is not known to be the server's."""
        return [name for name, node in self.nodes.items() if node.digest != self.digest]

    @property
    def early_stopped(self) -> list[str]:
        """Nodes that do fewer local steps a round."""
        return [name for name, judgement in self.judgements.items() if judgement.early_stopped]

    @property
    def cost(self) -> Cost:
        """Bytes of updates against bytes of weights."""
        most = max(self.nodes.values(), key=lambda node: node.packet_bytes, default=None)
        if most is None:
            return Cost(0, 0, 0, 0, 0)
        updates = min(most.updates, len(self.rounds))
        masked = updates * self.descriptor.weights * MASKED_VALUE_BYTES
        weights = updates * self.parameters * WEIGHT_BYTES[self.descriptor.dtype]
        return Cost(updates, most.payload_bytes, most.packet_bytes, masked, weights)
