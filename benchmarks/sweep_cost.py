"""What a sweep's cells cost, against those of another checkout: CPU seconds, in alternating pairs.

    git worktree add ../before 2f02a63
    python -m benchmarks.sweep_cost --before ../before
    python -m benchmarks.sweep_cost --before ../before --pairs 9

Three cells on the demo's own model, each in a process of its own with one thread: many rounds of one local step, long
rounds with early stopping, and a dense mask. Theta's digest, accuracy, judgements and GradIP have to be the same in
both checkouts. Prints a Markdown table: the median of each side's CPU seconds, and the median of the pairs' ratios,
for the training (`cpu_seconds` of a row) and for the whole cell.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLAN: dict[str, Any] = {"model": "demo", "nodes": 8, "batch_size": 4, "eval_rows": 64, "calibration_sequences": 16}
EARLY = {"by": "vpcs", "calibration_steps": 40, "rho_later": 1e-9, "quiet": 1e9}
CELLS: dict[str, dict[str, Any]] = {
    "T = 1": {"passes": 200, "method": {"name": "one", "density": 1e-3, "lr": 0.1, "directions": 4}},
    "T = 10, early stopping": {
        "passes": 240,
        "local_steps": [10],
        "method": {"name": "early", "density": 1e-3, "lr": 0.05, "early_stopping": EARLY},
    },
    "dense": {"passes": 60, "method": {"name": "dense", "mask": "dense", "lr": 1e-4}},
}
COSTS = ("cpu_seconds", "wall_seconds", "energy_joules", "energy_source", "peak_memory_mib", "bytes_up", "bytes_down")


def run_here(name: str, masks: Path) -> dict[str, Any]:
    """Run a cell with the code of whatever checkout is on PYTHONPATH."""
    from meerkat_mq.config import check_config
    from meerkat_mq.sweep import cell as jobs
    from meerkat_mq.sweep.grid import cells_of
    from meerkat_mq.sweep.plan import SweepPlan
    from meerkat_mq.sweep.rows import OWN_TASK
    from meerkat_mq.sweep.workers import _one_thread

    _one_thread()
    method = CELLS[name]["method"]
    table = PLAN | {key: value for key, value in CELLS[name].items() if key != "method"} | {"methods": [method]}
    plan = check_config(table, SweepPlan, where=name)
    (cell,) = cells_of(plan, jobs.identify(plan, lambda _: None), OWN_TASK)
    mask, baseline = masks / f"{method['name']}.mkm", masks / "baseline.json"
    if not mask.exists():
        jobs.make_cell_mask(cell, mask, lambda _: None)
    jobs.make_baseline(cell, baseline, lambda _: None)
    began = time.process_time()
    figures = jobs.run_cell(cell, mask, baseline, lambda _: None)
    return figures | {"whole": time.process_time() - began}


def run_in(checkout: Path, name: str, masks: Path) -> dict[str, Any]:
    """Run a cell in a process of its own, with a checkout's code."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--cell", name, "--masks", str(masks)]
    found = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--masks", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(run_here(args.cell, args.masks)))
        return
    sides = (args.before.resolve(), Path(__file__).parent.parent)
    print("| cell | training before | after | ratio | whole before | after | ratio | bytes up | down |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in CELLS:
            pairs = list[tuple[dict[str, Any], ...]]()
            for number in range(args.pairs):
                order = (0, 1) if number % 2 else (1, 0)
                found = {side: run_in(sides[side], name, Path(folder)) for side in order}
                pairs.append((found[0], found[1]))
                same = ({key: row[key] for key in row if key not in (*COSTS, "whole")} for row in pairs[-1])
                before, after = same
                assert before == after, (before, after)
            print(line(name, pairs), flush=True)


def line(name: str, pairs: list[tuple[dict[str, Any], ...]]) -> str:
    """A row of the table."""
    cells = [name]
    for figure in ("cpu_seconds", "whole"):
        cells += [f"{statistics.median(pair[side][figure] for pair in pairs):.2f}" for side in (0, 1)]
        cells.append(f"{statistics.median(pair[1][figure] / pair[0][figure] for pair in pairs):.3f}")
    cells += [" → ".join(f"{row[figure]:.0f}" for row in pairs[0]) for figure in ("bytes_up", "bytes_down")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
