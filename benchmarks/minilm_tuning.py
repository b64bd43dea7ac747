"""Learning rates for `minilm_agnews`, tuned on rows split off the training file, in one process.

    python -m benchmarks.minilm_tuning --directions 4 --lr 5e-4 1e-3 --rounds 60

The same machines, rounds and data as the real federation, in memory, with one copy of the model.
"""

import argparse
import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.minilm_agnews import NODES, SHARED, agnews_task, mask_file, minilm
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.tasks.data import partition, read_rows
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.quiet import quiet


def settings(args: argparse.Namespace, mask: Mask, lr: float) -> RoundSettings:
    return RoundSettings(
        run_id=bytes(16) if args.fixed else secrets.token_bytes(16),
        mask_hash=mask.hash,
        count=args.rounds,
        local_steps=1,
        batch_size=args.batch,
        directions=args.directions,
        lr=lr,
        eps=1e-3,
        min_nodes=NODES,
        fraction=1.0,
        quorum=1.0,
        deadline_s=60,
        grace_s=2,
        min_updates=1,
    )


@quiet()
def learning_curve(
    args: argparse.Namespace,
    rules: RoundSettings,
    mask: Mask,
    engine: TransformersEngine,
    shards: Sequence[Sequence[Row]],
    held_out: Sequence[Row],
) -> list[tuple[int, float, float]]:
    """(round, accuracy, loss) every so many rounds."""
    parts = [NodePart(f"node-{i}", engine, shard) for i, shard in enumerate(shards)]
    federation = Federation(rules, mask, parts)
    federation.start()
    curve = []
    for target in range(0, args.rounds + 1, args.every):
        federation.run(1e6, lambda target=target: federation.version >= target)  # type: ignore[misc]
        engine.write(federation.theta)
        found = evaluate(engine, held_out)
        curve.append((federation.version, round(found.accuracy, 4), round(found.loss, 4)))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--every", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1000, help="rows of the split that accuracy is measured on")
    parser.add_argument("--fixed", action="store_true", help="a fixed run id, so that a run can be repeated")
    parser.add_argument("--masks", type=Path, required=True, help="folder that keeps masks between runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, source = agnews_task(), minilm()
    rows = read_rows(SHARED / "data/agnews/train.jsonl", task)
    held_out = rows[-1000:][: args.rows]
    shards = partition(rows[:-1000], NODES, "dirichlet", seed=args.seed, alpha=0.5)
    mask = Mask.load(mask_file(args.masks, source, "sensitivity", 1e-3, args.seed))
    engine = TransformersEngine(load_model(source), mask, task)
    for lr in args.lr:
        began = time.process_time()
        curve = learning_curve(args, settings(args, mask, lr), mask, engine, shards, held_out)
        row = {"directions": args.directions, "lr": lr, "batch": args.batch, "curve": curve}
        print(json.dumps({**row, "cpu_s": round(time.process_time() - began)}), flush=True)


if __name__ == "__main__":
    main()
