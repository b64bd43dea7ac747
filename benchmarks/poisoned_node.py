"""The poisoned node: one of 8 nodes of the demo's task sends NaN, then 1e9, then its scalars times −10.

    python -m benchmarks.poisoned_node                  seeds 0 to 4, mean
    python -m benchmarks.poisoned_node --seeds 0 --aggregate trimmed-mean

The same machines, guards and data as the real federation, in memory, with one copy of the model; one
lane, T = 1. The node is honest in the first quarter of the rounds and changes at ¼, ½ and ¾. "without" is the same
seed and directions with the 7 other nodes. Rounds to flag: from a change to the round that closes with the node
flagged and at least three of its updates since the change refused, or one as working against the others. Prints a
Markdown table.
"""

import argparse
import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.hostile import NODES, prepared, train
from meerkat_mq.core.mask import Mask
from meerkat_mq.demo.local import node_name
from meerkat_mq.demo.plan import DemoPlan
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.rounds.guards import FLAGGED_AT, Guard
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.runtime.model import StepResult

POISONED = node_name(NODES - 1)
BEHAVIOURS = ("NaN", "1e9", "× −10")


def poison(scalar: float, version: int, rounds: int) -> float:
    """What the poisoned node sends instead of its projected gradient."""
    return (scalar, math.nan, 1e9, -10 * scalar)[4 * version // rounds]


@dataclass(frozen=True)
class Outcome:
    """What came of one run: the final accuracy, and the records of its rounds."""

    accuracy: float
    records: Sequence[Sequence[UpdateRecord]]
    settings: RoundSettings


def settings(plan: DemoPlan, mask: Mask, aggregate: str) -> RoundSettings:
    rules = plan.rounds.model_copy(update={"aggregate": aggregate})
    return RoundSettings(
        run_id=hashlib.sha256(f"poisoned node {plan.seed}".encode()).digest()[:16],
        mask_hash=mask.hash,
        count=rules.count,
        local_steps=rules.local_steps,
        batch_size=rules.batch_size,
        directions=1,
        lr=rules.lr,
        eps=rules.eps,
        min_nodes=NODES - 1,
        fraction=1.0,
        quorum=1.0,
        deadline_s=60,
        grace_s=2,
        min_updates=1,
        aggregate=rules.aggregate,
        trim=rules.trim,
    )


def rounds_to_flag(outcome: Outcome) -> list[int | None]:
    """For each behaviour, rounds from its start to the flag that it earned by itself; None: never."""
    count, guard = outcome.settings.count, Guard(outcome.settings.guards, 1)
    found: list[int | None] = [None] * len(BEHAVIOURS)
    refused = [0] * len(BEHAVIOURS)
    for version, records in enumerate(outcome.records):
        guard.remember(records)
        behaviour = 4 * version // count - 1
        verdict = next((record.verdict for record in records if record.node == POISONED), Verdict.ACCEPTED)
        if behaviour < 0 or verdict == Verdict.ACCEPTED:
            continue
        refused[behaviour] += 1
        earned = refused[behaviour] >= FLAGGED_AT or verdict == Verdict.AGAINST
        if earned and POISONED in guard.flagged and found[behaviour] is None:
            found[behaviour] = version + 1 - (behaviour + 1) * count // 4
    return found


def honest_refused(outcome: Outcome) -> tuple[int, int]:
    """Honest updates refused, and how many there were."""
    honest = [record for records in outcome.records for record in records if record.node != POISONED]
    return sum(record.verdict != Verdict.ACCEPTED for record in honest), len(honest)


def compare(seed: int, rounds: int, lr: float, aggregate: str) -> tuple[Outcome, Outcome]:
    """(without the node, with it)."""
    ready = prepared(seed, rounds, lr)
    plan, mask, _ = ready
    rules = settings(plan, mask, aggregate)

    def lie(order: StartSteps, result: StepResult) -> StepResult:
        return replace(result, scalars=tuple(poison(one, order.version, rules.count) for one in result.scalars))

    found = [train(rules, ready, shards, {POISONED: lie}) for shards in (plan.shards[:-1], plan.shards)]
    without, poisoned = (Outcome(one.accuracy, one.records, rules) for one in found)
    return without, poisoned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--aggregate", choices=("mean", "trimmed-mean"), default="mean")
    args = parser.parse_args()
    print(f"| seed | without | with | difference | {' | '.join(BEHAVIOURS)} | honest refused |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    differences = []
    for seed in args.seeds:
        without, poisoned = compare(seed, args.rounds, args.lr, args.aggregate)
        differences.append(100 * (poisoned.accuracy - without.accuracy))
        flags = " | ".join("never" if flag is None else str(flag) for flag in rounds_to_flag(poisoned))
        refused, updates = honest_refused(poisoned)
        print(
            f"| {seed} | {without.accuracy:.1%} | {poisoned.accuracy:.1%} | {differences[-1]:+.1f} | {flags} "
            f"| {refused} of {updates} |",
            flush=True,
        )
    print(f"| mean | | | {statistics.fmean(differences):+.1f} | | | | |")


if __name__ == "__main__":
    main()
