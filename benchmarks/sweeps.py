"""The method's table: the sweeps behind benchmarks/README.md, by name.

    python -m benchmarks.sweeps agnews-tuning             learning rates, on rows split off the training file
    python -m benchmarks.sweeps agnews                    and so on; without a name: their list

Rows and tables go to `--out` (default runs/sweeps/NAME); a second start goes on where the first one stopped. MiniLM and
the data sets are found as in `benchmarks.minilm_agnews`, SmolLM2-135M-Instruct as in `meerkat demo --model smollm2`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.minilm_agnews import SHARED, minilm
from benchmarks.real_logs import lines_of
from meerkat_mq.config import EarlyStoppingConfig, check_config
from meerkat_mq.demo.settings import DEMO
from meerkat_mq.engines.torch.smollm2 import smollm2_folder
from meerkat_mq.sweep.plan import SweepPlan
from meerkat_mq.sweep.run import check_plan, run_sweep
from meerkat_mq.tasks.data import encode_rows

Table = dict[str, Any]

C4 = SHARED / "data/text/c4_sample.jsonl"
WIKITEXT = SHARED / "data/text/wikitext2_valid.txt"
DIRICHLET = [{"how": "dirichlet", "alpha": 0.5}]


def task(name: str, **others: Any) -> Table:
    folder = SHARED / "data" / name
    return {"name": name, "train": folder / "train.jsonl", "validation": folder / "validation.jsonl", **others}


def on_minilm(methods: list[Table], **others: Any) -> Table:
    """A plan on real weights and AG News: 8 nodes, Dirichlet(0.5), T = 10, 160 forward passes a node, three seeds."""
    plan: Table = {
        "model": minilm(), "text": C4, "calibration_tokens": 128, "nodes": 8, "passes": 160, "batch_size": 4,
        "max_tokens": 24, "eval_rows": 1000, "local_steps": [10], "splits": DIRICHLET, "seeds": [0, 1, 2],
        "tasks": [task("agnews")],
    }  # fmt: skip
    return plan | others | {"methods": methods}


def tuning(methods: list[Table], **others: Any) -> Table:
    """The same on rows split off the training file, one seed of its own."""
    return on_minilm(methods, evaluate_on="tuning", tune_rows=1000, eval_rows=600, seeds=[100], **others)


def method(name: str, lr: float | list[float], **others: Any) -> Table:
    return {"name": name, "lr": lr, **others}


def meerkat(lr: float | list[float], **others: Any) -> Table:
    return method("MEERKAT", lr, **others)


def tuned() -> list[Table]:
    """Half the budget, learning rates around what a first look showed; dense runs move 2,000 times as many weights."""
    return [
        meerkat([5e-4, 1e-3, 2e-3, 4e-3]),
        method("magnitude-activation", [1e-3, 4e-3, 1.6e-2, 6.4e-2], mask="magnitude-activation"),
        method("magnitude", [1e-3, 5e-3, 2.5e-2, 1e-1, 5e-1], mask="magnitude"),
        method("random", [5e-3, 2.5e-2, 1e-1, 5e-1], mask="random"),
        method("dense ZO", [1e-6, 5e-6, 2.5e-5, 1e-4, 3e-4], mask="dense"),
        method("LoRA-ZO", [3e-4, 3e-3, 3e-2], mask="lora"),
        method("first-order", [1e-4, 3e-4, 1e-3], optimiser="first-order"),
        method("u = 1e-2", [2e-4, 6e-4], density=1e-2),
        method("u = 1e-4", [6e-3, 2e-2], density=1e-4),
    ]


def chosen() -> dict[str, Table]:
    """Each method at the learning rate that gave the lowest loss on the tuning rows."""
    return {
        "meerkat": meerkat(2e-3),
        "magnitude-activation": method("magnitude-activation", 1.6e-2, mask="magnitude-activation"),
        "magnitude": method("magnitude", 0.1, mask="magnitude"),
        "random": method("random", 0.1, mask="random"),
        "dense": method("dense ZO", 1e-4, mask="dense"),
        "lora": method("LoRA-ZO", 3e-3, mask="lora"),
        "decomfl": method("DeComFL", 1.6e-3, mask="dense", perturbations=10),
        "first-order": method("first-order", 1e-3, optimiser="first-order"),
    }


def of(*names: str) -> list[Table]:
    """Those of the chosen methods."""
    return [chosen()[name] for name in names]


def early_stopping(lr: float, settings: EarlyStoppingConfig, **others: Any) -> list[Table]:
    """Meerkat; Meerkat-vp; and the control: a calibration round too, then two nodes drawn at random."""
    given = settings.model_dump(mode="json")
    return [
        meerkat(lr, **others),
        method("Meerkat-vp", lr, early_stopping=given | {"by": "vpcs"}, **others),
        method("random early stopping", lr, early_stopping=given | {"by": "random", "random_share": 0.25}, **others),
    ]


def on_demo(methods: list[Table], splits: list[Table], steps: list[int]) -> Table:
    """A plan on the demo's Llama: 250 calibration steps and 100 others, or 350, a node."""
    return {
        "model": "demo", "nodes": 8, "passes": 700, "batch_size": 8, "eval_rows": 1000, "local_steps": steps,
        "splits": splits, "seeds": [0, 1, 2], "methods": methods,
    }  # fmt: skip


def demo_table(methods: list[Table], **others: Any) -> Table:
    """The method's table on the demo's Llama: 8 nodes, Dirichlet(0.5), T = 10, one lane, 300 forward passes a node."""
    given = [m if m.get("optimiser") == "first-order" else m | {"eps": DEMO.eps} for m in methods]
    return on_demo(given, DIRICHLET, [10]) | {"passes": 300} | others


def demo_tuning(methods: list[Table], **others: Any) -> Table:
    """The same on rows split off, two seeds of its own; at half the budget, rates that diverge later look best."""
    return demo_table(methods, evaluate_on="tuning", tune_rows=300, eval_rows=300, seeds=[100, 101], **others)


def on_smollm2(task: Table, methods: list[Table], **others: Any) -> Table:
    """A plan on a genuine LLM: 8 nodes, Dirichlet(0.5), T = 1, four lanes, 120 forward passes a node."""
    return {
        "model": str(smollm2_folder()), "text": C4, "calibration_sequences": 32, "calibration_tokens": 128, "nodes": 8,
        "passes": 120, "batch_size": 8, "max_tokens": 48, "eval_rows": 1000, "evaluate_every": 20, "splits": DIRICHLET,
        "tasks": [task],
        "methods": [one if "optimiser" in one else one | {"directions": 4} for one in methods],
    } | others  # fmt: skip


def first_order(lr: float | list[float]) -> Table:
    return method("first-order", lr, optimiser="first-order")


def written(name: str, text: str) -> Path:
    """A file of a benchmark's own."""
    file = Path("runs/sweeps") / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file.resolve()


def nl2bash() -> Table:
    lines = ["kind = 'completion'", 'template = "{instruction}"', 'completion = "{command}"', "chat = true"]
    return task("nl2bash", task=str(written("nl2bash.toml", "\n".join(lines))))


def logs() -> Table:
    """Log lines of 13 systems, each row with its system's name."""
    table = {"name": "logs", "task": str(written("logs.toml", "kind = 'text'"))}
    for part in ("train", "validation"):
        table[part] = str(written(f"logs-{part}.jsonl", encode_rows(lines_of(part)).decode()))
    return table


def few(name: str, rows: int) -> Table:
    """A task whose nodes share so many rows: several epochs, so that a frozen prefix is computed once a row."""
    lines = (SHARED / "data" / name / "train.jsonl").read_text().splitlines(keepends=True)[:rows]
    return task(name) | {"train": written(f"{name}-{rows}.jsonl", "".join(lines))}


def above(layer: int, lr: list[float], **others: Any) -> list[Table]:
    """MEERKAT's mask from a block on."""
    return [meerkat(lr, **({"from_layer": layer} if layer else {}), **others)]


def agnews_above(layer: int, lr: list[float], passes: int) -> Table:
    """100 rows a node; the budgets are meant to cost about the same CPU time."""
    return on_minilm(above(layer, lr), tasks=[few("agnews", 800)], passes=passes, eval_rows=500, evaluate_every=2)


def demo_above(layer: int, lr: list[float], passes: int) -> Table:
    return demo_table(above(layer, lr), passes=passes, evaluate_every=3)


def smollm2_above(layer: int, lr: list[float], passes: int) -> Table:
    method = above(layer, lr)
    return on_smollm2(few("sst2", 400), method, passes=passes, eval_rows=300, evaluate_every=10, seeds=[0, 1, 2])


DEMO_GRID = [
    meerkat([5e-2, 0.1, 0.2]),
    method("magnitude-activation", [0.1, 0.3], mask="magnitude-activation"),
    method("magnitude", [0.1, 0.3], mask="magnitude"),
    method("random", [0.3, 1.0], mask="random"),
    method("dense ZO", [1e-4, 3e-4], mask="dense"),
    method("LoRA-ZO", [3e-3, 1e-2], mask="lora"),
    method("first-order", [3e-2, 0.1], optimiser="first-order"),
]
DEMO_DECOMFL = method("DeComFL", [1e-3, 3e-3], mask="dense", perturbations=10)
DEMO_CHOSEN = [
    meerkat(0.1),
    method("dense ZO", 3e-4, mask="dense"),
    method("magnitude-activation", 0.1, mask="magnitude-activation"),
    method("magnitude", 0.3, mask="magnitude"),
    method("random", 0.3, mask="random"),
    method("LoRA-ZO", 3e-3, mask="lora"),
    method("first-order", 0.1, optimiser="first-order"),
]

EXTREME = {"how": "extreme", "nodes": 2}
PLAIN, VP, RANDOM = early_stopping(DEMO.lr, DEMO.early_stopping, directions=4, eps=DEMO.eps)

SWEEPS: dict[str, Callable[[], Table]] = {
    "agnews-tuning": lambda: tuning(tuned(), passes=120),
    "decomfl-tuning": lambda: tuning(
        [method("DeComFL", [1e-4, 4e-4, 1.6e-3, 5e-3], mask="dense", perturbations=10)], passes=120, local_steps=[1]
    ),
    "agnews-masks": lambda: on_minilm(of("meerkat", "magnitude-activation", "magnitude", "random")),
    "agnews-lora": lambda: on_minilm(of("lora", "first-order")),
    "agnews-dense": lambda: on_minilm(of("dense")),
    "agnews-decomfl": lambda: on_minilm(of("decomfl"), local_steps=[1]),
    "agnews-t1": lambda: on_minilm(of("meerkat"), local_steps=[1], splits=[*DIRICHLET, {"how": "iid"}]),
    "agnews-t1-dense": lambda: on_minilm(of("dense"), local_steps=[1], seeds=[0]),
    "agnews-one-label": lambda: on_minilm(of("meerkat"), splits=[{"how": "one-label"}]),
    "agnews-one-label-dense": lambda: on_minilm(of("dense"), splits=[{"how": "one-label"}], seeds=[0]),
    "transfer": lambda: on_minilm(
        [
            method("WikiText mask", 2e-3, text=WIKITEXT),
            method("task-data mask", 2e-3, text="task"),
            method("u = 1e-2", 6e-4, density=1e-2),
            method("u = 1e-4", 6e-3, density=1e-4),
        ],
        seeds=[0],
    ),
    "tasks": lambda: on_minilm(
        [{"name": "untrained", "mask": "none"}, *of("meerkat", "first-order")],
        max_tokens=96,
        passes=80,
        eval_rows=500,
        seeds=[0],
        tasks=[task(name) for name in ("sst2", "rte", "boolq", "wic")],
    ),
    "demo-tuning": lambda: demo_tuning(DEMO_GRID),
    "demo-decomfl-tuning": lambda: demo_tuning([DEMO_DECOMFL], local_steps=[1]),
    "demo": lambda: demo_table(DEMO_CHOSEN),
    "demo-decomfl": lambda: demo_table([DEMO_DECOMFL | {"lr": 3e-3}], local_steps=[1]),
    "demo-t1": lambda: demo_table(DEMO_CHOSEN[:2], local_steps=[1], splits=[*DIRICHLET, {"how": "iid"}]),
    "demo-one-label": lambda: demo_table(DEMO_CHOSEN[:2], splits=[{"how": "one-label"}]),
    "early-stopping": lambda: on_demo([PLAIN, VP, RANDOM], [EXTREME], [10, 30, 50]),
    "minority": lambda: on_demo([PLAIN, VP], [EXTREME | {"exclusive": True}], [10]),
    "smollm2-sst2": lambda: on_smollm2(task("sst2"), [meerkat([5e-4, 8e-4]), first_order(1e-3)]),
    "smollm2-agnews": lambda: on_smollm2(task("agnews"), [meerkat(5e-4), first_order(1e-3)], max_tokens=64),
    "smollm2-nl2bash": lambda: on_smollm2(
        nl2bash(),
        [meerkat(5e-4), first_order(1e-3)],
        max_tokens=96,
        eval_rows=200,
        passes=60,
        evaluate_every=10,
        splits=[{"how": "iid"}],
    ),
    "smollm2-logs": lambda: on_smollm2(
        logs(),
        [meerkat([5e-4, 1e-3]), first_order(1e-3)],
        max_tokens=64,
        eval_rows=260,
        passes=40,
        evaluate_every=5,
        nodes=13,
        splits=[{"how": "field", "field": "system"}],
    ),
    "prefix-agnews-0": lambda: agnews_above(0, [1e-3, 2e-3, 4e-3], 160),
    "prefix-agnews-3": lambda: agnews_above(3, [1e-3, 2e-3, 4e-3], 280),
    "prefix-agnews-4": lambda: agnews_above(4, [2e-3, 4e-3, 8e-3], 400),
    "prefix-demo-0": lambda: demo_above(0, [0.1, 0.2], 300),
    "prefix-demo-2": lambda: demo_above(2, [0.1, 0.2], 500),
    "prefix-sst2-0": lambda: smollm2_above(0, [5e-4], 60),
    "prefix-sst2-15": lambda: smollm2_above(15, [6e-4], 110),
    "prefix-sst2-22": lambda: smollm2_above(22, [8e-4], 200),
    "early-stopping-minilm": lambda: on_minilm(
        early_stopping(2e-3, EarlyStoppingConfig()), passes=500, splits=[EXTREME]
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SWEEPS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    plan = check_config(SWEEPS[args.name](), SweepPlan, where=args.name)
    check_plan(plan)
    run_sweep(plan, args.out or Path("runs/sweeps") / args.name, args.processes, Console())


if __name__ == "__main__":
    main()
