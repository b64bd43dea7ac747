"""The files of a model folder that say what the model is: samples of each kind, and mutants of them."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import tiny
from tests.fuzz.model_keys import CONFIG, HEADER, INDEX, TOKENIZER, TOKENIZER_CONFIG
from tests.fuzz.mutate import mutant
from tests.fuzz.mutate_json import ELSEWHERE, Keys, json_mutant

BESIDE: Mapping[str, Mapping[str, Any]] = {
    "special_tokens_map.json": {"bos_token": "<s>", "pad_token": {"content": "<pad>", "lstrip": False}},
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True, "max_length": 4096},
    "added_tokens.json": {"<new>": 320, "<s>": 0},
    "vocab.json": {"a": 0, "b": 1},
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "processor_config.json": {"processor_class": "LlavaProcessor", "auto_map": {"AutoProcessor": "code.P"}},
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "size": 224},
    "sentence_bert_config.json": {"max_seq_length": 256},
    "adapter_config.json": {"base_model_name_or_path": ELSEWHERE, "peft_type": "LORA"},
    "quantize_config.json": {"bits": 4},
    "tokenizer.model": {"x": 1},
    "merges.txt": {"#version": 0.2},
}


@dataclass(frozen=True)
class Mutant:
    """A damaged file of a model folder."""

    number: int
    folder: Path
    file: Path
    data: bytes


def _bytes(name: str, sample: bytes, keys: Keys, number: int) -> bytes:
    """Damaged in its bytes, or, three times of four, in what it says."""
    if random.Random(f"{name} {number} how").random() < 0.25:
        return mutant(name, [sample], number)
    return json_mutant(name, json.loads(sample), keys, number)


def _beside(number: int) -> tuple[str, bytes]:
    name = list(BESIDE)[number // 2 % len(BESIDE)]
    return name, _bytes(name, json.dumps(BESIDE[name]).encode(), TOKENIZER_CONFIG, number)


def _with_header(sample: bytes, number: int) -> bytes:
    """Another header before the same weights; now and then with another length."""
    end = 8 + int.from_bytes(sample[:8], "little")
    header = _bytes("header", sample[8:end], HEADER, number)
    length = len(header) if number % 16 else random.Random(number).choice((0, 1, len(header) - 1, 2**31, 2**64 - 1))
    return length.to_bytes(8, "little") + header + sample[end:]


Make = Callable[[Path, Path, int], tuple[str, bytes]]  # of a good folder whole, and in shards
KINDS: Mapping[str, Make] = {
    "config.json": lambda whole, _, number: (
        "config.json", _bytes("config", (whole / "config.json").read_bytes(), CONFIG, number)
    ),
    "tokenizer_config.json": lambda whole, _, number: (
        "tokenizer_config.json",
        _bytes("tc", (whole / "tokenizer_config.json").read_bytes(), TOKENIZER_CONFIG, number),
    ),
    "tokenizer.json": lambda whole, _, number: (
        "tokenizer.json", _bytes("tokenizer", (whole / "tokenizer.json").read_bytes(), TOKENIZER, number)
    ),
    "model.safetensors.index.json": lambda _, shards, number: (
        "model.safetensors.index.json",
        _bytes("index", (shards / "model.safetensors.index.json").read_bytes(), INDEX, number),
    ),
    "model.safetensors": lambda whole, _, number: (
        "model.safetensors", _with_header((whole / "model.safetensors").read_bytes(), number)
    ),
    "beside": lambda whole, shards, number: _beside(number),
}  # fmt: skip


def good_folders(root: Path) -> None:
    """The smallest models: a causal LM and an encoder, each whole and in shards."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = {"causal": tiny.llama(**sizes, num_key_value_heads=1), "encoder": tiny.bert()}
    for name, model in made.items():
        tiny.save(model, root / name)
        tiny.save(model, root / f"{name}-shards", max_shard_size="20KB")


def make_mutant(kind: str, good: Path, work: Path, number: int) -> Mutant:
    """The mutant of a kind with this number; it is not written.

    Args:
        kind: of KINDS.
        good: where `good_folders` were made.
        work: where copies of them are, for the mutant to be put into.
        number: which.
    """
    model = "causal" if number % 2 else "encoder"
    whole, shards = good / model, good / f"{model}-shards"
    name, data = KINDS[kind](whole, shards, number)
    folder = work / (shards if kind == "model.safetensors.index.json" else whole).name
    return Mutant(number, folder, folder / name, data)
