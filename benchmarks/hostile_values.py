"""Hostile values nodes: what one of 8 nodes of the demo's task can do with displacements, when the guards notice it.

    python -m benchmarks.hostile_values                          seed 0, the default aggregate
    python -m benchmarks.hostile_values --aggregate mean --only "of 3: 10 in every weight"

The same machines, guards and data as the real federation, in memory; one lane, T = 10, 20 rounds. Of the 8 nodes the
last one, two or three are values nodes (AdamW, lr 1e-2), and the last of them is hostile. It sends

- "10 in every weight";
- "× −f": −f times its displacement;
- "noise × 5": normal noise of five times its size;
- "evading": it knows the round's directions, keeps what its displacement says of them, and sends −3 times the rest.

"Against honest" compares with the run in which all of as many values nodes are honest. Prints a Markdown table.
"""

import argparse
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context

import numpy as np

from benchmarks.hostile import NODES, Lie, flagged_at, prepared, settings, share_refused, train
from meerkat_mq.config import NodeValuesConfig, ServerValuesConfig
from meerkat_mq.config.rounds import Aggregate
from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.gradip import root_mean_square
from meerkat_mq.core.path import seeds_of, short_hash
from meerkat_mq.demo.local import node_name
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.runtime.model import StepResult
from meerkat_mq.wire.messages import Values
from meerkat_mq.wire.values import decode_values, encode_values

LOCAL_STEPS = 10
HOW = NodeValuesConfig(optimiser="adamw", lr=1e-2, codec="float32")
HONEST = "honest"
CASES: dict[str, tuple[int, str]] = {  # values nodes, and what the last one sends
    **{f"of 3: {kind}": (3, kind) for kind in (HONEST, "× −3", "evading", "10 in every weight", "noise × 5", "× −1")},
    **{f"of 2: {kind}": (2, kind) for kind in (HONEST, "× −3", "evading", "10 in every weight")},
    **{f"alone: {kind}": (1, kind) for kind in (HONEST, "× −3", "evading", "10 in every weight")},
}


def sent(kind: str, honest: Float32Array, directions: Float32Array) -> Float32Array:
    """What a hostile node sends; its honest displacement is float32 (n,), the round's directions (T, n)."""
    match kind.split():
        case ["10", *_]:
            return np.full_like(honest, 10)
        case ["×", factor]:
            return np.float32(factor.replace("−", "-")) * honest
        case ["noise", *_]:
            chance = np.random.default_rng(int(abs(honest[0]) * 1e9))
            return (5 * root_mean_square(honest) * chance.standard_normal(honest.size)).astype(np.float32)
        case ["evading"]:
            basis, _ = np.linalg.qr(directions.T.astype(np.float64))
            along = basis @ (basis.T @ honest)
            return (along - 3 * (honest - along)).astype(np.float32)
    return honest


def liar(kind: str, rules: RoundSettings, weights: int) -> Lie:
    """A hostile node."""

    def lie(order: StartSteps, result: StepResult) -> StepResult:
        assert result.values is not None
        seeds = seeds_of(rules.run_id, order.version, order.lane, order.steps)
        directions = np.stack([direction(rules.stream, seed, 0, weights) for seed in seeds])
        values = sent(kind, decode_values(result.blob, result.values.blob, weights), directions)
        blob = encode_values(values, "float32")
        return replace(result, values=Values(short_hash(blob), len(blob), result.values.steps), blob=blob)

    return lie


def run_case(case: str, seed: int, rounds: int, lr: float, aggregate: Aggregate) -> tuple[str, int, float, str]:
    """Train once: (case, seed, accuracy, the other columns)."""
    ready = prepared(seed, rounds, lr, local_steps=LOCAL_STEPS)
    plan, mask, _ = ready
    rules = settings(plan, mask, aggregate, "hostile values", values=ServerValuesConfig(accept=True))
    count, kind = CASES[case]
    names = [node_name(number) for number in range(NODES)]
    lies: Mapping[str, Lie] = {} if kind == HONEST else {names[-1]: liar(kind, rules, mask.size)}
    found = train(rules, ready, plan.shards, lies, dict.fromkeys(names[-count:], HOW))
    honest = share_refused(found.records, set(names) - lies.keys())
    if not lies:
        return case, seed, found.accuracy, f"{honest:.2%} | |"
    flagged = flagged_at(found.records, rules, frozenset(lies))
    hostile = share_refused(found.records, lies)
    return case, seed, found.accuracy, f"{honest:.2%} | {hostile:.1%} | {'never' if flagged is None else flagged}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--aggregate", choices=("clipped-mean", "mean"), default="clipped-mean")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    print("| seed | | accuracy | against honest | honest refused | hostile refused | flagged in round |")
    print("|---|---|---|---|---|---|---|", flush=True)
    accuracy = dict[tuple[int, str], float]()
    wanted = sorted(args.only, key=lambda case: CASES[case][1] != HONEST)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        jobs = [
            pool.submit(run_case, case, seed, args.rounds, args.lr, args.aggregate)
            for seed in args.seeds
            for case in wanted
        ]
        for job in as_completed(jobs):
            case, seed, accuracy[seed, case], rest = job.result()
            honest = accuracy.get((seed, f"{case.split(':')[0]}: {HONEST}"))
            against = f"{100 * (accuracy[seed, case] - honest):+.1f}" if honest is not None else ""
            print(f"| {seed} | {case} | {accuracy[seed, case]:.1%} | {against} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
