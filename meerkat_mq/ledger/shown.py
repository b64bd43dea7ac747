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
    """A node as the ledger knows it."""

    node: str
    slot: int | None
    host: str
    status: str  # its last word: "starting", "online", "asleep", "stopped" or "lost"
    seen_s: float | None  # seconds since it was last heard of; None also where the clock was set since
    boot: int | None
    rows: int  # size of its data
    updates: int  # update messages that came from it, repeated ones and chunks of displacements too
    packet_bytes: int  # all MQTT packets that came from it
    behind: int | None  # rounds closed since that from whose theta its last update is; None if that is long ago
    verdict: str  # on its last update among the recent ones
    flagged: str  # why it stands out, or ""
    gradip: float | None  # mean |GradIP| of its recent accepted steps; None if there are none
    judged: int | None  # the newest calibration round that judged its virtual path; None: none did
    rho_later: float | None  # what that round found; None: none did
    rho_quiet: float | None  # likewise
    early_stopped_since: int | None  # the calibration round from which on every one early-stopped it; None: it is not
    displacement: int = 0  # bytes of the displacement that its last update is; 0: it is a path, or there is none
    shortened: bool = False  # whether less than half of that displacement counted


@dataclass(frozen=True, slots=True)
class RunShown:
    """A run as its ledger stands."""

    federation: str
    run: str
    running: bool | None  # whether a server works on it now; None where that cannot be known (docs/ledger.md)
    term: int
    server_id: str
    host: str  # of the server that took the newest term
    round: int  # the open one, so the number of those closed; `rounds` once the run is finished
    rounds: int  # of the whole run
    accuracy: float | None  # of the newest evaluation; None if there is none
    held_out_loss: float | None  # likewise
    evaluated: int | None  # theta's version, so the number of rounds closed, at that evaluation
    base_accuracy: float | None  # of the evaluation before the first round
    heard: int  # committed updates that are in no round yet
    closed_s: float | None  # seconds since the last round closed; None also where the clock was set since
    round_s: float | None  # seconds a round, the median of the recent ones
    loss: float | None  # mean over the accepted updates of the last round
    early_stopping: str  # what it does, in words; "" where it is off
    nodes: tuple[NodeShown, ...]
    mode: str = ""  # how a buffered run closes its rounds, in words; "" of a synchronous one
    staleness: float | None = None  # mean age of the updates of the recent rounds, in versions; None if there are none
    warning: str = ""  # what is wrong with the run, and the remedy; "" if nothing is
    counts: Mapping[str, int] = field(default_factory=dict)  # what was counted in the recent rounds, by metric
    figures: Mapping[str, float] = field(default_factory=dict)  # all those of the newest evaluation (docs/tasks.md)
    base_figures: Mapping[str, float] = field(default_factory=dict)  # and of the one before the first round

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
    """What a node gave to a round; `seeds` (16 hex digits) and `scalars` are one a local step."""

    round: int  # from whose theta it is; of a buffered run, an earlier one than it closed with
    node: str
    slot: int
    lane: int
    boot: int
    weight: int
    seeds: tuple[str, ...]
    scalars: tuple[float, ...]
    loss: float
    verdict: str
    entry: int | None = None  # the round that it closed with; None: none yet
    displacement: str = ""  # its hash, hex, of a values node's update, which has no seeds and scalars; "" of a path
    size: int = 0  # bytes of the displacement

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
    """A closed round."""

    round: int
    term: int
    closed: str  # time in UTC, ISO 8601, as in the log
    asked: int  # number of nodes asked
    overdue: bool  # whether the deadline closed it
    loss: float | None  # mean over the accepted updates; None if there is none
    digest: str  # hex; "" where none is due
    previous: str  # hex
    hash: str  # hex
    terms: tuple[TermShown, ...]
    updates: tuple[UpdateShown, ...]  # refused ones too, by base version and slot
    displacement: str = ""  # hash of what values nodes add, hex; "" if there are none
    size: int = 0  # bytes of it
    buffer: int = 0  # how many updates close it; 0 of a round that waits for its nodes

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
