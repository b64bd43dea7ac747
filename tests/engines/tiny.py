"""Tiny random models with a small tokenizer of their own."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from meerkat_mq.tasks.classification import Classification

VOCABULARY = 320
SMALL: dict[str, Any] = {"sequences": 4, "length": 16}  # calibration text
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TEXTS = [
    f"The {colour} {thing} in the {place} was {state} when the {person} came back on {day}."
    for colour in ("red", "green", "blue")
    for thing in ("pump", "valve", "motor", "fan")
    for place, person in (("cellar", "farmer"), ("attic", "plumber"), ("yard", "driver"))
    for state, day in (("broken", "Monday"), ("running", "Friday"))
]
ROWS = [{"line": text, "label": int("running" in text)} for text in TEXTS]
TASK = Classification(
    name="state",
    fields=("line",),
    template="{line} The thing is",
    label_words=(" broken", " running"),
    text="{line}",
    descriptions=("something broken", "something running"),
    max_tokens=48,
)


def tokenizer(*, vocabulary: int = VOCABULARY, start: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on TEXTS; `start` puts <s> before every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if start:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def llama(**changes: Any) -> Any:
    """Random, 2 layers, hidden size 32; weights larger than by default, so that scores differ."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def gpt2() -> Any:
    """As `llama`; its linear layers are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def bert() -> Any:
    """As `llama`; an encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return BertModel(config)


def save(model: Any, folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A Hugging Face folder of the model and its tokenizer."""
    model.to(dtype).save_pretrained(folder, **settings)
    tokenizer(start=not isinstance(model, GPT2LMHeadModel)).save_pretrained(folder)
    return folder


def change(file: Path, **keys: Any) -> None:
    """Put keys into a JSON file, which is made where there is none."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | keys))


def rename(folder: Path, how: Callable[[str], str], **more: torch.Tensor) -> None:
    """Give a checkpoint's tensors other names, and add some."""
    tensors = {how(name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file of a folder: mode, links, bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        held = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(held.st_mode) else b""
        found[str(path)] = (held.st_mode, held.st_nlink, data)
    return found
