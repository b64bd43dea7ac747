"""Models of a billion weights: masks are exact, scoring and steps fit in memory, one federated round goes through.

    python -m benchmarks.billion --model llama-3.2-1b
    python -m benchmarks.billion --model gemma-2-2b --device cuda
    python -m benchmarks.billion --model tiny              a few seconds: proves that this file works

Random bfloat16 weights of the published configuration, in a temporary folder (2.5 to 5.3 GB), with the tokenizer of
TinyStories. A sensitivity mask at u = 0.001 on a few short sequences, then one round of 2 nodes (one lane, T = 1,
4 rows a batch) on the federation in memory with one engine. Peaks are the resident set (--device cuda: what
the allocator gave) from the start of a part to its end, the model and all libraries included. Prints one JSON line.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.tasks.classification import TASKS
from meerkat_mq.tasks.data import read_texts
from meerkat_mq.worlds.federation import Federation, NodePart
from meerkat_mq.worlds.quiet import quiet

SHARED = Path(os.environ.get("MEERKAT_SHARED", Path(__file__).parents[2] / "shared"))
TOKENIZER = SHARED / "models" / "stories260K"
TEXT = SHARED / "data" / "text" / "c4_sample.jsonl"
NODES, BATCH, STEPS = 2, 4, 3
ROWS = [
    {"sentence": f"a {word} film about a {thing}", "label": label}
    for thing in ("war", "family", "dog", "thief")
    for label, word in enumerate(("dull", "lovely"))
]


def rotary(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


# As published, and the weights masked at u = 0.001.
CONFIGS: dict[str, tuple[Callable[[], Any], int]] = {
    "llama-3.2-1b": (
        lambda: LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
            tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001,
            **rotary(500_000.0, rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=8192),
        ),
        973_040,
    ),
    "qwen2-1.5b": (
        lambda: Qwen2Config(
            vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=True,
            bos_token_id=151643, eos_token_id=151643, **rotary(1_000_000.0),
        ),
        1_310_120,
    ),
    "gemma-2-2b": (
        lambda: Gemma2Config(
            vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, max_position_embeddings=8192, rms_norm_eps=1e-6,
            query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
            tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, **rotary(10_000.0),
        ),
        2_024_178,
    ),
    "tiny": (
        lambda: LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, **rotary(10_000.0),
        ),
        288,
    ),
}  # fmt: skip


def save(name: str, folder: Path, device: str) -> int:
    """A checkpoint with random weights; returns how many."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name][0](), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return int(model.num_parameters())


ResultT = TypeVar("ResultT")


def measured(device: str, part: Callable[[], ResultT]) -> tuple[ResultT, float, int]:
    """(what it gives, seconds, peak bytes)."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
    else:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = part()
    if device != "cpu":
        torch.cuda.synchronize()
        return result, time.perf_counter() - began, torch.cuda.max_memory_allocated()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return result, seconds, 1024 * int(status.split("VmHWM:")[1].split()[0])


def federation(engine: TransformersEngine, mask: Mask) -> Federation:
    """One round of T = 1, not yet started."""
    settings = RoundSettings(
        run_id=hashlib.sha256(b"a billion weights").digest()[:16],
        mask_hash=mask.hash,
        count=1,
        local_steps=1,
        directions=1,
        batch_size=BATCH,
        lr=1e-3,
        eps=1e-3,
        min_nodes=NODES,
        fraction=1.0,
        quorum=1.0,
        deadline_s=60,
        grace_s=2,
        min_updates=1,
    )
    parts = [NodePart(f"node-{n}", engine, ROWS[n::NODES]) for n in range(NODES)]
    return Federation(settings, mask, parts)


@quiet()
def run_round(engine: TransformersEngine, mask: Mask) -> int:
    """The number of updates that the round's entry is made of."""
    run = federation(engine, mask)
    run.start()
    run.run(until=1e6)
    assert len(run.entries) == 1, run.errors
    return len(run.records[0])


def steps(engine: TransformersEngine, mask: Mask) -> None:
    """ZO steps without the round around them: write, losses, write, losses."""
    batch, theta = engine.prepare(ROWS[:BATCH]), mask.theta_0
    for _ in range(2 * STEPS):
        engine.write(theta)
        engine.losses(batch)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    weights = save(args.model, folder, args.device)
    loaded = load_model(folder, dtype="bfloat16", device=args.device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    mask, score_s, score_peak = measured(
        args.device,
        lambda: make_mask(loaded, read_texts(TEXT), sequences=args.sequences, length=args.length),
    )
    assert mask.size == CONFIGS[args.model][1], mask.size
    engine = TransformersEngine(loaded, mask, TASKS["sst2"])
    engine.check(mask)
    engine.losses(engine.prepare(ROWS[:BATCH]))  # first passes are slow
    _, step_s, step_peak = measured(args.device, lambda: steps(engine, mask))
    updates, round_s, round_peak = measured(args.device, lambda: run_round(engine, mask))
    return {
        "model": args.model,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "weights": weights,
        "model_bytes": size,
        "mask_weights": mask.size,
        "score_s": round(score_s, 2),
        "score_peak_bytes": score_peak,
        "score_peak_over_model": round(score_peak / size, 2),
        "accumulator_bytes": 4 * mask.covered,
        "zo_step_s": round(step_s / STEPS, 3),
        "zo_step_peak_bytes": step_peak,
        "round_s": round(round_s, 3),
        "round_peak_bytes": round_peak,
        "updates": updates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="llama-3.2-1b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder))))


if __name__ == "__main__":
    main()
