"""The GradIP phenomenon, and how often VPCS flags exactly the right nodes.

    python -m benchmarks.gradip --model minilm --lr 1e-3 --seeds 20 --out paths.jsonl      one calibration round a seed
    python -m benchmarks.gradip --report paths.jsonl --rho-later 2 --rho-quiet 0.3         what VPCS makes of them
    python -m benchmarks.gradip --choose tuning.jsonl                                      thresholds, on other seeds
    python -m benchmarks.gradip --draw paths.jsonl --seed 1 > docs/gradip.svg              the curves of one seed

A seed is one federation of ten nodes in memory: 0 to 7 hold IID shards, 8 and 9 one label each. The
machines run its calibration round (100 local steps, one lane) as they would over MQTT. A node is judged by its own path
alone, so every seed stands for two federations of eight: nodes 0 to 5 with 8 and 9 (two extreme), and 0 to 7 (IID).
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.minilm_agnews import SHARED, agnews_task, mask_file, minilm
from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.gradip import gradip
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.demo.corpus import triage_rows
from meerkat_mq.demo.plan import Choices, make_plan
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.rounds.early_stopping import is_extreme, path_ratios
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.records import NOT_REFUSED
from meerkat_mq.tasks.data import partition, read_rows
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.quiet import quiet

IID, EXTREME = range(8), range(8, 10)
SHARD = 300


class Stage(NamedTuple):
    """A model, its mask and rows to draw shards from, which differ by seed."""

    engine: TransformersEngine
    mask: Mask
    eps: float


class Path100(NamedTuple):
    """A node's calibration: GradIP by step."""

    seed: int
    node: int
    path: tuple[float, ...]


def stage(model: str, masks: Path, tokens: int) -> Stage:
    if model == "demo":
        plan = make_plan(Choices(nodes=8, seed=0))
        file = masks / "demo.mkm"
        if not file.exists():
            text = plan.calibration()
            make_mask(
                load_model(plan.source),
                text,
                sequences=plan.settings.calibration_sequences,
                length=plan.settings.calibration_tokens,
            ).save(file)
        mask = Mask.load(file)
        return Stage(TransformersEngine(load_model(plan.source), mask, plan.task), mask, plan.rounds.eps)
    task = agnews_task().model_copy(update={"max_tokens": tokens})
    mask = Mask.load(mask_file(masks, minilm(), "sensitivity", 1e-3, 0))
    return Stage(TransformersEngine(load_model(minilm()), mask, task), mask, 1e-3)


def rows_of(model: str, seed: int) -> Sequence[Row]:
    if model == "demo":
        return triage_rows(seed, 10 * SHARD, "train")
    rows = read_rows(SHARED / "data/agnews/train.jsonl", agnews_task())
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]


def shards_of(rows: Sequence[Row], seed: int) -> list[Sequence[Row]]:
    labels = np.random.default_rng(seed).permutation(sorted({row["label"] for row in rows}))[: len(EXTREME)]
    single = [[row for row in rows if row["label"] == label][:SHARD] for label in labels]
    taken = {id(row) for shard in single for row in shard}
    rest = [row for row in rows if id(row) not in taken]
    return [*partition(rest[: len(IID) * SHARD], len(IID), "iid", seed=seed), *single]


@quiet()
def calibrate(found: Stage, shards: Sequence[Sequence[Row]], seed: int, args: argparse.Namespace) -> list[Path100]:
    """Run the calibration round; the path of each node."""
    rules = RoundSettings(
        run_id=hashlib.sha256(f"gradip {seed}".encode()).digest()[:16],
        mask_hash=found.mask.hash, count=1, local_steps=10, directions=1, lr=args.lr, eps=found.eps,
        batch_size=args.batch,
        min_nodes=len(shards), min_updates=1, fraction=1.0, quorum=1.0, deadline_s=60, grace_s=2, measured=True,
        early_stopping=EarlyStoppingConfig(by="vpcs", calibration_steps=args.steps),
    )  # fmt: skip
    parts = [NodePart(f"node-{n}", found.engine, rows) for n, rows in enumerate(shards)]
    federation = Federation(rules, found.mask, parts)
    federation.start()
    federation.run(until=1e6)
    assert len(federation.entries) == 1, federation.errors
    assert all(record.verdict in NOT_REFUSED for record in federation.records[0])
    (products,) = federation.products[0]
    return [Path100(seed, int(r.node[5:]), gradip(r.scalars, products)) for r in federation.records[0]]


def collect(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.masks.mkdir(parents=True, exist_ok=True)
    found = stage(args.model, args.masks, args.tokens)
    with args.out.open("a") as file:
        for seed in range(args.first, args.first + args.seeds):
            for path in calibrate(found, shards_of(rows_of(args.model, seed), seed), seed, args):
                file.write(json.dumps(path) + "\n")
            file.flush()


class Rates(NamedTuple):
    """Shares of federations: flagged exactly the extreme nodes; flagged anyone of eight IID; and of nodes."""

    exact: float
    anyone: float
    extreme: float
    iid: float


def rates(paths: Iterable[Path100], config: EarlyStoppingConfig) -> Rates:
    flagged = {
        seed: {p.node for p in group if is_extreme(*path_ratios(p.path, config), config)}
        for seed, group in groupby(paths, key=lambda p: p.seed)
    }
    among = set(IID[: 8 - len(EXTREME)]) | set(EXTREME)
    count = len(flagged)
    return Rates(
        sum(nodes & among == set(EXTREME) for nodes in flagged.values()) / count,
        sum(bool(nodes & set(IID)) for nodes in flagged.values()) / count,
        sum(len(nodes & set(EXTREME)) for nodes in flagged.values()) / (len(EXTREME) * count),
        sum(len(nodes & set(IID)) for nodes in flagged.values()) / (len(IID) * count),
    )


def read(file: Path) -> list[Path100]:
    return [Path100(seed, node, tuple(path)) for seed, node, path in map(json.loads, file.read_text().splitlines())]


def choose(paths: Sequence[Path100]) -> list[tuple[float, EarlyStoppingConfig, Rates]]:
    """All settings of the grid, best first: exact flags less false alarms."""
    found = []
    for below, initial, later in product((0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.3), (0.3, 0.4, 0.5)):
        for rho_later, rho_quiet in product((1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
            config = EarlyStoppingConfig(
                by="vpcs", quiet=below, initial=initial, later=later, rho_later=rho_later, rho_quiet=rho_quiet
            )
            rate = rates(paths, config)
            found.append((rate.exact - rate.anyone, config, rate))
    return sorted(found, key=lambda item: -item[0])


def describe(config: EarlyStoppingConfig, rate: Rates) -> str:
    return (
        f"| {config.initial} / {config.later} | {config.quiet} | {config.rho_later} | {config.rho_quiet} "
        f"| {rate.exact:.0%} | {rate.anyone:.0%} | {rate.extreme:.0%} | {rate.iid:.1%} |"
    )


def draw(paths: Sequence[Path100], span: int = 15) -> str:
    """|GradIP| of one seed's nodes as SVG: running means over `span` steps, log scale; the extreme nodes in colour."""
    curves = {p.node: np.convolve(np.abs(p.path), np.full(span, 1 / span), mode="valid") for p in paths}
    low = float(np.log10(min(curve.min() for curve in curves.values())))
    high = float(np.log10(max(curve.max() for curve in curves.values())))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" font-family="sans-serif" font-size="12">',
        '<rect width="720" height="300" fill="white"/>',
    ]
    ticks = (digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5))
    for tick in ticks:
        if 10**low <= tick <= 10**high:
            y = 260 - 240 * (np.log10(tick) - low) / (high - low)
            parts.append(f'<path d="M50 {y:.0f}H700" stroke="#ddd"/><text x="8" y="{y + 4:.0f}">{tick:g}</text>')
    for node, curve in curves.items():
        points = " ".join(
            f"{50 + 650 * index / len(curve):.1f},{260 - 240 * (np.log10(value) - low) / (high - low):.1f}"
            for index, value in enumerate(curve)
        )
        style = 'stroke="#c0392b" stroke-width="2.5"' if node in EXTREME else 'stroke="#7f8c8d" stroke-width="1.2"'
        parts.append(f'<polyline points="{points}" fill="none" {style}/>')
    parts.append(f'<text x="50" y="285">local steps of the calibration, 1 to {len(paths[0].path)}; |GradIP|, ')
    parts.append(f"mean over {span} steps; red: one label, grey: IID</text></svg>")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["minilm", "demo"], default="minilm")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--masks", type=Path, default=Path("runs/masks"))
    parser.add_argument("--out", type=Path, default=Path("runs/gradip.jsonl"))
    parser.add_argument("--report", type=Path, help="judge these paths at the thresholds of the options")
    parser.add_argument("--choose", type=Path, help="show the best thresholds for these paths")
    parser.add_argument("--draw", type=Path, help="draw the curves of a seed of these paths")
    parser.add_argument("--seed", type=int, default=1)
    defaults = EarlyStoppingConfig()
    for name in ("initial", "later", "quiet", "rho_later", "rho_quiet"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    args = parser.parse_args()
    if args.draw is not None:
        print(draw([p for p in read(args.draw) if p.seed == args.seed]))
    elif args.choose is not None:
        for _, config, rate in choose(read(args.choose))[:15]:
            print(describe(config, rate))
    elif args.report is not None:
        chosen = {name: getattr(args, name) for name in ("initial", "later", "quiet", "rho_later", "rho_quiet")}
        config = EarlyStoppingConfig(by="vpcs", **chosen)
        print(describe(config, rates(read(args.report), config)))
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        collect(args)


if __name__ == "__main__":
    main()
