"""Buffered against synchronous rounds: 16 nodes whose step times spread 1 : 20, the demo's task.

    python -m benchmarks.buffered                             three seeds on a virtual clock: the machines, no MQTT
    python -m benchmarks.buffered --tune                      seed 100: learning rates, buffer sizes, deadlines

The target of every policy is the accuracy at which a synchronous run with quorum = all ends; what counts is the virtual
time at which each comes there. Looks at the model cost no virtual time.
"""

import argparse
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from meerkat_mq.core.mask import Mask
from meerkat_mq.demo.plan import Choices, DemoPlan, make_plan
from meerkat_mq.demo.settings import DEMO
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.quiet import quiet

NODES = 16
FASTEST_S, SLOWEST_S = 0.1, 2.0
BATCH = 8
ROWS = 500
LANES = 4


@dataclass(frozen=True)
class Policy:
    """How versions close, and how far a run goes in virtual seconds."""

    name: str
    lr: float
    seconds: float
    quorum: float = 1.0
    deadline_s: float = 60.0
    buffer_size: int = 0
    max_staleness: int = 20
    exponent: float = 0.5


def synchronous(lr: float = 0.2, seconds: float = 240.0) -> Policy:
    return Policy("synchronous, quorum all", lr, seconds)


def with_deadline(lr: float = 0.15, deadline_s: float = 1.0, seconds: float = 240.0) -> Policy:
    return Policy(f"synchronous, quorum 0.75, deadline {deadline_s:g} s", lr, seconds, 0.75, deadline_s)


def buffered(lr: float = 0.15, size: int = 8, exponent: float = 0.5, seconds: float = 120.0) -> Policy:
    name = f"buffered, {size} updates, a = {exponent:g}"
    return Policy(name, lr, seconds, buffer_size=size, deadline_s=2.0, exponent=exponent)


@dataclass(frozen=True)
class Point:
    """The model at a virtual time."""

    seconds: float
    version: int
    accuracy: float
    loss: float


@dataclass
class Stage:
    """Model, mask and data of a seed."""

    plan: DemoPlan
    mask: Mask
    engine: TransformersEngine

    @classmethod
    def of(cls, seed: int, folder: Path) -> "Stage":
        plan = make_plan(Choices(nodes=NODES, seed=seed))
        file = folder / "demo.mkm"
        if not file.exists():
            text = plan.calibration()
            make_mask(
                load_model(plan.source),
                text,
                sequences=plan.settings.calibration_sequences,
                length=plan.settings.calibration_tokens,
            ).save(file)
        mask = Mask.load(file)
        return cls(plan, mask, TransformersEngine(load_model(plan.source), mask, plan.task))


def step_times(seed: int) -> Sequence[float]:
    """Seconds of a local step by node: evenly spread on a log scale, in another order each seed."""
    spread = np.geomspace(FASTEST_S, SLOWEST_S, NODES)
    return [float(seconds) for seconds in np.random.default_rng(seed).permutation(spread)]


def settings(policy: Policy, stage: Stage, seed: int) -> RoundSettings:
    rules = RoundSettings(
        run_id=hashlib.sha256(f"buffered {seed}".encode()).digest()[:16],
        mask_hash=stage.mask.hash, count=100_000, local_steps=1, directions=LANES, lr=policy.lr, eps=DEMO.eps,
        min_nodes=NODES, min_updates=1, fraction=1.0, quorum=policy.quorum, deadline_s=policy.deadline_s, grace_s=2,
        digest_every=100, batch_size=BATCH,
    )  # fmt: skip
    if not policy.buffer_size:
        return rules
    buffered = {"mode": "buffered", "buffer_size": policy.buffer_size, "max_staleness": policy.max_staleness}
    return rules.model_copy(update=buffered | {"staleness_exponent": policy.exponent})


@quiet()
def run(policy: Policy, stage: Stage, seed: int, every_s: float, target: float | None = None) -> list[Point]:
    """The curve of a run; it ends once the mean of three looks has reached a target."""
    times = step_times(seed)
    parts = [
        NodePart(f"node-{number}", stage.engine, rows, steps_s=times[number])
        for number, rows in enumerate(stage.plan.shards)
    ]
    federation = Federation(settings(policy, stage, seed), stage.mask, parts)
    clock, curve = federation.clock, list[Point]()
    federation.start()
    while clock.now() < policy.seconds:
        federation.run(until=clock.now() + every_s)
        stage.engine.write(federation.theta)
        found = evaluate(stage.engine, stage.plan.held_out[:ROWS], 64)
        curve.append(Point(round(clock.now(), 3), federation.version, found.accuracy, found.loss))
        if target is not None and smooth(curve)[-1] >= target:
            break
    assert not federation.errors, federation.errors
    return curve


def smooth(curve: Sequence[Point]) -> list[float]:
    """The mean accuracy of each look and the two before it: a single one is a matter of luck."""
    return [statistics.mean(p.accuracy for p in curve[max(0, end - 3) : end]) for end in range(1, len(curve) + 1)]


def reached(curve: Sequence[Point], target: float) -> float | None:
    """When the smoothed accuracy reached a target."""
    return next((p.seconds for p, mean in zip(curve, smooth(curve), strict=True) if mean >= target), None)


def show(policy: Policy, curve: Sequence[Point], target: float) -> None:
    end, at = curve[-1], reached(curve, target)
    print(
        f"{policy.name:44} lr {policy.lr:<5g} {end.version:5} versions in {end.seconds:5.0f} s, "
        f"at the end {smooth(curve)[-1]:.3f}, loss {end.loss:.3f}; target {target:.3f} at {at} s",
        flush=True,
    )


def tune(folder: Path) -> None:
    stage = Stage.of(100, folder)
    policies = [synchronous(lr, seconds=160.0) for lr in (0.1, 0.15, 0.2)]
    policies += [with_deadline(lr, seconds=80.0) for lr in (0.1, 0.15, 0.2)]
    policies += [with_deadline(deadline_s=deadline, seconds=80.0) for deadline in (0.8, 1.2)]
    policies += [buffered(lr, size, seconds=40.0) for lr in (0.1, 0.15, 0.2) for size in (4, 8)]
    for policy in policies:
        show(policy, run(policy, stage, 100, policy.seconds / 10), 0.88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=float, default=5.0, help="virtual seconds between two looks")
    parser.add_argument("--masks", type=Path, default=Path("runs/masks"))
    parser.add_argument("--out", type=Path, help="append each curve to this file of JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.masks.mkdir(parents=True, exist_ok=True)
    if args.tune:
        tune(args.masks)
        return
    for seed in range(args.seeds):
        stage = Stage.of(seed, args.masks)
        first = run(synchronous(), stage, seed, args.every)
        target = smooth(first)[-1]
        for policy in (synchronous(), with_deadline(), buffered()):
            curve = first if policy == synchronous() else run(policy, stage, seed, args.every)
            show(policy, curve, target)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps({"seed": seed, "policy": policy.name, "curve": curve}, default=vars) + "\n")


if __name__ == "__main__":
    main()
