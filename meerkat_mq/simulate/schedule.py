"""A fault schedule is data: the shape of a run, and what befalls it, all made from a seed."""

import json
import random
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from meerkat_mq.rounds.policy import share

SERVER, ALL = "server", "all"


@dataclass(frozen=True, slots=True)
class ScheduledFault:
    """One fault.

    Attributes:
        name: see `faults.FAULTS`.
        target: "server", "n0", "n1", …, "broker" or "all".
        at: virtual seconds from the start.
        lasts: virtual seconds until it heals.
        detail: how much of it; its meaning is the fault's.
    """

    name: str
    target: str
    at: float
    lasts: float
    detail: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """A federation and its faults; see `RoundSettings` for the rules of rounds.

    Attributes:
        perturbations: projected gradients a local step.
        early_stopping: who does fewer local steps after a calibration; "off" also where that would be everybody.
        calibration_steps: local steps of a calibration.
        every: rounds from one calibration to the next; 0: the first round only.
        measure_s: virtual seconds that the inner products of a round's directions take; None: they are not measured.
        step_s: virtual seconds of a round's local steps, on the fastest node.
        commit_s: virtual seconds of one commit.
        spread: how many times as long as the fastest node the slowest takes.
        values: how many nodes send displacements.
        sleepers: how many nodes are duty-cycled.
        every_s: virtual seconds that these sleep.
        keeps: whether nodes keep updates that were not heard over a restart.
        reluctant: whether the limits of the first node forbid some steps.
        wire: whether each frame goes through its encoding.
        slow: whether the last node's local steps take about as long as the deadline.
        fickle: whether a restarted node answers a round with other values than before.
        leftovers: whether the broker still holds what an earlier run retained.
        packet_bytes: of the largest MQTT packet that the broker takes.
        kinds: of faults that may strike; each seed draws its own.
    """

    seed: int
    nodes: int
    rounds: int
    lanes: int
    steps: int
    min_nodes: int
    fraction: float
    quorum: float
    deadline_s: float
    grace_s: float
    digest_every: int
    snapshot_every: int
    weigh_by_rows: bool
    aggregate: Literal["mean", "trimmed-mean"]
    perturbations: int
    early_stopping: Literal["off", "vpcs", "random"]
    calibration_steps: int
    every: int
    measure_s: float | None
    mode: Literal["synchronous", "buffered"]
    buffer_size: int
    max_staleness: int
    staleness: Literal["constant", "polynomial"]
    spread: float
    values: int
    sleepers: int
    every_s: float
    keeps: bool
    reluctant: bool
    step_s: float
    commit_s: float
    wire: bool
    slow: bool
    fickle: bool
    leftovers: bool
    packet_bytes: int
    kinds: tuple[str, ...]
    faults: tuple[ScheduledFault, ...]

    @property
    def heals_at(self) -> float:
        """When the last fault has healed, virtual seconds."""
        return max((fault.at + fault.lasts for fault in self.faults), default=0.0)

    def encode(self) -> str:
        """JSON, for people and for `decode`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def decode(cls, text: str) -> "Schedule":
        """What `encode` wrote."""
        fields: dict[str, Any] = json.loads(text)
        faults = tuple(ScheduledFault(**fault) for fault in fields["faults"])
        return cls(**fields | {"faults": faults, "kinds": tuple(fields["kinds"])})


# Name, weight, whom it may strike.
_KINDS: tuple[tuple[str, int, str], ...] = (
    ("crash", 6, "server"),
    ("crash", 4, "node"),
    ("freeze", 1, "server"),
    ("freeze", 2, "node"),
    ("partition", 1, "server"),
    ("partition", 2, "node"),
    ("lose", 2, "anyone"),
    ("duplicate", 2, "anyone"),
    ("delay", 2, "anyone"),
    ("reorder", 2, "anyone"),
    ("broker crash", 2, "broker"),
    ("restore", 1, "server"),
    ("split brain", 2, "server"),
    ("leave", 1, "node"),
    ("replay", 2, "all"),
    ("stale run", 1, "all"),
    ("hostile", 2, "node"),
    ("corrupt theta", 1, "node"),
    ("corrupt messages", 2, "all"),
    ("disk full", 1, "server"),
    ("lost fsync", 1, "server"),
    ("damaged snapshots", 1, "server"),
    ("damaged ledger", 1, "server"),
)
SMALL_PACKET = 2048  # holds the largest entry of a schedule, and not many of them
KINDS = tuple(dict.fromkeys(name for name, _, _ in _KINDS))
_SIZES = (3, 3, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7)


def make_schedule(seed: int, names: Collection[str] = ()) -> Schedule:
    """The schedule of a seed: 3 to 20 nodes, mostly few; 50 to 60 rounds; up to 12 faults.

    Their kinds are these names, or else about half of all kinds, drawn by the seed: what strikes all the time hides
    what the others do (swarm testing).
    """
    draw = random.Random(seed)  # noqa: S311 - chance to be repeated, not to be secret
    kinds = tuple(names) or tuple(kind for kind in KINDS if draw.random() < 0.5) or KINDS
    nodes = draw.randint(8, 20) if draw.random() < 0.03 else draw.choice(_SIZES)
    rounds = draw.choice((50, 52, 54, 60))
    min_nodes = draw.randint(2, nodes)
    buffered = draw.random() < 0.5
    fraction = 1.0 if buffered else draw.choice((1.0, 1.0, 1.0, 0.6))
    spread = draw.choice((1.0, 4.0, 20.0)) if buffered else 1.0
    sleepers, every_s = draw.choice((0, 0, 0, 0, 0, 1, nodes // 2)), draw.choice((1.0, 3.0))
    step_s, commit_s = draw.choice((0.05, 0.2, 0.4)), draw.choice((0.0, 0.005, 0.05, 0.3))
    deadline_s, slow = draw.choice((2.0, 4.0, 8.0)), draw.random() < 0.1
    by: Literal["off", "vpcs", "random"] = draw.choice(("off", "off", "vpcs", "vpcs", "random"))
    measure_s = draw.choice((0.0, 0.01, 0.3, 2.5)) if by == "vpcs" or draw.random() < 0.5 else None
    a_round = deadline_s if slow and not buffered else max(1.3 * step_s, measure_s or 0.0) + 3 * commit_s + 0.1
    calm_s = rounds * a_round  # about what an undisturbed run takes
    return Schedule(
        seed=seed,
        nodes=nodes,
        rounds=rounds,
        lanes=draw.choice((1, 1, min(2, share(fraction, min_nodes)))),
        steps=draw.choice((1, 1, 3) if buffered else (1, 1, 1, 1, 3)) if by == "off" else draw.choice((2, 3)),
        min_nodes=min_nodes,
        fraction=fraction,
        quorum=draw.choice((0.5, 0.75, 1.0)),
        deadline_s=deadline_s,
        grace_s=draw.choice((0.0, 0.5, 2.0)),
        digest_every=draw.choice((1, 1, 2)),
        snapshot_every=draw.choice((6, 10, 20)),
        weigh_by_rows=draw.random() < 0.3,
        aggregate=draw.choice(("mean", "mean", "mean", "trimmed-mean")),
        perturbations=draw.choice((1, 1, 1, 2)),
        early_stopping=by,
        calibration_steps=draw.choice((4, 6)),
        every=draw.choice((0, 7, 20)),
        measure_s=measure_s,
        mode="buffered" if buffered else "synchronous",
        buffer_size=draw.randint(1, nodes),
        max_staleness=draw.randint(0, 5),
        staleness=draw.choice(("constant", "polynomial", "polynomial")),
        spread=spread,
        values=draw.choice((0, 0, 0, 1, (nodes + 1) // 2)),
        sleepers=sleepers,
        every_s=every_s,
        keeps=draw.random() < 0.5,
        reluctant=draw.random() < 0.1,
        step_s=step_s,
        commit_s=commit_s,
        wire=draw.random() < 0.05,
        slow=slow,
        fickle=draw.random() < 0.7,
        leftovers=draw.random() < 0.2,
        packet_bytes=draw.choice((SMALL_PACKET, 2**28, 2**28)),
        kinds=kinds,
        faults=tuple(_fault(draw, nodes, calm_s, kinds) for _ in range(draw.randint(0, 12))),
    )


def _fault(draw: random.Random, nodes: int, length_s: float, names: Collection[str]) -> ScheduledFault:
    kinds = [kind for kind in _KINDS if kind[0] in names]
    name, _, whom = draw.choices(kinds, [weight for _, weight, _ in kinds])[0]
    if whom == "anyone":
        whom = draw.choice((SERVER, ALL, "node", "node"))
    target = f"n{draw.randrange(nodes)}" if whom == "node" else whom
    at, lasts = draw.uniform(0.0, length_s), draw.choice((0.1, 0.5, 1.0, 3.0, 8.0)) * draw.uniform(0.5, 1.5)
    return ScheduledFault(name, target, round(at, 3), round(lasts, 3), round(draw.random(), 3))
