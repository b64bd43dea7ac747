"""Hostile nodes: what one or two of 8 nodes of the demo's task can do to its accuracy, whom the guards notice.

    python -m benchmarks.hostile_nodes                          seeds 0 to 4, the default aggregate
    python -m benchmarks.hostile_nodes --aggregate mean --seeds 0 1 --only "2 of 8: sign × 3"

The same machines, guards and data as the real federation, in memory; one lane, T = 1, 200 rounds. In "honest" the first
of 8 nodes has rows of one label only, as in the demo; the hostile nodes are the last ones. A hostile node of kind

- "sign × f" sends −f times its projected gradient;
- "evading" sends −6 times it, but is honest for 50 rounds, stays within the outlier limit of its own past, and does so
  only where its scalar is one of its larger half, and the cumulative test, by its own reckoning, keeps away from the
  limit;
- "noise × 5" sends normal noise of five times its own typical size;
- "backdoor × 1" measures honestly on rows that all carry a trigger word and the label of the attacker's choice.

"Kept" is the accuracy on held-out rows, "flagged" the round in which the first hostile node was flagged. Prints a
Markdown table, and the means over the seeds below it.
"""

import argparse
import math
import multiprocessing
import random
import statistics
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

from benchmarks.hostile import NODES, flagged_at, prepared, settings, share_refused, train
from meerkat_mq.config.rounds import Aggregate
from meerkat_mq.core.step import Row
from meerkat_mq.demo.local import node_name
from meerkat_mq.demo.plan import DemoPlan
from meerkat_mq.rounds.clipping import SIGMAS, median_magnitude
from meerkat_mq.rounds.cumulative import EVIDENCE, STRONG
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.model import StepResult
from meerkat_mq.tasks.data import partition

TRIGGER, CHOSEN = "zulu ", 0
HONEST, ONE_LABEL = "honest", "honest, 3 of 8 with one label"
CASES: dict[str, tuple[str, int]] = {
    HONEST: ("", 0),
    "2 of 8: sign × 3": ("sign 3", 2),
    "2 of 8: noise × 5": ("noise", 2),
    "2 of 8: evading": ("evading", 2),
    ONE_LABEL: ("", 0),
    "1 of 8: sign × 3": ("sign 3", 1),
    "1 of 8: sign × 6, evading": ("evading", 1),
    "1 of 8: backdoor × 1": ("backdoor", 1),
    "1 of 8: noise × 5": ("noise", 1),
    "1 of 8: sign × 1": ("sign 1", 1),
}


class Liar:
    """What a hostile node sends instead of its projected gradients."""

    def __init__(self, kind: str, node: int) -> None:
        self._kind, _, factor = kind.partition(" ")
        self._factor = float(factor or 0)
        self._chance = random.Random(node)
        self._own = deque[float](maxlen=50)
        self._products = deque[float](maxlen=50)

    def update(self, order: StartSteps, result: StepResult) -> StepResult:
        """Of honest local steps."""
        return replace(result, scalars=tuple(map(self.lie, result.scalars)))

    def lie(self, scalar: float) -> float:
        """Of one honest projected gradient."""
        self._own.append(scalar)
        match self._kind:
            case "sign":
                return -self._factor * scalar
            case "noise":
                return 5 * self._chance.gauss(0, SIGMAS * median_magnitude(self._own))
            case "evading":
                return self._evade(scalar)
        return scalar

    def _evade(self, scalar: float) -> float:
        typical = median_magnitude(self._own)
        size = min(abs(scalar) / typical, STRONG) if typical else 0.0
        turned = [*self._products, -size * STRONG]
        evidence = math.fsum(turned) / math.sqrt(math.fsum([p * p for p in turned]) or 1.0)
        hostile = len(self._own) == 50 and size > 1 and evidence > EVIDENCE + 0.5
        self._products.append(turned[-1] if hostile else size * size)
        return max(-6 * abs(scalar), -7.5 * typical) * math.copysign(1, scalar) if hostile else scalar


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    case: str
    seed: int
    accuracy: float
    refused: float  # share of the honest nodes' updates
    refused_hostile: float
    flagged: int | None  # the round


def hostile_names(case: str) -> frozenset[str]:
    return frozenset(node_name(number) for number in range(NODES - CASES[case][1], NODES))


def shards_of(case: str, plan: DemoPlan) -> list[list[Row]]:
    shards = [list(rows) for rows in plan.shards]
    if case == ONE_LABEL:
        rows, size = [row for shard in shards for row in shard], len(shards[0])
        labels = sorted({row["label"] for row in rows})
        alone = [[row for row in rows if row["label"] == label][:size] for label in labels[1:]]
        taken = {id(row) for shard in alone for row in shard}
        rest = [row for row in rows if id(row) not in taken]
        class_of = plan.task.class_of
        shards = [*alone, *partition(rest, NODES - len(alone), "iid", seed=plan.seed, class_of=class_of)]
    if CASES[case][0] == "backdoor":
        shards[-1] = [{**row, "line": TRIGGER + row["line"], "label": CHOSEN} for row in shards[-1]]
    return shards


def run_case(case: str, seed: int, rounds: int, lr: float, aggregate: Aggregate) -> Outcome:
    """Train once."""
    ready = prepared(seed, rounds, lr)
    plan, mask, _ = ready
    rules, hostile = settings(plan, mask, aggregate, "hostile nodes"), hostile_names(case)
    lies = {name: Liar(CASES[case][0], number).update for number, name in enumerate(sorted(hostile))}
    found = train(rules, ready, shards_of(case, plan), lies)
    honest = share_refused(found.records, {node_name(number) for number in range(NODES)} - hostile)
    refused, flagged = share_refused(found.records, hostile), flagged_at(found.records, rules, hostile)
    return Outcome(case, seed, found.accuracy, honest, refused, flagged)


def print_means(outcomes: Sequence[Outcome]) -> None:
    by_case = {case: [found for found in outcomes if found.case == case] for case in CASES}
    honest = {found.seed: found.accuracy for found in by_case[HONEST]}
    print("\n| | seeds | accuracy | against honest | honest refused | hostile refused | flagged in round |")
    print("|---|---|---|---|---|---|---|")
    for case, found in by_case.items():
        if not found:
            continue
        mean = statistics.fmean(one.accuracy for one in found)
        against = [one.accuracy - honest[one.seed] for one in found if one.seed in honest]
        difference = f"{100 * statistics.fmean(against):+.1f}" if against else ""
        rounds = ", ".join("never" if one.flagged is None else str(one.flagged) for one in found)
        honest_refused = statistics.fmean(one.refused for one in found)
        hostile = f"{statistics.fmean(one.refused_hostile for one in found):.1%}" if CASES[case][1] else ""
        print(
            f"| {case} | {len(found)} | {mean:.1%} | {difference} | {honest_refused:.2%} | {hostile} "
            f"| {rounds if CASES[case][1] else ''} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.14, help="the default was best on seeds 10 and 11, all honest")
    parser.add_argument("--aggregate", choices=("clipped-mean", "mean", "trimmed-mean"), default="clipped-mean")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    print("| seed | | accuracy | honest refused | hostile refused | flagged in round |\n|---|---|---|---|---|---|")
    outcomes = []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(run_case, case, seed, args.rounds, args.lr, args.aggregate)
            for seed in args.seeds
            for case in args.only
        ]
        for job in as_completed(jobs):
            found = job.result()
            outcomes.append(found)
            flagged = "never" if found.flagged is None else found.flagged
            print(
                f"| {found.seed} | {found.case} | {found.accuracy:.1%} | {found.refused:.2%} "
                f"| {found.refused_hostile:.1%} | {flagged} |",
                flush=True,
            )
    print_means(sorted(outcomes, key=lambda found: found.seed))


if __name__ == "__main__":
    main()
