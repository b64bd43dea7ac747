"""What a run comes to, running, interrupted or finished; `summary` prints it, `page` draws it.

Most of it is in the ledger. What the ledger does not hold is in `facts.json` in the state_dir, left by who knows it,
such as the demo. What is None or empty is not known, and is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.foreign import read_regular
from meerkat_mq.errors import ConfigError
from meerkat_mq.observe.charts import Point
from meerkat_mq.observe.events import Evaluated
from meerkat_mq.observe.measure import ACCURACY, Measure, measure_of
from meerkat_mq.rounds.records import Judgement
from meerkat_mq.wire.descriptor import RunDescriptor

FACTS_FILE: Final = "facts.json"
MASKED_VALUE_BYTES: Final = 4
_MOST_FACTS: Final = 64 << 20
WEIGHT_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}

Count = Annotated[int, Field(ge=0)]
Size = Annotated[FiniteFloat, Field(ge=0)]


class Standing(Enum):
    """How a run stands."""

    FINISHED = "finished"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    UNKNOWN = "not known to run"


@dataclass(frozen=True)
class NodeFacts:
    """What is known of a node beyond the ledger.

    Attributes:
        labels: rows of each class.
        payload_bytes: of its updates.
        packet_bytes: of its updates, as MQTT packets.
        sent_bytes: everything that it sent, as MQTT packets.
        received_bytes: everything that it received, as MQTT packets.
        peak_rss_mib: largest resident memory, MiB.
        digest: of its theta at the end, hex.
    """

    labels: Sequence[Count] = ()
    payload_bytes: Count | None = None
    packet_bytes: Count | None = None
    sent_bytes: Count | None = None
    received_bytes: Count | None = None
    peak_rss_mib: Size | None = None
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeReport(NodeFacts):
    """One node of a run.

    Attributes:
        updates: that reached the server.
        rows: size of its data.
        proven: the newest version of theta that it held, bit for bit, as the server saw by an update.
    """

    updates: int
    rows: int | None = None
    proven: int | None = None

    @property
    def traffic_bytes(self) -> int:
        """Both directions, as far as they are known."""
        return (self.sent_bytes or 0) + (self.received_bytes or 0)


@dataclass(frozen=True)
class Facts:
    """What is known of a run beyond the ledger.

    Attributes:
        mask: hash of the run's mask, hex: what says before its start which run they are of.
        run: its id, hex; "" before its start.
        model: name, for people.
        parameters: d, all weights of the model.
        covered: weights of the matrices that the mask covers.
        bound: what first-order training on the same mask reaches, of the run's measure, such as held-out accuracy.
        seconds: that it was worked on, about.
        counts: what happened, by reason.
    """

    mask: str = ""
    run: str = ""
    model: str = ""
    parameters: Count | None = None
    covered: Count | None = None
    bound: FiniteFloat | None = None
    seconds: Size | None = None
    counts: Mapping[str, Count] = field(default_factory=dict)
    nodes: Mapping[str, NodeFacts] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write them into a state_dir, atomically.

        Raises:
            OSError: the folder is read-only or full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FACTS_FILE, _FACTS.dump_json(self, indent=1), durable=False)


_FACTS: Final = TypeAdapter(Facts)


def facts_of(folder: Path, run: RunDescriptor) -> Facts:
    """The facts of a run; none where there is no such file, or it is of another run.

    Raises:
        ConfigError: the file cannot be used.
    """
    file = folder / FACTS_FILE
    try:
        facts = _FACTS.validate_json(read_regular(file, _MOST_FACTS))
    except FileNotFoundError:
        return Facts()
    except OSError as error:
        raise ConfigError(str(file), f"cannot be read ({error.strerror})", "make it readable, or remove it") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        remedy = "remove it: the report then says what the ledger knows"
        raise ConfigError(f"{file}: {place}", str(first["msg"]), remedy) from error
    return facts if facts.mask == run.mask and facts.run in ("", run.run) else Facts()


@dataclass(frozen=True)
class Cost:
    """The node with the most traffic, and the bytes that weights would have cost it, in the same directions.

    Attributes:
        updates: rounds that it took part in.
        masked: the masked values in each of these rounds, float32.
        weights: all weights of the model in each, in the run's dtype; None: their number is not known.
    """

    node: NodeReport
    updates: int
    masked: int
    weights: int | None

    @property
    def both(self) -> str:
        """ ", both ways", where both directions are known."""
        return "" if self.node.received_bytes is None else ", both ways"

    def saving(self, size: int) -> float:
        """How many times the traffic goes into another size."""
        return size / max(1, self.node.traffic_bytes)


@dataclass(frozen=True, kw_only=True)
class Report(Facts):
    """A run.

    Attributes:
        standing: how it stands.
        closed: number of rounds closed.
        losses: (round, mean loss over the nodes on their own batches).
        evaluations: those that a run can be judged by, by version; of old ledgers with 0 rows: how many is not known.
        at: when the report was made, in UTC.
        digest: of the server's theta at the last round with a digest, hex.
        classes: names of the classes.
        magnitudes: |GradIP| over the local steps of each node; empty where it says nothing (T = 1).
        judgements: the newest of each node; empty where no round calibrated.
        early_stopping: the run's rules of it.
        warning: what is wrong with the run, and the remedy.
    """

    descriptor: RunDescriptor
    standing: Standing
    closed: int
    losses: Sequence[Point]
    evaluations: Sequence[Evaluated]
    nodes: Mapping[str, NodeReport]
    at: str
    digest: str = ""
    classes: Sequence[str] = ()
    magnitudes: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    judgements: Mapping[str, Judgement] = field(default_factory=dict)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    warning: str = ""

    @property
    def measure(self) -> Measure:
        """The figure that it is judged by."""
        return (measure_of(self.evaluations[-1].figures) if self.evaluations else None) or ACCURACY

    @property
    def curve(self) -> list[Point]:
        """That figure, by version."""
        return [(found.version, found.figures[self.measure.key]) for found in self.evaluations]

    @property
    def gained(self) -> float | None:
        """That figure after minus before; None without an evaluation."""
        return self.curve[-1][1] - self.curve[0][1] if self.curve else None

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from before to the first-order bound; None where there is no such way."""
        if self.bound is None or self.gained is None or not self.measure.better(self.bound, self.curve[0][1]):
            return None
        return self.gained / (self.bound - self.curve[0][1])

    @property
    def ended(self) -> list[str]:
        """Nodes of which it is known with what theta they ended."""
        return [name for name, node in self.nodes.items() if node.digest and self.digest]

    @property
    def astray(self) -> list[str]:
        """Those of them whose theta is not the server's."""
        return [name for name in self.ended if self.nodes[name].digest != self.digest]

    @property
    def early_stopped(self) -> list[str]:
        """Nodes that do fewer local steps a round."""
        return [name for name, judgement in self.judgements.items() if judgement.early_stopped]

    @property
    def cost(self) -> Cost | None:
        """Bytes of the run against bytes of weights; None where no traffic is known."""
        most = max(self.nodes.values(), key=lambda node: node.traffic_bytes, default=None)
        if most is None or most.sent_bytes is None:
            return None
        updates = min(most.updates, self.closed)
        sent = updates * (1 if most.received_bytes is None else 2)
        size = WEIGHT_BYTES[self.descriptor.dtype]
        weights = None if self.parameters is None else sent * self.parameters * size
        return Cost(most, updates, sent * self.descriptor.weights * MASKED_VALUE_BYTES, weights)
