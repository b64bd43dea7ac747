"""What a step costs where the blocks below the mask are computed once a row.

    python -m benchmarks.frozen_prefix [--pairs 5] [--shares 0.5 0.75] [--minilm DIR] [--smollm2 DIR]

CPU time (one thread) of a step (write, losses, write, losses) ÷ two losses of the same batch by whole passes, which
compute the head at the wanted positions alone, as all steps do. "known": all rows were seen before; "new": none was.
Measured in turns, one right after the other; the figure is the median of the pairs' ratios, with the smallest and the
largest. "difference" is the largest |loss| of a known row by a step's passes − by whole passes; of g likewise, at eps
1e-2, in a batch of other rows than those that the states were made with.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np  # after the number of threads is set
import structlog
import torch

from benchmarks.zo_step import WORDS, Case, cpu_seconds, find_minilm, make_rows, make_task, ratio
from meerkat_mq.core.directions import direction
from meerkat_mq.core.step import projected_gradient
from meerkat_mq.engines.prefix import Keep
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask

DENSITY, EPS = 1e-3, 1e-2


def measure(case: Case, loaded: LoadedModel, share: float, pairs: int) -> str:
    """A line of the table."""
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    mask = make_mask(loaded, texts, "random", density=DENSITY, from_layer=share, sequences=2, length=32, batch_size=2)
    task, rows = make_task(case), make_rows(case)
    whole, frozen, forgetful = (TransformersEngine(loaded, mask, task, keep) for keep in (None, Keep(), Keep(0)))
    assert frozen.prefix is not None
    theta, z = mask.theta_0, direction("mk1", 0, 0, mask.size)
    batch = whole.prepare(rows)

    def step(engine: TransformersEngine) -> None:
        projected_gradient(engine, theta, z, EPS, engine.prepare(rows))

    works = (lambda: [whole.losses(batch) for _ in range(2)], lambda: step(frozen), lambda: step(forgetful))
    rounds = [[cpu_seconds(work) for work in works] for _ in range(pairs + 1)][1:]  # the first warms up
    plain, known, new = (list(column) for column in zip(*rounds, strict=True))
    count, of = frozen.prefix.count, len(frozen.prefix.blocks)
    return (
        f"| {case.name}, {case.batch}x{case.tokens} | {count} of {of} | {mask.size:,} "
        f"| {np.median(known) * 1e3:.0f} ms | {ratio(known, plain)} | {ratio(new, plain)} "
        f"| {differences(whole, frozen, theta, z, rows)} |"
    )


def differences(
    whole: TransformersEngine, frozen: TransformersEngine, theta: Any, z: Any, rows: list[dict[str, Any]]
) -> str:
    """Of losses, and of g, on rows cut to different lengths: the shorter half of those that states were made of."""
    cut = [{**row, "text": row["text"][: 20 + 25 * n]} for n, row in enumerate(rows)]
    frozen.write(theta)
    frozen.losses(frozen.prepare(cut))
    some = cut[: len(cut) // 2]
    whole.write(theta)
    losses = [engine.losses(engine.prepare(some)) for engine in (whole, frozen)]
    scalars = [projected_gradient(engine, theta, z, EPS, engine.prepare(some))[0] for engine in (whole, frozen)]
    whole.write(theta)  # the next mask is made of the model as it was
    of_losses = float(np.abs(losses[0] - losses[1]).max())
    return f"{of_losses:.1e}; {abs(scalars[0] - scalars[1]):.1e} of {abs(scalars[0]):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM; default: that of the package")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct; default: it is left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print("| model, batch | frozen blocks | masked | known step, CPU | known | new | difference: loss; g |")
    print("|---|---|---|---|---|---|---|", flush=True)
    cases = [(Case("minilm", 16, 48), options.minilm or find_minilm()), (Case("smollm2", 8, 48), options.smollm2)]
    for case, folder in cases:
        if folder is not None:
            loaded = load_model(folder)
            for share in options.shares:
                print(measure(case, loaded, share, options.pairs), flush=True)


if __name__ == "__main__":
    main()
