"""Makes the demo's weights again: `python -m benchmarks.pretrain_demo --out FOLDER`.

A byte-level BPE tokenizer and a Llama of 935,040 parameters, both from generated text alone (`corpus.py`): about five
CPU-minutes. One thread, deterministic algorithms, one seed: the same CPU and torch give the same bits; another CPU or
torch gives the same tokenizer and a model that differs in rounding.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meerkat_mq.demo.corpus import pretraining_text

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_WORDS: Final = r"\d{1,2}| ?[A-Za-z]+| ?[^A-Za-z\d\s]+|\s"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 1
    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 352
    steps: int = 700
    batch: int = 32
    length: int = 128
    lr: float = 3e-3
    warmup: int = 50


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into pairs of digits and starts every text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pretraining_text(recipe.seed, 20_000), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", [(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512
    )


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained float32 Llama with tied embeddings, from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="float32",
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Yields int64 (batch, length) without end: each row starts with a document and is filled up with the next ones."""
    stream = iter(pretraining_text(recipe.seed, 1 << 40))
    while True:
        rows = np.empty((recipe.batch, recipe.length), np.int64)
        for row in rows:
            ids: list[int] = []
            while len(ids) < recipe.length:
                ids += [*tokenizer.encode(next(stream)), tokenizer.eos_token_id]
            row[:] = ids[: recipe.length]
        yield torch.from_numpy(rows)


def train(model: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, console: Console) -> float:
    """Causal-LM training with AdamW, warm-up and cosine decay; returns the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=recipe.warmup / recipe.steps, cycle_momentum=False
    )
    losses: list[float] = []
    for step, ids in zip(range(1, recipe.steps + 1), batches(recipe, tokenizer), strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            console.print(
                f"step {step}/{recipe.steps}  loss {np.mean(losses[-50:]):.4f}  cpu {time.process_time():.0f} s"
            )
    return float(np.mean(losses[-50:]))


def pretrain(recipe: Recipe, out: Path, console: Console) -> float:
    """Makes tokenizer and model and writes them to `out` as a Hugging Face folder; returns the final loss."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    tokenizer = train_tokenizer(recipe)
    model = new_model(recipe)
    loss = train(model, recipe, tokenizer, console)
    save(model, tokenizer, out)
    return loss


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    The tokenizer's configuration is written here since transformers 5 names a class that transformers 4 lacks.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrains the demo's model from generated text.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args()
    console = Console(stderr=True)
    loss = pretrain(Recipe(seed=args.seed, steps=args.steps), args.out, console)
    console.print(f"final loss {loss:.4f}, {time.process_time():.0f} CPU s, written to {args.out}")


if __name__ == "__main__":
    main()
