"""Loading a base model: any causal LM or encoder that transformers knows, from a local folder or a hub id."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from meerkat_mq.engines.torch.checkpoint import fingerprint, stored_tensors
from meerkat_mq.engines.torch.fit import NEEDLESS, check_fit, mismatch
from meerkat_mq.engines.torch.folder import CONFIG, find_folder
from meerkat_mq.engines.torch.in_words import in_words
from meerkat_mq.engines.torch.kinds import Kind, class_of, kind_of, read_config, skeleton
from meerkat_mq.engines.torch.names import Names, names_of
from meerkat_mq.engines.torch.tokenizer_trial import PROBES
from meerkat_mq.engines.torch.tokens import (
    added_around,
    check_ids,
    ids_of,
    once,
    prompt_ids,
    read_tokenizer,
    usable_tokens,
)
from meerkat_mq.engines.torch.trial import try_out
from meerkat_mq.errors import ModelError, UnsupportedModel, cut, printable
from meerkat_mq.tasks.task import Task

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLER = "use another device, a smaller dtype, or a smaller model"
_LOSSY = {
    torch.float32: {"F64"},
    torch.bfloat16: {"F64", "F32", "F16"},
    torch.float16: {"F64", "F32", "BF16"},
}

_TRIAL = "The quick brown fox jumps over the lazy dog, and over the cat that has slept in its place since noon"
_TRIED = 16  # tokens, or as many as the model holds: kernels for shorter texts hide some numbers that are not finite
STEPS = ("folder", "weights", "kind", "tokenizer", "names", "dtype", "trial")
Say = Callable[[str, str], None]


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready for passes: evaluation mode, no gradients.

    Attributes:
        model: a transformers model.
        tokenizer: its tokenizer; pads on the right.
        kind: "causal" (has a language-model head) or "encoder" (mean-pooled).
        folder: the checkpoint.
        fingerprint: 32 bytes, of the checkpoint's tensors.
        tokenizer_fingerprint: 32 bytes, without label words.
        exact: whether the model's dtype holds every stored weight without loss.
        max_tokens: longest input in tokens.
        start: the ids that stand before every text.
        names: which tensors of the checkpoint hold which parameter.
        notes: what a user should know: a head that is left out, an end token that is dropped.
    """

    model: Any
    tokenizer: Any
    kind: Kind
    folder: Path
    fingerprint: bytes
    tokenizer_fingerprint: bytes
    exact: bool
    max_tokens: int
    start: tuple[int, ...]
    names: Names
    notes: tuple[str, ...]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that a causal LM continues: start tokens once, and nothing after the last token of the text."""
        return prompt_ids(self.tokenizer, self.start, texts)


def set_threads(count: int) -> None:
    """CPU threads for all models of this process."""
    torch.set_num_threads(count)


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    finite: bool = True,
    say: Say = lambda *_: None,
) -> LoadedModel:
    """Load a base model, after a look at all that could go wrong with it later.

    Args:
        source: local folder, or hub id (fetched into, or taken from, the hub cache).
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:<i>".
        finite: refuse a model whose numbers are not; a ruined export is proven as it is.
        say: called after each of STEPS, in their order, with what was found.

    Raises:
        ModelNotFound: there is no such folder or hub id, or no safetensors weights in it.
        ModelError: config, weights or tokenizer are damaged, or do not fit each other or this machine; the folder holds
            code, or files that would be picked up beside the model.
        UnsupportedModel: neither a causal LM nor an encoder, or quantised.
    """
    if dtype not in _DTYPES:
        raise ModelError("dtype", f"{dtype!r} is unknown", f"use one of {', '.join(_DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("device", f"{device!r}: torch finds no CUDA device", "use cpu, or install torch with CUDA")
    _quieten()
    folder = find_folder(source)
    say("folder", f"{folder}: nothing in it but a model")
    stored = stored_tensors(folder)
    held = {tensor.dtype for tensor in stored.values()}
    say("weights", f"{len(stored)} tensors in {', '.join(sorted(held))}")
    config = read_config(folder, len(stored))
    kind = kind_of(config, folder)
    bare = skeleton(config, kind, folder, len(stored))
    say("kind", f"{'causal LM' if kind == 'causal' else 'encoder'}, {type(bare).__name__}")
    tokenizer = read_tokenizer(folder, kind)
    check_ids(tokenizer, _embeddings(bare, folder), folder)
    before, after = added_around(tokenizer, folder)
    notes = _additions(tokenizer, kind, before, after)
    longest = usable_tokens(tokenizer, config, bare, folder)
    say("tokenizer", "; ".join([f"{len(tokenizer):,} tokens, {longest:,} positions", *notes]))
    names = names_of(bare, stored)
    left_out = _left_out(check_fit(names, stored, bare, folder))
    say("names", "; ".join([f"{len(names.copies):,} parameters found in the checkpoint", *left_out]))
    model = _weights(folder, kind, _DTYPES[dtype], config)
    with in_words(str(folder), f"cannot be moved to {device}", _SMALLER):
        model = model.to(device)
    exact = held.isdisjoint(_LOSSY[_DTYPES[dtype]])
    say("dtype", f"{dtype} {'holds every weight exactly' if exact else 'rounds weights: masks need another'}")
    try_out(model, kind, ids_of(tokenizer, [_TRIAL])[0][: min(_TRIED, longest)], folder, finite=finite)
    say("trial", "a short pass gives finite numbers")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        folder=folder,
        fingerprint=fingerprint(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        exact=exact,
        max_tokens=longest,
        start=once(before),
        names=names,
        notes=notes + left_out,
    )


def _quieten() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # about keys of older models
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, it raises too
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _embeddings(bare: Any, folder: Path) -> int:
    """How many tokens the model knows."""
    count = getattr(bare.get_input_embeddings(), "num_embeddings", None)
    if count is None:
        problem = f"{type(bare).__name__} has no plain table of embeddings"
        raise UnsupportedModel(f"{folder / CONFIG}: model_type", problem, "use another model")
    return int(count)


def _additions(tokenizer: Any, kind: Kind, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[str, ...]:
    """What the tokenizer adds to a text and a causal LM does not get; an encoder's own marks are right."""
    notes = []
    if kind == "causal" and after:
        tokens = printable(cut(" ".join(tokenizer.convert_ids_to_tokens(list(after)))))
        notes.append(f"the tokenizer appends {tokens} to every text: it is dropped, for prompts go on")
    if kind == "causal" and once(before) != before:
        notes.append("the tokenizer starts a text twice: one start token is dropped")
    return tuple(notes)


def _left_out(unused: list[str]) -> tuple[str, ...]:
    """A trained head, or whatever else of the checkpoint the model has no place for."""
    some = ", ".join(unused[:3]) + (" …" if len(unused) > 3 else "")
    return (f"{len(unused)} tensors are left out, such as a head trained for something else: {some}",) if unused else ()


def _weights(folder: Path, kind: Kind, dtype: torch.dtype, config: Any) -> Any:
    with in_words(str(folder), "cannot be loaded", "fetch the model again"):
        model, report = class_of(kind).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            generation_config=transformers.GenerationConfig(),  # else its file would be read, which nothing here needs
            ignore_mismatched_sizes=True,  # reported below, in words
            output_loading_info=True,
        )
    misshapen = {name for name, *_ in report["mismatched_keys"]}
    wrong = sorted(name for name in misshapen.union(report["missing_keys"]) if not NEEDLESS.search(name))
    if wrong:
        raise mismatch(wrong[0], folder)
    return model.eval().requires_grad_(False)


def tokenizer_fingerprint(tokenizer: Any, task: Task | None = None) -> bytes:
    """32 bytes: SHA-256 over the ids of 64 fixed strings and, with a task, of its label words.

    Each string enters as u32 count, then its u32 ids, little-endian, with all that the tokenizer adds. The masks'
    fingerprint is the one without a task.
    """
    strings = [*PROBES, *(task.candidates if task else ())]
    digest = hashlib.sha256()
    for ids in ids_of(tokenizer, strings):
        digest.update(b"".join(value.to_bytes(4, "little") for value in [len(ids), *ids]))
    return digest.digest()


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the repeated blocks (attention and MLP projections), by their weight's name.

    Names are those of `named_parameters()`, ordered by their bytes. Embeddings, norms, biases, poolers and the output
    head lie outside the blocks; transformers' Conv1D counts as linear.

    Raises:
        UnsupportedModel: fused 3-D experts, quantised weights, or no such layer at all.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if not any(part.isdigit() for part in path.split(".")) or module is model.get_output_embeddings():
            continue
        own = dict(module.named_parameters(recurse=False))
        fused = [name for name, weight in own.items() if weight.ndim == 3 and not isinstance(module, nn.Conv1d)]
        if fused:
            raise UnsupportedModel(f"{path}.{fused[0]}", "fused 3-D experts are not supported", "use a dense model")
        if isinstance(module, nn.Linear | Conv1D):
            if not own["weight"].is_floating_point():
                raise UnsupportedModel(f"{path}.weight", "is quantised", "use an unquantised checkpoint")
            layers[names[id(own["weight"])]] = module
    if not layers:
        raise UnsupportedModel(type(model).__name__, "has no linear layers in repeated blocks", "use a transformer")
    return dict(sorted(layers.items(), key=lambda item: item[0].encode()))


def all_weights(model: Any) -> dict[str, nn.Parameter]:
    """Every floating-point parameter that passes use, ordered by the bytes of its name; tied ones once."""
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not NEEDLESS.search(name)
    }
    return dict(sorted(weights.items(), key=lambda item: item[0].encode()))
