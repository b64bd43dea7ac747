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
import hashlib
import math
import multiprocessing
import random
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch

from meerkat_mq.config.rounds import Aggregate
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.demo.local import node_name
from meerkat_mq.demo.plan import Choices, DemoPlan, make_plan
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.rounds.clipping import SIGMAS, median_magnitude
from meerkat_mq.rounds.cumulative import EVIDENCE, STRONG
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.runtime.model import Model, StepResult, Stop
from meerkat_mq.tasks.data import partition
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.node import NodeProcess
from meerkat_mq.worlds.quiet import quiet

NODES = 8
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


class HostileModel:
    """A model whose node lies."""

    def __init__(self, model: Model, liar: Liar) -> None:
        self._model, self._liar = model, liar

    def step(self, order: StartSteps, stop: Stop, made: int) -> StepResult:
        """What the hostile node sends of its local steps."""
        result = self._model.step(order, stop, made)
        assert result is not None
        return replace(result, scalars=tuple(map(self._liar.lie, result.scalars)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class HostileFederation(Federation):
    """A federation in which some nodes lie."""

    liars: dict[str, Liar]

    def make_model(self, node: NodeProcess, run: RunDescriptor) -> Model:
        """The model of a node that joins the run."""
        model = super().make_model(node, run)
        liar = self.liars.get(node.name)
        return model if liar is None else cast("Model", HostileModel(model, liar))


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


def settings(plan: DemoPlan, mask: Mask, aggregate: Aggregate) -> RoundSettings:
    rules = plan.rounds
    return RoundSettings(
        run_id=hashlib.sha256(f"hostile nodes {plan.seed}".encode()).digest()[:16],
        mask_hash=mask.hash,
        count=rules.count,
        batch_size=rules.batch_size,
        directions=1,
        lr=rules.lr,
        eps=rules.eps,
        min_nodes=NODES,
        quorum=1.0,
        aggregate=aggregate,
        max_step=50 * mask.scale,
    )


@cache
def prepared(seed: int, rounds: int, lr: float) -> tuple[DemoPlan, Mask, TransformersEngine]:
    torch.set_num_threads(1)
    plan = make_plan(Choices(nodes=NODES, rounds=rounds, directions=1, lr=lr, seed=seed))
    loaded = load_model(plan.source)
    mask = make_mask(
        loaded,
        plan.calibration(),
        density=plan.settings.density,
        seed=plan.seed,
        sequences=plan.settings.calibration_sequences,
        length=plan.settings.calibration_tokens,
    )
    return plan, mask, TransformersEngine(loaded, mask, plan.task)


@quiet()
def run_case(case: str, seed: int, rounds: int, lr: float, aggregate: Aggregate) -> Outcome:
    """Train once."""
    plan, mask, engine = prepared(seed, rounds, lr)
    rules, hostile = settings(plan, mask, aggregate), hostile_names(case)
    parts = [NodePart(node_name(number), engine, rows) for number, rows in enumerate(shards_of(case, plan))]
    federation = HostileFederation(rules, mask, parts)
    federation.liars = {name: Liar(CASES[case][0], number) for number, name in enumerate(sorted(hostile))}
    federation.start()
    federation.run(until=1e6)
    assert federation.version == rules.count, federation.errors
    engine.write(federation.theta)
    honest = share_refused(federation.records, {part.name for part in parts} - hostile)
    refused, flagged = share_refused(federation.records, hostile), flagged_at(federation.records, rules, hostile)
    return Outcome(case, seed, evaluate(engine, plan.held_out).accuracy, honest, refused, flagged)


def share_refused(records: Sequence[Sequence[UpdateRecord]], nodes: Iterable[str]) -> float:
    names = set(nodes)
    verdicts = [record.verdict for updates in records for record in updates if record.node in names]
    return sum(verdict != Verdict.ACCEPTED for verdict in verdicts) / max(1, len(verdicts))


def flagged_at(records: Sequence[Sequence[UpdateRecord]], rules: RoundSettings, hostile: frozenset[str]) -> int | None:
    guard = Guard(rules.guards, rules.directions, cumulative=rules.clips)
    for version, updates in enumerate(records):
        guard.remember(updates)
        if hostile & guard.flagged.keys():
            return version + 1
    return None


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
    parser.add_argument("--lr", type=float, default=0.05)
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
