"""What half-precision weights do to projected gradients: beside a float32 model of the same rounded weights.

    python benchmarks/half_precision.py MODEL [--dtype bfloat16] [--directions 20] [--eps 1e-3] [--rows 8]

Each line is a process of its own: `float32` (the rounded weights, in float32), the stored dtype as an engine computes
with it (float32 passes), and the same with passes in the stored dtype, as transformers would make them. Correlation of
g along the same directions, relative error, CPU time of a step (one thread) and peak RSS. The mask is random, a
thousandth of each linear matrix.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

MODES = ("float32", "float32 passes", "passes in the dtype")
SUBJECTS = ("The film", "This pump", "Their new book", "A long walk", "The soup", "His answer", "My old car", "The end")
ENDS = ("was a joy from the first minute on", "is not worth what it costs", "came as a surprise", "left me cold")


def rows(count: int) -> list[dict[str, Any]]:
    texts = [f"{subject} {end}." for end in ENDS for subject in SUBJECTS]
    return [{"sentence": text, "label": index % 2} for index, text in enumerate(texts[:count])]


def mask_of(loaded: Any, dtype: Any) -> Any:
    from meerkat_mq.core.mask import Mask, MaskedMatrix
    from meerkat_mq.engines.torch.load import linear_layers

    rng, matrices = np.random.default_rng(0), []
    for name, layer in linear_layers(loaded.model).items():
        size = layer.weight.numel()
        indices = np.sort(rng.choice(size, max(1, size // 1000), replace=False)).astype(np.uint32)
        theta_0 = layer.weight.detach().flatten()[indices.astype(np.int64)].to(dtype).float().numpy()
        matrices.append(MaskedMatrix(name, tuple(layer.weight.shape), indices, theta_0, np.zeros_like(theta_0)))
    return Mask(tuple(matrices), loaded.fingerprint, loaded.tokenizer_fingerprint)


def measure(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from meerkat_mq.core.directions import direction
    from meerkat_mq.core.step import projected_gradient
    from meerkat_mq.engines.torch import load
    from meerkat_mq.engines.torch.engine import TransformersEngine
    from meerkat_mq.tasks.load import load_task

    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    if mode == MODES[2]:
        load.widen = lambda model: None  # type: ignore[attr-defined]
    loaded = load.load_model(options.model, dtype="float32" if mode == MODES[0] else options.dtype)
    if mode == MODES[0]:
        for parameter in loaded.model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    mask = mask_of(loaded, dtype)
    engine, theta, found = TransformersEngine(loaded, mask, load_task("sst2")), mask.theta_0, []
    batch, began = engine.prepare(rows(options.rows)), 0.0
    for seed in range(-1, options.directions):  # the first is not timed
        z = direction("mk1", seed + 1, 0, mask.size)
        g, _ = projected_gradient(engine, theta, z, options.eps, batch)
        found.append(g)
        began = began or time.process_time()
    step = (time.process_time() - began) / options.directions
    return {"g": found, "step_s": step, "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--directions", type=int, default=20)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options.mode, options)))
        return
    print(f"| {options.dtype}, eps {options.eps:g} | correlation of g | relative error | CPU of a step | peak RSS |")
    print("|---|---|---|---|---|", flush=True)
    expected = None
    for mode in MODES:
        command = [sys.executable, *sys.argv, "--mode", mode]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        g = np.array(found["g"])
        expected = g if expected is None else expected
        error = np.linalg.norm(g - expected) / np.linalg.norm(expected)
        print(
            f"| {mode} | {np.corrcoef(g, expected)[0, 1]:.4f} | {error:.1e} | {found['step_s']:.2f} s "
            f"| {found['rss_mib']:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
