"""What a round costs the server: aggregation, theta, its digest and GradIP.

    python -m benchmarks.server_cost                      100 nodes, T = 10, 1 M weights, directions 1 and 4

Seconds of one thread a round, medians of five rounds; random projected gradients, since what they say costs nothing.
"""

import argparse
import statistics
import time

import numpy as np

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.replica import Replica
from meerkat_mq.rounds.early_stopping import judgements_of
from meerkat_mq.rounds.guards import Guard
from meerkat_mq.rounds.policy import RoundSettings, terms_of
from meerkat_mq.rounds.records import UpdateRecord

RUN = bytes(range(16))


def mask_of(size: int) -> Mask:
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    indices = np.arange(0, 1000 * size, 1000, dtype=np.uint32)
    return Mask((MaskedMatrix("weight", (1000, size), indices, values, values[::-1].copy()),), bytes(32), bytes(32))


def records_of(nodes: int, steps: int, seed: int) -> tuple[UpdateRecord, ...]:
    scalars = np.random.default_rng(seed).standard_normal((nodes, steps)).astype(np.float32)
    return tuple(
        UpdateRecord(0, f"node-{slot}", slot, 1, 1, tuple(map(float, row)), 0.5) for slot, row in enumerate(scalars)
    )


def measure(mask: Mask, nodes: int, steps: int, lanes: int, rounds: int) -> dict[str, float]:
    early = EarlyStoppingConfig(by="vpcs", calibration_steps=steps, steps=1)
    settings = RoundSettings(
        run_id=RUN, mask_hash=mask.hash, count=rounds, local_steps=steps, directions=lanes, lr=1e-6, eps=1e-3,
        min_nodes=nodes, min_updates=1, fraction=1.0, quorum=1.0, deadline_s=60, grace_s=2,
        early_stopping=early, measured=True,
    )  # fmt: skip
    replica = Replica(mask, run_id=RUN, stream="mk1", digest_every=1)
    guard, g_p = Guard(settings.guards, lanes), mask.g_p
    spent: dict[str, list[float]] = {}

    def lap(name: str, since: float) -> float:
        now = time.thread_time()
        spent.setdefault(name, []).append(now - since)
        return now

    for version in range(rounds):
        records = records_of(nodes, steps, version)
        began = now = time.thread_time()
        products = inner_products(g_p, RUN, version, lanes=lanes, steps=steps, stream="mk1")
        now = lap("GradIP: directions and inner products", now)
        judged = guard.judge(records)
        judgements = judgements_of(0, judged, products, settings)  # as if each calibrated
        guard.remember(judged)
        now = lap("guards and VPCS", now)
        terms = terms_of(judged, settings, 0)
        now = lap("coefficients", now)
        replica.apply(terms)
        lap("theta and its digest", now)
        lap("a round", began)
        assert len(judgements) == nodes
        assert len(terms) == lanes * steps
    return {name: statistics.median(values) for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--weights", type=int, default=1_000_000)
    parser.add_argument("--directions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    mask = mask_of(args.weights)
    print("| directions | " + " | ".join(measure(mask_of(1000), 4, 4, 1, 1)) + " |")
    for lanes in args.directions:
        found = measure(mask, args.nodes, args.steps, lanes, args.rounds)
        print(f"| {lanes} | " + " | ".join(f"{seconds:.3f} s" for seconds in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
