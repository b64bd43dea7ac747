"""A node without PyTorch beside one with it: losses, projected gradients, CPU of a step, memory of a live node.

    python -m benchmarks.onnx_step --model FOLDER --weights int8 --work FOLDER [--task sst2] [--torch-node]

Makes, and keeps in `--work`, the base that such weights hold, a mask of 0.1 % of each linear weight by magnitude, and
the bundle. Then, of 8 rows (at most `--tokens` tokens) and directions at eps 1e-3: the largest difference of a loss
between the ONNX engine and PyTorch's in float32 on the same base; the correlation of g; and CPU seconds of a step, one
thread, engines in turn, as the median of the pairs' ratios. At last, a server and one node on a Mosquitto: two rounds
of batches of 8, and the node's peak resident memory, as its log gives it. In the node without PyTorch, importing it is
an error. `--torch-node` lets a node with PyTorch make the same rounds.

    python -m benchmarks.onnx_step --model FOLDER --work FOLDER --from-layer 0.5

Instead, CPU seconds of a step whose mask begins at this block, or above this share of the blocks, against one with all
blocks, both without PyTorch: of rows that are new, and of rows whose hidden states are kept. Then the live node.
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

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.billion import CONFIGS, save
from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row, projected_gradient
from meerkat_mq.engines.onnx.bundle import make_bundle, publish_base
from meerkat_mq.engines.onnx.engine import OnnxEngine
from meerkat_mq.engines.onnx.manifest import open_bundle
from meerkat_mq.engines.onnx.quantise import Weights
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.tasks.classification import TASKS, Classification
from meerkat_mq.tasks.data import read_rows
from tests.support.absent import ABSENT, START
from tests.support.mosquitto import Mosquitto

SHARED = Path(os.environ.get("MEERKAT_SHARED", Path(__file__).parents[2] / "shared"))
BATCH, EPS = 8, 1e-3
SERVER = """
federation = "step"
state_dir = "server"
mask = {mask!r}
task = {task!r}
once = true
wait_for_nodes_s = 3600  # a large model's node looks at its noise first
[broker]
url = "mqtt://127.0.0.1:{port}"
[rounds]
count = 2
min_nodes = 1
min_updates = 1
lr = 1e-4
batch_size = 8
"""
NODE = """
id = "n"
federation = "step"
data = "rows.jsonl"
state_dir = "node"
exit_when_finished = true
threads = 1
{engine}
[broker]
url = "mqtt://127.0.0.1:{port}"
"""


def name_of(weights: str, layer: int | float) -> str:
    """Of a mask's file and a bundle's folder."""
    return f"{weights}-{layer}" if layer else weights


def made(model: Path, weights: Weights, work: Path, layer: int | float = 0) -> tuple[Path, Mask, Path]:
    """The base that such weights hold, a mask, and its bundle; made where `work` lacks them."""
    work.mkdir(parents=True, exist_ok=True)
    if not model.exists() and str(model) in CONFIGS:
        name, model = str(model), work / model
        if not model.exists():
            save(name, model, "cpu")
    base = model if weights == "float32" else work / f"base-{weights}"
    kind = name_of(weights, layer)
    mask_file, bundle = work / f"mask-{kind}.mkm", work / f"bundle-{kind}"
    if not base.exists():
        publish_base(str(model), weights, base)
    if not mask_file.exists():
        texts = 16 * [__doc__ or ""]  # long enough for every model; magnitudes do not depend on it
        settings: dict[str, Any] = {"density": 1e-3, "from_layer": layer or None, "sequences": 16, "length": 64}
        make_mask(load_model(base), texts, "magnitude", **settings).save(mask_file)
    mask = Mask.load(mask_file)
    if not bundle.exists():
        make_bundle(str(base), mask, weights, bundle, print)
    return base, mask, bundle


def compared(base: Path, mask: Mask, bundle: Path, task: Classification, rows: list[Row], directions: int) -> None:
    torch.set_num_threads(1)
    engines: list[Any] = [
        OnnxEngine(open_bundle(bundle), mask, task, 1),
        TransformersEngine(load_model(base), mask, task),
    ]
    batches, losses = [engine.prepare(rows) for engine in engines], list[npt.NDArray[np.float32]]()
    for engine, batch in zip(engines, batches, strict=True):
        engine.check(mask)
        engine.write(mask.theta_0)
        losses.append(engine.losses(batch))
    print(f"|loss|             {np.abs(losses[0] - losses[1]).max():.1e}", flush=True)
    found, seconds = np.empty((directions, 2)), np.empty((directions, 2))
    for seed in range(directions):
        z = direction("mk1", seed, 0, mask.size)
        for place, (engine, batch) in enumerate(zip(engines, batches, strict=True)):
            began = time.process_time()
            found[seed, place] = projected_gradient(engine, mask.theta_0, z, EPS, batch)[0]
            seconds[seed, place] = time.process_time() - began
    errors = np.linalg.norm(found[:, 0] - found[:, 1]) / np.linalg.norm(found[:, 1])
    ratios = sorted(seconds[:, 0] / seconds[:, 1])
    print(f"g                  correlation {np.asarray(np.corrcoef(found.T))[0, 1]:.7f}, relative error {errors:.1e}")
    print(f"CPU s of a step    {np.median(seconds[:, 0]):.3f} against {np.median(seconds[:, 1]):.3f}")
    print(f"ratio              {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})", flush=True)


def frozen(pairs: list[tuple[Mask, Path]], task: Classification, rows: list[Row], directions: int) -> None:
    """CPU seconds of a step of two bundles, in turn: of all blocks, and above a frozen prefix."""
    engines = [OnnxEngine(open_bundle(bundle), mask, task, 1) for mask, bundle in pairs]
    seconds = np.empty((2 * directions, 2))
    for seed in range(2 * directions):
        batch = rows[seed % directions * BATCH :][:BATCH]  # each comes twice: new, then kept
        for place, (engine, (mask, _)) in enumerate(zip(engines, pairs, strict=True)):
            z = direction("mk1", seed, 0, mask.size)
            began = time.process_time()
            projected_gradient(engine, mask.theta_0, z, EPS, engine.prepare(batch))
            seconds[seed, place] = time.process_time() - began
    for name, part in (("new rows", seconds[1:directions]), ("kept states", seconds[directions:])):
        ratios = sorted(part[:, 1] / part[:, 0])
        print(f"{name:<18} {np.median(part[:, 1]):.3f} against {np.median(part[:, 0]):.3f} CPU s of a step")
        print(f"ratio              {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})", flush=True)


def live(mask: Path, task: Path, rows: list[Row], engine: str, block: str) -> float:
    """Peak resident memory of a node that makes two rounds, MiB."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        broker = Mosquitto(folder).start()
        try:
            (folder / "rows.jsonl").write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
            settings = {"port": broker.port, "mask": str(mask), "task": str(task), "engine": engine}
            (folder / "server.toml").write_text(SERVER.format(**settings))
            (folder / "node.toml").write_text(NODE.format(**settings))
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
            processes = [
                subprocess.Popen(
                    [sys.executable, "-c", code + START, command, "--config", f"{command}.toml"],
                    cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
                )
                for command, code in (("server", ""), ("node", block))
            ]  # fmt: skip
            logs = [process.communicate()[1] for process in processes]
        finally:
            broker.kill()
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(logs))
    events = [json.loads(line) for line in logs[1].splitlines() if line.startswith("{")]
    return next(float(event["peak_rss_mib"]) for event in events if event["event"] == "finished")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help=f"folder; or random weights: {', '.join(CONFIGS)}")
    parser.add_argument("--weights", choices=["float32", "float16", "int8", "int4"], default="int8")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", choices=sorted(TASKS), default="sst2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--directions", type=int, default=20, help="0: only the live node")
    parser.add_argument("--torch-node", action="store_true")
    parser.add_argument("--from-layer", type=lambda text: float(text) if "." in text else int(text), default=0)
    args = parser.parse_args()
    data = SHARED / "data" / args.task / "train.jsonl"
    if not data.is_file():
        sys.exit(f"skipped: {data} is not there; set MEERKAT_SHARED")
    task = TASKS[args.task].with_limit(args.tokens)
    rows = read_rows(data, task)[: max(64, BATCH * args.directions)]
    base, mask, bundle = made(args.model, args.weights, args.work.resolve())
    print(f"{args.model.name}, {args.weights}, {args.task}, n = {mask.size:,}")
    if args.from_layer:
        above = made(args.model, args.weights, args.work.resolve(), args.from_layer)[1:]
        frozen([(mask, bundle), above], task, rows, args.directions)
        mask, bundle = above
    elif args.directions:
        compared(base, mask, bundle, task, rows[:BATCH], args.directions)
    mask_file = args.work.resolve() / f"mask-{name_of(args.weights, args.from_layer)}.mkm"
    task_file = args.work.resolve() / "task.toml"
    keys = ("template", "label_words", "descriptions", "max_tokens")
    described = task.model_dump(mode="json", include=set(keys))
    task_file.write_text("".join(f"{key} = {json.dumps(described[key])}\n" for key in keys))
    peak = live(mask_file, task_file, rows, f"engine = 'onnx'\nmodel = {str(bundle)!r}", ABSENT)
    print(f"peak RSS, MiB      {peak:.0f}")
    if args.torch_node:
        print(f"with PyTorch       {live(mask_file, task_file, rows, f'model = {str(base.resolve())!r}', ''):.0f}")


if __name__ == "__main__":
    main()
