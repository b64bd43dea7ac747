"""Loading a base model: any causal LM or encoder that transformers knows, from a local folder or a hub id."""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from meerkat_mq.errors import ModelError, ModelNotFound, UnsupportedModel
from meerkat_mq.model.checkpoint import fingerprint, stored_tensors
from meerkat_mq.model.links import is_folder, model_files
from meerkat_mq.model.probes import PROBES
from meerkat_mq.wire.descriptor import Task

Kind = Literal["causal", "encoder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOSSY = {
    torch.float32: {"F64"},
    torch.bfloat16: {"F64", "F32", "F16"},
    torch.float16: {"F64", "F32", "BF16"},
}
_UNUSED = re.compile(r"(^|\.)pooler\.")  # encoders are mean-pooled here


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
    """

    model: Any
    tokenizer: Any
    kind: Kind
    folder: Path
    fingerprint: bytes
    tokenizer_fingerprint: bytes
    exact: bool
    max_tokens: int


def load_model(source: str | Path, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a base model.

    Args:
        source: local folder, or hub id (fetched into, or taken from, the hub cache).
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:<i>".

    Raises:
        ModelNotFound: there is no such folder or hub id, or no safetensors weights in it.
        ModelError: config, weights or tokenizer are damaged, or do not fit each other or this machine.
        UnsupportedModel: neither a causal LM nor an encoder.
    """
    if dtype not in _DTYPES:
        raise ModelError("dtype", f"{dtype!r} is unknown", f"use one of {', '.join(_DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("device", f"{device!r}: torch finds no CUDA device", "use cpu, or install torch with CUDA")
    _quieten()
    folder = find_folder(source)
    stored = {tensor.dtype for tensor in stored_tensors(folder).values()}
    config = _config(folder)
    kind = _kind(config, folder)
    model = _weights(folder, kind, _DTYPES[dtype]).to(device)
    tokenizer = _tokenizer(folder)
    if max(max(ids, default=0) for ids in _ids(tokenizer, PROBES)) >= model.get_input_embeddings().num_embeddings:
        raise ModelError(
            str(folder),
            f"the tokenizer makes ids beyond the {model.get_input_embeddings().num_embeddings} embeddings",
            "put this model's own tokenizer files into the folder",
        )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        folder=folder,
        fingerprint=fingerprint(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        exact=stored.isdisjoint(_LOSSY[_DTYPES[dtype]]),
        max_tokens=min(int(tokenizer.model_max_length), getattr(config, "max_position_embeddings", None) or 2**31),
    )


def find_folder(source: str | Path) -> Path:
    """The local folder of a model; a hub id is fetched, or found in the hub cache.

    Raises:
        ModelNotFound: neither a folder with a config.json nor a hub id that can be resolved.
        ModelError: a link leads out of the folder, as `links.model_files` says.
    """
    folder = Path(source)
    if is_folder(folder):
        if Path("config.json") not in model_files(folder):
            raise ModelNotFound(str(source), "has no config.json", "give the folder of a Hugging Face model")
        return folder
    name = str(source)
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFound(name, "no such folder", "give the folder of a Hugging Face model, or a hub id")
    try:
        found = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            name,
            f"is no folder here, and the hub does not give it ({_first_line(error)})",
            "check the name, or download the model and give its folder",
        ) from error
    model_files(found)
    return found


def _quieten() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _config(folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(str(folder / "config.json"), f"cannot be used ({_first_line(error)})") from error


def _kind(config: Any, folder: Path) -> Kind:
    names = config.architectures or []
    if not names or getattr(config, "is_encoder_decoder", False):
        found = names[0] if names else "no architecture"
        raise UnsupportedModel(
            str(folder / "config.json"), f"{found} is neither a causal LM nor an encoder", "use one of these"
        )
    return "causal" if names[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else "encoder"


def _weights(folder: Path, kind: Kind, dtype: torch.dtype) -> Any:
    family = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    try:
        model, report = family.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, in words
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(str(folder), f"cannot be loaded ({_first_line(error)})", "fetch the model again") from error
    misshapen = {name for name, *_ in report["mismatched_keys"]}
    wrong = sorted(name for name in misshapen.union(report["missing_keys"]) if not _UNUSED.search(name))
    if wrong:
        raise ModelError(
            str(folder), f"the weights lack or misshape {wrong[0]}", "weights and config.json are of different models"
        )
    return model.eval().requires_grad_(False)


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust tokenizers raise bare Exception
        raise ModelError(
            str(folder), f"the tokenizer cannot be loaded ({_first_line(error)})", "add its files to the folder"
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any, task: Task | None = None) -> bytes:
    """32 bytes: SHA-256 over the ids of 64 fixed strings and, with a task, of its label words.

    Each string enters as u32 count, then its u32 ids, little-endian. The masks' fingerprint is the one without a task.
    """
    strings = [*PROBES, *(task.label_words if task else ())]
    digest = hashlib.sha256()
    for ids in _ids(tokenizer, strings):
        digest.update(b"".join(value.to_bytes(4, "little") for value in [len(ids), *ids]))
    return digest.digest()


def _ids(tokenizer: Any, strings: list[str] | tuple[str, ...]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(strings))["input_ids"]]


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


def linear_matrices(model: Any) -> list[str]:
    """Names of the maskable matrices: the keys of `linear_layers`."""
    return list(linear_layers(model))


def all_weights(model: Any) -> dict[str, nn.Parameter]:
    """Every floating-point parameter that passes use, ordered by the bytes of its name; tied ones once."""
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not _UNUSED.search(name)
    }
    return dict(sorted(weights.items(), key=lambda item: item[0].encode()))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
