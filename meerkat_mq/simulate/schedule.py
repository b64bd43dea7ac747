"""A fault schedule is data: the shape of a run, and what befalls it, all made from a seed."""

import json
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

from meerkat_mq.config import EarlyStoppingConfig, ServerValuesConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.rounds.policy import RoundSettings, needed, share
from meerkat_mq.simulate.release import LATER_KEYS

SERVER, ALL = "server", "all"
MAX_STEP = 1.0  # longer than any step of a node that is not hostile
WEIGHTS = 8
# Thresholds that about half of the made-up paths pass, so that there is something to get wrong.
THRESHOLDS = EarlyStoppingConfig(initial=0.5, later=0.5, rho_later=1.0, rho_quiet=0.25, quiet=0.7, random_share=0.4)


@cache
def mask() -> Mask:
    """The mask of every simulated run."""
    return toy_mask(WEIGHTS)


_RUN: dict[str, Any] = {"run_id": bytes(range(16)), "mask_hash": mask().hash, "weights": WEIGHTS}


@dataclass(frozen=True, slots=True)
class ScheduledFault:
    """One fault.

    Attributes:
        name: see `faults.FAULTS`.
        target: "server", "n0", "n1", …, "broker" or "all".
        at: virtual seconds from the start.
        lasts: virtual seconds until it heals; infinite where it never does.
        detail: how much of it; its meaning is the fault's.
    """

    name: str
    target: str
    at: float
    lasts: float
    detail: float

    @property
    def is_a_loss(self) -> bool:
        """Whether its target takes no part any more."""
        return self.lasts == math.inf and self.name in LOSSES


@dataclass(frozen=True, slots=True)
class Schedule:
    """A federation and its faults.

    Attributes:
        settings: the rules of its rounds.
        measure_s: virtual seconds that the inner products of a round's directions take.
        judge_s: virtual seconds in which a round is judged, or a displacement looked at.
        step_s: virtual seconds of a round's local steps, on the fastest node.
        commit_s: virtual seconds of one commit.
        spread: how many times as long as the fastest node the slowest takes.
        values: how many nodes send displacements.
        sleepers: how many nodes are duty-cycled.
        every_s: virtual seconds that these sleep.
        keeps: whether nodes keep updates that were not acknowledged over a restart.
        reluctant: whether the limits of the first node forbid some steps.
        slow: whether the last node's local steps take about as long as the deadline.
        fickle: whether a restarted node answers a round with other values than before.
        leftovers: whether the broker still holds what an earlier run retained.
        packet_bytes: of the largest MQTT packet that the broker takes.
        earlier: release of the first node; "": today's.
        kinds: of faults that may strike; each seed draws its own.
    """

    seed: int
    nodes: int
    settings: RoundSettings
    measure_s: float
    judge_s: float
    step_s: float
    commit_s: float
    spread: float
    values: int
    sleepers: int
    every_s: float
    keeps: bool
    reluctant: bool
    slow: bool
    fickle: bool
    leftovers: bool
    packet_bytes: int
    earlier: str
    kinds: tuple[str, ...]
    faults: tuple[ScheduledFault, ...]

    @property
    def heals_at(self) -> float:
        """When the last fault has healed, or has begun for good, virtual seconds."""
        ends = (fault.at if fault.lasts == math.inf else fault.at + fault.lasts for fault in self.faults)
        return max(ends, default=0.0)

    @property
    def lost(self) -> frozenset[str]:
        """The nodes that take no part any more from some moment on."""
        return frozenset(fault.target for fault in self.faults if fault.is_a_loss)

    @property
    def has_quorum(self) -> bool:
        """Whether rounds can close without the nodes that are lost."""
        live = self.nodes - len(self.lost)
        return live >= max(self.settings.min_nodes, needed(self.nodes, self.settings.quorum))

    def encode(self) -> str:
        """JSON, for people and for `decode`."""
        rules = self.settings.model_dump(mode="json", exclude=set(_RUN), exclude_unset=True)
        return json.dumps(
            {field.name: getattr(self, field.name) for field in fields(self)} | {"settings": rules},
            default=asdict,
            indent=1,
        )

    @classmethod
    def decode(cls, text: str) -> "Schedule":
        """What `encode` wrote."""
        found: dict[str, Any] = json.loads(text)
        settings = RoundSettings(**_RUN, **found["settings"])
        faults = tuple(ScheduledFault(**fault) for fault in found["faults"])
        return cls(**found | {"settings": settings, "faults": faults, "kinds": tuple(found["kinds"])})


# By whom they may strike, the kinds of faults; each with how often it comes.
_KINDS: dict[str, dict[str, int]] = {
    "server": {"crash": 6, "freeze": 1, "partition": 1, "restore": 1, "split brain": 2, "disk full": 1, "lost fsync": 1,
               "damaged snapshots": 1, "damaged ledger": 1},
    "node": {"crash": 4, "freeze": 2, "partition": 2, "leave": 1, "hostile": 2, "corrupt theta": 1, "disk full": 1},
    "anyone": {"lose": 2, "duplicate": 2, "delay": 2, "reorder": 2, "partition up": 1, "partition down": 1},
    "all": {"replay": 2, "stale run": 1, "corrupt messages": 2, "forged chunks": 1},
    "broker": {"broker crash": 2},
}  # fmt: skip
_ACCIDENTS = tuple(dict.fromkeys(kind for kinds in _KINDS.values() for kind in kinds))
# What a node does on purpose, over some time; drawn apart, so that the accidents of a seed stay the same.
ATTACKS = ("flood", "forged terms", "invented ids")
KINDS = (*_ACCIDENTS, *ATTACKS, "poison")
LOSSES = ("crash", "partition", "partition up", "partition down")  # which a node may suffer for good
FULL_S = 600.0  # many times as long as anybody waits for a disk, or for an answer
SMALL_PACKET = 2048  # holds the largest entry of a schedule, and not many of them
_SIZES = (3, 3, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7)


def make_schedule(seed: int, names: Collection[str] = (), *, liveness: bool = False) -> Schedule:
    """The schedule of a seed: 3 to 20 nodes, mostly few; 50 to 54 rounds; up to 12 faults.

    Their kinds are these names, or else about half of all kinds, drawn by the seed: what strikes all the time hides
    what the others do (swarm testing). With `liveness`, others begin at some moment and never heal, and the nodes that
    these leave can fill rounds.
    """
    draw = random.Random(seed)  # noqa: S311 - chance to be repeated, not to be secret
    drawn = tuple(kind for kind in _ACCIDENTS if draw.random() < 0.5) if not names else ()
    kinds = tuple(name for name in names if name in _ACCIDENTS) if names else drawn or _ACCIDENTS
    nodes = draw.choice((8, 11, 15, 20)) if draw.random() < 0.015 else draw.choice(_SIZES)
    losses = [name for name in LOSSES if name in names or not names] if liveness else []
    lost = draw.sample(range(nodes), draw.randint(0, min(2, (nodes - 1) // 2))) if losses else []
    calm = _undisturbed(draw, seed, nodes, nodes - len(lost), kinds)
    rules = calm.settings
    a_round = max(1.3 * calm.step_s, calm.measure_s) + calm.judge_s + 3 * calm.commit_s + 0.1
    if calm.slow and not rules.buffered:
        a_round = rules.deadline_s
    length_s = rules.count * a_round  # about what it takes without faults
    spared = [f"n{number}" for number in range(nodes) if number not in lost]
    faults = [_fault(draw, spared, length_s, kinds) for _ in range(draw.randint(0, 12) if kinds else 0)]
    if liveness:
        faults += _for_good(draw, spared, [(f"n{number}", draw.choice(losses)) for number in lost], length_s)
    earlier = draw.choice(("", "", "", *LATER_KEYS))
    if draw.random() < 0.5 and "max_step" not in LATER_KEYS.get(earlier, ()):
        rules = rules.model_copy(update={"max_step": MAX_STEP})
    apart = random.Random(f"attacks of {seed}")  # noqa: S311 - as above
    attacks = tuple(kind for kind in ATTACKS if kind in names or (not names and apart.random() < 0.15))
    faults += [_attack(apart, kind, spared, length_s) for kind in attacks for _ in range(apart.randint(1, 3))]
    if "poison" in names or (not names and apart.random() < 0.1):
        fault = _attack(apart, "poison", spared, length_s)
        faults.append(replace(fault, lasts=math.inf) if liveness else fault)
        attacks += ("poison",)
    rules = rules.model_copy(update={"displacement_reach": apart.choice((None, 1.0))})
    return replace(calm, settings=rules, earlier=earlier, kinds=kinds + attacks, faults=tuple(faults))


def _undisturbed(draw: random.Random, seed: int, nodes: int, live: int, kinds: tuple[str, ...]) -> Schedule:
    """A federation whose rounds so many of its nodes can fill, without faults."""
    values = draw.choice((0, 0, 0, 1, (nodes + 1) // 2))
    settings = _settings(draw, nodes, live, has_values=values > 0)
    return Schedule(
        seed=seed,
        nodes=nodes,
        settings=settings,
        step_s=draw.choice((0.05, 0.2, 0.4)),
        commit_s=draw.choice((0.0, 0.005, 0.05, 0.3)),
        measure_s=draw.choice((0.0, 0.01, 0.3, 2.5)) if settings.measured else 0.0,
        slow=draw.random() < 0.1,
        spread=draw.choice((1.0, 4.0, 20.0)) if settings.buffered else 1.0,
        values=values,
        sleepers=draw.choice((0, 0, 0, 0, 0, 1, nodes // 2)),
        every_s=draw.choice((1.0, 3.0)),
        keeps=draw.random() < 0.5,
        reluctant=draw.random() < 0.1,
        fickle=draw.random() < 0.7,
        leftovers=draw.random() < 0.2,
        packet_bytes=draw.choice((SMALL_PACKET, 2**28, 2**28)),
        earlier="",
        kinds=kinds,
        judge_s=draw.choice((0.0, 0.0, 0.01, 0.3)),
        faults=(),
    )


def _settings(draw: random.Random, nodes: int, live: int, *, has_values: bool) -> RoundSettings:
    """The rules of rounds that so many of the nodes can fill."""
    min_nodes, buffered = draw.randint(2, live), draw.random() < 0.5
    fraction = 1.0 if buffered else draw.choice((1.0, 1.0, 1.0, 0.6))
    by = draw.choice(("off", "off", "vpcs", "vpcs", "random"))
    return RoundSettings(
        **_RUN,
        lr=0.1,
        eps=2.0**-10,
        count=draw.choice((50, 50, 52, 54)),
        local_steps=draw.choice((1, 1, 3) if buffered else (1, 1, 1, 1, 3)) if by == "off" else draw.choice((2, 3)),
        directions=draw.choice((1, 1, min(2, share(fraction, min_nodes)))),
        perturbations=draw.choice((1, 1, 1, 2)),
        digest_every=draw.choice((1, 1, 2)),
        mode="buffered" if buffered else "synchronous",
        max_staleness=draw.randint(0, 5) if buffered else 0,
        min_nodes=min_nodes,
        min_updates=1,
        fraction=fraction,
        quorum=draw.choice([quorum for quorum in (0.5, 0.75, 1.0) if needed(nodes, quorum) <= live]),
        deadline_s=draw.choice((2.0, 4.0, 8.0)),
        grace_s=draw.choice((0.0, 0.5, 2.0)),
        weigh_by_rows=draw.random() < 0.3,
        aggregate=draw.choice(("mean", "mean", "clipped-mean", "trimmed-mean")),
        snapshot_every=draw.choice((6, 10, 20)),
        buffer_size=draw.randint(1, nodes),
        staleness=draw.choice(("constant", "polynomial", "polynomial")),
        early_stopping=THRESHOLDS.model_copy(
            update={"by": by, "calibration_steps": draw.choice((4, 6)), "every": draw.choice((0, 7, 20))}
        ),
        values=ServerValuesConfig(accept=has_values),
        measured=by == "vpcs" or draw.random() < 0.5,
    )


def _fault(draw: random.Random, nodes: Sequence[str], length_s: float, names: Collection[str]) -> ScheduledFault:
    drawn = [(whom, name) for whom, kinds in _KINDS.items() for name in kinds if name in names]
    whom, name = draw.choices(drawn, [_KINDS[whom][name] for whom, name in drawn])[0]
    if whom == "anyone":
        whom = draw.choice((SERVER, ALL, "node", "node"))
    target = draw.choice(nodes) if whom == "node" else whom
    at, lasts = draw.uniform(0.0, length_s), draw.choice((0.1, 0.5, 1.0, 3.0, 8.0)) * draw.uniform(0.5, 1.5)
    return ScheduledFault(name, target, round(at, 3), round(lasts, 3), round(draw.random(), 3))


def _attack(draw: random.Random, kind: str, nodes: Sequence[str], length_s: float) -> ScheduledFault:
    at, lasts = draw.uniform(0.0, length_s), draw.uniform(1.0, 12.0)
    return ScheduledFault(kind, draw.choice(nodes), round(at, 3), round(lasts, 3), round(draw.random(), 3))


def _for_good(
    draw: random.Random, spared: Sequence[str], losses: Sequence[tuple[str, str]], length_s: float
) -> list[ScheduledFault]:
    """These losses, full disks of nodes that are spared, and the server's, which waits until there is room."""
    made = [(name, node, math.inf) for node, name in losses]
    if not made or draw.random() < 0.4:
        made += [("disk full", node, math.inf) for node in draw.sample(spared, draw.randint(1, len(spared)))]
    if draw.random() < 0.1:
        made.append(("disk full", SERVER, FULL_S))
    return [
        ScheduledFault(name, target, round(draw.uniform(0.0, length_s), 3), lasts, round(draw.random(), 3))
        for name, target, lasts in made
    ]
