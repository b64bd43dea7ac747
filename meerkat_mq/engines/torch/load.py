"""Loading a base model: any causal LM or encoder that transformers knows, from a local folder or a hub id."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from meerkat_mq.config import WeightKind
from meerkat_mq.engines.torch.checkpoint import fingerprint
from meerkat_mq.engines.torch.folder import CONFIG, find_folder, in_words, key_of, read_json
from meerkat_mq.engines.torch.kinds import MAKING, RESTORE, Kind, bare_model, class_of
from meerkat_mq.engines.torch.names import NEEDLESS, Names, check_fit, mismatch, names_of
from meerkat_mq.engines.torch.tokenizer_trial import PROBES, fingerprint_of
from meerkat_mq.engines.torch.tokens import ids_of, read_tokens
from meerkat_mq.engines.torch.widen import widen
from meerkat_mq.errors import ModelError, UnsupportedModel
from meerkat_mq.tasks.task import Task

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLER = "use another device, a smaller dtype, or a smaller model"
_LOSSY = {"float32": {"F64"}, "bfloat16": {"F64", "F32", "F16"}, "float16": {"F64", "F32", "BF16"}}

_TRIAL = "The quick brown fox jumps over the lazy dog, and over the cat that has slept in its place since noon"
_TRIED = 16  # tokens, or as many as the model holds: kernels for shorter texts hide some numbers that are not finite
STEPS = ("folder", "weights", "kind", "tokenizer", "names", "dtype", "trial")
Say = Callable[[str, str], None]


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready for passes: evaluation mode, no gradients.

    Attributes:
        model, tokenizer: of transformers; the tokenizer pads on the right.
        kind: "causal" (has a language-model head) or "encoder" (mean-pooled).
        folder: the checkpoint.
        fingerprint, tokenizer_fingerprint: 32 bytes each, of the checkpoint's tensors and, without a task, of that.
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
        dtype: "float32", "bfloat16" or "float16", in which weights are stored; passes are float32 (`widen`).
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
    quieten()
    folder = find_folder(source)
    say("folder", f"{folder}: nothing in it but a model")
    bare = bare_model(folder, say)
    tokens = read_tokens(folder, bare)
    say("tokenizer", "; ".join([f"{len(tokens.tokenizer):,} tokens, {tokens.longest:,} positions", *tokens.notes]))
    names = names_of(bare.model, bare.stored)
    left_out = _left_out(check_fit(names, bare.model, folder))
    say("names", "; ".join([f"{len(names.copies):,} parameters found in the checkpoint", *left_out]))
    model = _weights(folder, bare.kind, _DTYPES[dtype], bare.config)
    with in_words(str(folder), f"cannot be moved to {device}", _SMALLER):
        model = model.to(device)
    widen(model)
    exact = _LOSSY[dtype].isdisjoint(tensor.dtype for tensor in bare.stored.values())
    say("dtype", f"{dtype} {'holds every weight exactly' if exact else 'rounds weights: masks need another'}")
    ids = ids_of(tokens.tokenizer, [_TRIAL])[0]
    _try_out(model, bare.kind, ids[: min(_TRIED, tokens.longest)], folder, finite=finite)
    say("trial", "a short pass gives finite numbers")
    return LoadedModel(
        model=model,
        tokenizer=tokens.tokenizer,
        kind=bare.kind,
        folder=folder,
        fingerprint=fingerprint(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(tokens.tokenizer),
        exact=exact,
        max_tokens=tokens.longest,
        start=tokens.start,
        names=names,
        notes=tokens.notes + left_out,
    )


def quieten() -> None:
    """Let transformers print nothing: what it logs as an error, it raises too."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # about keys of older models
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _left_out(unused: list[str]) -> tuple[str, ...]:
    """A trained head, or whatever else of the checkpoint the model has no place for."""
    some = ", ".join(unused[:3]) + (" …" if len(unused) > 3 else "")
    return (f"{len(unused)} tensors are left out, such as a head trained for something else: {some}",) if unused else ()


def _weights(folder: Path, kind: Kind, dtype: torch.dtype, config: Any) -> Any:
    with MAKING, in_words(str(folder), "cannot be loaded", "fetch the model again"):
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


def _try_out(model: Any, kind: Kind, ids: list[int], folder: Path, *, finite: bool) -> None:
    """Run the model on two short texts that differ in their last token.

    What a configuration gets wrong shows here, not at step k: a pass that fails, numbers that are not finite (where
    `finite` says that they must be), a causal LM that sees later tokens, a model that needs more than tokens.
    """
    texts = torch.tensor([ids, [*ids[:-1], ids[0]]], device=model.device)
    with in_words(partial(_place, folder / CONFIG), "the model does not run", RESTORE), torch.inference_mode():
        if kind == "causal":
            out = model(input_ids=texts, use_cache=False).logits.float()
        else:
            out = model(input_ids=texts, attention_mask=torch.ones_like(texts)).last_hidden_state.float()
    if not bool(out.isfinite().all()):
        if not finite:
            return
        dtype = str(model.dtype).removeprefix("torch.")
        remedy = "use bfloat16 or float32; if so already, " + RESTORE
        raise ModelError(str(folder), f"gives numbers that are not finite in {dtype}", remedy)
    earlier = out[:, :-1]
    if kind == "causal" and not torch.allclose(earlier[0], earlier[1], rtol=1e-2, atol=1e-2 * float(out.std())):
        remedy = "use a causal LM; of an encoder, one of a family that has encoders only, such as BERT"
        if hasattr(model.config, "is_decoder"):
            remedy = "set is_decoder to true, if it was trained as one"
        problem = f"{type(model).__name__} sees later tokens, so it is no causal LM"
        raise UnsupportedModel(f"{folder / CONFIG}: architectures", problem, remedy)


def _place(file: Path, said: str) -> str:
    key = key_of(said, read_json(file))
    return f"{file}: {key}" if key else str(file)


def tokenizer_fingerprint(tokenizer: Any, task: Task | None = None) -> bytes:
    """32 bytes: SHA-256 over the ids of 64 fixed strings and, with a task, of its label words.

    Each string enters with all that the tokenizer adds. The masks' fingerprint is the one without a task.
    """
    strings = [*PROBES, *(task.candidates if task else ())]
    return fingerprint_of(ids_of(tokenizer, strings))


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


def weight_kinds(model: Any) -> dict[str, WeightKind]:
    """Each parameter's kind, by its name.

    "linear" as in `linear_layers`; "embedding" where any module looks its rows up by token or position, also if it is
    tied to a linear head; else "other": norms, biases, heads.
    """
    looked_up = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    try:
        linear = linear_layers(model)
    except UnsupportedModel:  # which takes masks of whole models only
        linear = {}
    return {
        name: "embedding" if id(parameter) in looked_up else "linear" if name in linear else "other"
        for name, parameter in model.named_parameters()
    }


def all_weights(model: Any) -> dict[str, nn.Parameter]:
    """Every floating-point parameter that passes use, ordered by the bytes of its name; tied ones once."""
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not NEEDLESS.search(name)
    }
    return dict(sorted(weights.items(), key=lambda item: item[0].encode()))
