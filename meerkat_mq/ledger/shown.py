"""A ledger as people and programs read it: the run and its nodes, rounds, one node's path; as JSON.

`round` is a round's number everywhere, that of its ledger entry; the first is round 0 (docs/concepts.md, "Numbers").
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Final

_YEAR_1: Final = -62_135_596_800.0  # where datetime begins; a damaged ledger may say less


@dataclass(frozen=True, slots=True)
class NodeShown:
    """A node as the ledger knows it.

    Attributes:
        status: its last word: "starting", "online", "asleep", "stopped" or "lost".
        seen_s: seconds since it was last heard of; None also where the clock was set since.
        rows: size of its data.
        updates: update messages that came from it, repeated ones and chunks of displacements too.
        packet_bytes: all MQTT packets that came from it.
        behind: rounds closed since that from whose theta its last update is; None if it is none of the recent ones.
        verdict: on its last update among the recent ones.
        flagged: why it stands out, or "".
        gradip: mean |GradIP| of its recent accepted steps; None if there are none.
        judged: the newest calibration round that judged its virtual path; None: none did.
        rho_later, rho_quiet: what that round found; None: none did.
        early_stopped_since: the calibration round from which on every one early-stopped it; None: it is not.
        displacement: bytes of the displacement that its last update is; 0: it is a path, or there is none.
    """

    node: str
    slot: int | None
    host: str
    status: str
    seen_s: float | None
    boot: int | None
    rows: int
    updates: int
    packet_bytes: int
    behind: int | None
    verdict: str
    flagged: str
    gradip: float | None
    judged: int | None
    rho_later: float | None
    rho_quiet: float | None
    early_stopped_since: int | None
    displacement: int = 0


@dataclass(frozen=True, slots=True)
class RunShown:
    """A run as its ledger stands.

    Attributes:
        running: whether a server works on it now; None where that cannot be known (docs/ledger.md).
        host: of the server that took the newest term.
        round: the open one, so the number of those closed; `rounds` once the run is finished.
        rounds: of the whole run.
        accuracy, held_out_loss: of the newest evaluation; None if there is none.
        evaluated: theta's version, so the number of rounds closed, at that evaluation.
        base_accuracy: of the evaluation before the first round.
        heard: committed updates that are in no round yet.
        closed_s: seconds since the last round closed; None also where the clock was set since.
        round_s: seconds a round, the median of the recent ones.
        loss: mean over the accepted updates of the last round.
        warning: what is wrong with the run, and the remedy; "" if nothing is.
        early_stopping: what it does, in words; "" where it is off.
        mode: how a buffered run closes its rounds, in words; "" of a synchronous one.
        staleness: mean age of the updates of the recent rounds, in versions; None if there are none.
        counts: what was counted in the recent rounds, by metric.
    """

    federation: str
    run: str
    running: bool | None
    term: int
    server_id: str
    host: str
    round: int
    rounds: int
    accuracy: float | None
    held_out_loss: float | None
    evaluated: int | None
    base_accuracy: float | None
    heard: int
    closed_s: float | None
    round_s: float | None
    loss: float | None
    early_stopping: str
    nodes: tuple[NodeShown, ...]
    mode: str = ""
    staleness: float | None = None
    warning: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether all its rounds are closed."""
        return self.round >= self.rounds

    @property
    def asleep(self) -> int:
        """How many nodes will come back by themselves."""
        return sum(node.status == "asleep" for node in self.nodes)


@dataclass(frozen=True, slots=True)
class UpdateShown:
    """What a node gave to a round; `seeds` (16 hex digits) and `scalars` are one a local step.

    Attributes:
        round: from whose theta it is; of a buffered run, an earlier one than it closed with.
        entry: the round that it closed with; None: none yet.
        displacement: its hash, hex, of a values node's update, which has no seeds and scalars; "" of a path.
        size: bytes of the displacement.
    """

    round: int
    node: str
    slot: int
    lane: int
    boot: int
    weight: int
    seeds: tuple[str, ...]
    scalars: tuple[float, ...]
    loss: float
    verdict: str
    entry: int | None = None
    displacement: str = ""
    size: int = 0

    @property
    def age(self) -> int:
        """By how many versions its theta was stale; 0 while it is in no round."""
        return 0 if self.entry is None else self.entry - self.round


@dataclass(frozen=True, slots=True)
class StepShown:
    """A projected gradient of a node's virtual path, with GradIP = g·⟨g_p, z⟩; None where that is not measured."""

    round: int
    node: str
    lane: int
    step: int
    seed: str
    g: float
    gradip: float | None


@dataclass(frozen=True, slots=True)
class RebuiltShown(StepShown):
    """The same, with ‖theta_k^t − theta_v‖ after its local step."""

    distance: float


@dataclass(frozen=True, slots=True)
class TermShown:
    """A direction of an entry; `age` of the updates that walked it, in versions."""

    lane: int
    step: int
    seed: str
    coefficient: float
    age: int = 0


@dataclass(frozen=True, slots=True)
class RoundShown:
    """A closed round.

    Attributes:
        closed: time in UTC, ISO 8601, as in the log.
        asked: number of nodes asked.
        overdue: whether the deadline closed it.
        buffer: how many updates close it; 0 of a round that waits for its nodes.
        loss: mean over the accepted updates; None if there is none.
        digest, previous, hash: hex; no digest where none is due.
        updates: refused ones too, by base version and slot.
        displacement: hash of what values nodes add, hex; "" if there are none.
        size: bytes of it.
    """

    round: int
    term: int
    closed: str
    asked: int
    overdue: bool
    loss: float | None
    digest: str
    previous: str
    hash: str
    terms: tuple[TermShown, ...]
    updates: tuple[UpdateShown, ...]
    displacement: str = ""
    size: int = 0
    buffer: int = 0

    @property
    def full(self) -> bool:
        """Whether its buffer closed it, and nodes that it asked were not heard."""
        heard = len({update.node for update in self.updates})
        return not self.overdue and 0 < self.buffer <= len(self.updates) and heard < self.asked

    @property
    def ages(self) -> tuple[int, int]:
        """Of the newest and the oldest update; 0 where there are none."""
        ages = [update.age for update in self.updates]
        return min(ages, default=0), max(ages, default=0)

    @property
    def accepted(self) -> int:
        """How many updates the entry is made of."""
        return sum(update.verdict in ("accepted", "early stopped") for update in self.updates)


def utc(at: float) -> str:
    """Seconds since 1970 as logs, tables and JSON write a time: "2026-11-28T19:20:08.123456Z"."""
    return datetime.fromtimestamp(max(at, _YEAR_1), UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def json_line(shown: RunShown | RoundShown | UpdateShown | StepShown) -> str:
    """One JSON object; numbers that are not finite become null."""
    return json.dumps(_finite(asdict(shown)), allow_nan=False)


def _finite(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value
