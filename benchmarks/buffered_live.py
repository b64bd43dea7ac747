"""The same for real: Mosquitto, one server, 16 node processes that rest before each step, with faults and without.

    python -m benchmarks.buffered_live --seeds 1                     links without faults
    python -m benchmarks.buffered_live --seeds 1 --faults flaky-wifi

Each run is a drill (`meerkat chaos`) on the demo's model, so its checkers judge the run too. The time of a version is
the ledger's; the server looks at the model every few versions.
"""

import argparse
import asyncio
import json
import tempfile
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.buffered import (
    BATCH,
    LANES,
    NODES,
    ROWS,
    Point,
    Policy,
    buffered,
    reached,
    smooth,
    step_times,
    synchronous,
    with_deadline,
)
from meerkat_mq.chaos.drill import Drill
from meerkat_mq.chaos.plan import load_plan
from meerkat_mq.demo.plan import Choices, DemoPlan, make_plan
from meerkat_mq.demo.settings import DEMO
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.tasks.data import write_rows

STEP_CPU_S = 0.02  # what a step of this model takes by itself
LOOK_EVERY = 3  # versions; more in a buffered run, whose versions are short
QUIET: dict[str, Any] = {
    "duration_s": 5.0,
    "faults": [{"fault": "latency", "at": 1.0, "for_s": 1.0}],
}  # a drill has one
PLANS = resources.files("meerkat_mq.chaos") / "plans"


def policies(versions: tuple[int, int, int]) -> list[tuple[Policy, int]]:
    return list(zip((synchronous(), with_deadline(), buffered()), versions, strict=True))


def rounds_of(policy: Policy, count: int) -> dict[str, Any]:
    rounds: dict[str, Any] = {
        "count": count, "lr": policy.lr, "eps": DEMO.eps, "batch_size": BATCH, "directions": LANES, "min_nodes": NODES,
        "quorum": policy.quorum, "deadline_s": policy.deadline_s,
    }  # fmt: skip
    if policy.buffer_size:
        rounds |= {
            "mode": "buffered", "buffer_size": policy.buffer_size, "max_staleness": policy.max_staleness,
            "staleness_exponent": policy.exponent,
        }  # fmt: skip
    return rounds


def write_configs(folder: Path, plan: DemoPlan, mask: Path, policy: Policy, count: int, seed: int, faults: str) -> Path:
    """federation.toml, the nodes' files and the drill's plan; returns the last."""
    write_rows(folder / "held-out.jsonl", plan.held_out[:ROWS])
    (folder / "task.toml").write_text(tomli_w.dumps(plan.task.describe().model_dump(mode="json")), encoding="utf-8")
    federation = {
        "federation": "drill", "state_dir": str(folder / "server"), "mask": str(mask), "task": "task.toml",
        "rounds": rounds_of(policy, count), "model": {"source": plan.source},
        "evaluation": {"data": "held-out.jsonl", "every": max(LOOK_EVERY, policy.buffer_size)},
    }  # fmt: skip
    (folder / "federation.toml").write_text(tomli_w.dumps(federation), encoding="utf-8")
    names = []
    for number, (rows, step_s) in enumerate(zip(plan.shards, step_times(seed), strict=True)):
        write_rows(folder / f"rows-{number}.jsonl", rows)
        began = folder / f"node-{number}.began"  # a drill waits for everybody's first update
        rest = f"test -e {began} || exec touch {began}; exec sleep {step_s - STEP_CPU_S:.3f}"
        node = {
            "id": f"node-{number}", "federation": "drill", "data": f"rows-{number}.jsonl", "model": plan.source,
            "state_dir": str(folder / f"node-{number}"), "threads": 1,
            "limits": {"allow": ["sh", "-c", rest]},
        }  # fmt: skip
        names.append(f"node-{number}.toml")
        (folder / names[-1]).write_text(tomli_w.dumps(node), encoding="utf-8")
    struck: dict[str, Any] = tomllib.loads((PLANS / f"{faults}.toml").read_text(encoding="utf-8")) if faults else QUIET
    head = {key: value for key, value in struck.items() if key != "faults"} | {"seed": seed}
    text = tomli_w.dumps(head | {"federation": {"config": "federation.toml", "node_configs": names, "pace_s": 0.0}})
    for fault in struck.get("faults", []):
        text += "\n[[faults]]\n" + tomli_w.dumps(fault)
    path = folder / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def curve_of(state_dir: Path) -> list[Point]:
    """What the ledger says: seconds since the first version closed, and the looks."""
    ledger = Ledger.read(state_dir / LEDGER_FILE)
    metrics = ledger.metrics()
    closed = {found.entry.version + 1: found.closed for found in ledger.closed(0, 1_000_000)}
    ledger.close()
    began = min(closed.values())
    return [
        Point(round(closed[version] - began, 2), version, found["accuracy"], found["loss"])
        for version, found in sorted(metrics.items())
        if version in closed
    ]


def run(policy: Policy, count: int, seed: int, faults: str, mask: Path) -> tuple[list[Point], list[str]]:
    """The curve, and what the checkers found."""
    plan = make_plan(Choices(nodes=NODES, seed=seed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = write_configs(folder, plan, mask, policy, count, seed, faults)
        out = folder / "out"
        verdict = asyncio.run(Drill(load_plan(str(path), out=out), out).run())
        state_dir = next(out.rglob(LEDGER_FILE)).parent
        return curve_of(state_dir), [str(violation) for violation in verdict.violations]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--faults", default="", help="a shipped plan's name")
    parser.add_argument("--versions", type=int, nargs=3, default=(80, 160, 600), help="of each policy")
    parser.add_argument("--masks", type=Path, default=Path("runs/masks"))
    parser.add_argument("--out", type=Path, help="append each curve to this file of JSON lines")
    args = parser.parse_args()
    args.masks.mkdir(parents=True, exist_ok=True)
    mask = args.masks / "demo.mkm"
    if not mask.exists():
        plan = make_plan(Choices(nodes=NODES))
        text = plan.calibration()
        make_mask(
            load_model(plan.source),
            text,
            sequences=plan.settings.calibration_sequences,
            length=plan.settings.calibration_tokens,
        ).save(mask)
    for seed in range(args.first, args.first + args.seeds):
        target = None
        for policy, count in policies(tuple(args.versions)):
            curve, violations = run(policy, count, seed, args.faults, mask.resolve())
            target = smooth(curve)[-1] if target is None else target
            print(
                f"seed {seed}  {policy.name:44} {curve[-1].version} versions in {curve[-1].seconds:.0f} s, at the end "
                f"{smooth(curve)[-1]:.3f}; {target:.3f} at {reached(curve, target)} s; checkers "
                + ("hold" if not violations else f"DO NOT HOLD: {violations}"),
                flush=True,
            )
            if args.out is not None:
                row = {
                    "seed": seed,
                    "policy": policy.name,
                    "faults": args.faults,
                    "violations": violations,
                    "curve": curve,
                }
                with args.out.open("a") as file:
                    file.write(json.dumps(row | {"violations": violations}, default=vars) + "\n")


if __name__ == "__main__":
    main()
