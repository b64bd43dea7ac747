"""A LoRA adapter as the base of a run: it is merged into a copy of its base model, once.

The weight of each adapted layer becomes W + s·B·A, with s = lora_alpha ÷ r, or lora_alpha ÷ √r where the adapter says
`use_rslora`. It is computed in float64, rank by rank, and rounded to the format in which the base stores W: the same
bits on every machine. So the fingerprint of the merged folder stands for model and adapter, and everything that takes
a model's folder takes this one.

An adapter may come from anybody. Two of its files are read: `adapter_config.json`, and `adapter_model.safetensors`,
which cannot hold code. Its tensors must be A and B of layers that the model has, in their shapes. A setting that would
change the sum above is refused by name; so is each one that is not known here.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.foreign import real_file
from meerkat_mq.engines.torch.adapter import MAX_RANK
from meerkat_mq.engines.torch.checkpoint import (
    StoredTensor,
    cache_folder,
    fingerprint,
    hash_of,
    tensors_in,
    weight_files,
)
from meerkat_mq.engines.torch.export import Change, exported_files, merged, write_changed
from meerkat_mq.engines.torch.folder import ADAPTER, Json, find_folder, is_folder, read_json
from meerkat_mq.engines.torch.kinds import bare_model
from meerkat_mq.engines.torch.names import FLOATS, names_of
from meerkat_mq.errors import ConfigError, ModelError, ModelNotFound, UnsupportedModel, shown

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."  # before the names of all layers, in PEFT's files

_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights"}
# What changes nothing of a trained adapter's sum: where it comes from, how it was trained, and which layers it is for,
# which its tensors say.
_NEEDLESS = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
    "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian")  # others change the base too, such as "pissa" and "loftq"
_MERGE = "merge it by PEFT (merge_and_unload(), then save_pretrained()), and give the merged folder as the model"
_FETCH = "fetch the adapter again"
_CARD = "# A base of a run\n\nA model with a LoRA adapter merged into it, made by Meerkat-MQ.\n"


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of a layer: (r, in) and (out, r)."""

    a: StoredTensor
    b: StoredTensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, looked at: W + `scaling`·B·A for each of the layers in `pairs`, by name."""

    folder: Path
    rank: int
    scaling: float
    pairs: Mapping[str, Pair]


def base_folder(source: str | Path, adapter: str | Path | None, say: Callable[[str], None] = lambda _: None) -> str:
    """The model that a run is based on: the one named, or the folder of model and adapter merged.

    The merged folder lies in the user's cache folder, and is made once.

    Args:
        source: local folder or hub id.
        adapter: folder of a LoRA adapter; None: none.
        say: called with the merged folder, where there is an adapter.

    Raises:
        ModelNotFound, ModelError, UnsupportedModel: as `read_adapter` and `load_model`; or the adapter does not fit the
            model, a merged weight is not finite, or the folder cannot be written.
    """
    if adapter is None:
        return str(source)
    base, found = find_folder(source), read_adapter(Path(adapter))
    changes = _changes(base, found)
    place = _place(base, found)
    if not is_folder(place):
        try:
            write_changed(base, changes, place, _CARD)
        except ModelError:
            if not is_folder(place):  # another process was faster
                raise
    say(str(place))
    return str(place)


def read_adapter(folder: Path) -> Adapter:
    """Look at an adapter's folder.

    Raises:
        ModelNotFound: there is no such folder, or it lacks a file.
        ModelError: a file is damaged or too large, or a tensor is not what the configuration says.
        UnsupportedModel: it is no LoRA adapter, or has a setting that this merge does not follow.
    """
    if not is_folder(folder):
        raise ModelNotFound(
            f"adapter {folder}", "no such folder", "give the folder of a LoRA adapter, as PEFT saves it"
        )
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        if not os.path.lexists(folder / name):
            pickled = name == ADAPTER_WEIGHTS and os.path.lexists(folder / "adapter_model.bin")
            problem = f"has no {name}" + (", but a pickle, which can run code" if pickled else "")
            raise ModelNotFound(str(folder), problem, "save the adapter by PEFT as safetensors")
        real_file(folder / name, folder)
    rank, scaling, targets = _read_settings(folder / ADAPTER, read_json(folder / ADAPTER))
    pairs = _pairs(folder / ADAPTER_WEIGHTS, rank)
    _check_targets(folder, targets, pairs)
    return Adapter(folder, rank, scaling, pairs)


def _read_settings(file: Path, table: Json) -> tuple[int, float, object]:
    """Rank, scaling and target modules, where nothing else would change the sum."""
    if table.get("peft_type") != "LORA":
        raise UnsupportedModel(f"{file}: peft_type", f"is {shown(table.get('peft_type'))}, not LORA", _MERGE)
    start = table.get("init_lora_weights")
    if not any(start is plain or start == plain == "gaussian" for plain in _PLAIN_STARTS):
        raise UnsupportedModel(f"{file}: init_lora_weights", f"{shown(start)} changes the base model too", _MERGE)
    if table.get("bias", "none") != "none":
        raise UnsupportedModel(f"{file}: bias", f"is {shown(table['bias'])}: trained biases are not merged", _MERGE)
    for key, value in table.items():
        if key not in _USED | _NEEDLESS and value:
            raise UnsupportedModel(f"{file}: {shown(key)[1:-1]}", f"is {shown(value)}, which is not supported", _MERGE)
    rank, alpha, rslora = table.get("r"), table.get("lora_alpha"), table.get("use_rslora", False)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise ModelError(f"{file}: r", f"{shown(rank)} is no integer from 1 to {MAX_RANK}", _FETCH)
    if type(alpha) not in (int, float) or not 0 < alpha <= 1e6:  # type: ignore[operator]
        raise ModelError(f"{file}: lora_alpha", f"{shown(alpha)} is no number above 0, up to 1e6", _FETCH)
    if type(rslora) is not bool:
        raise ModelError(f"{file}: use_rslora", f"{shown(rslora)} is neither true nor false", _FETCH)
    assert isinstance(alpha, int | float)
    return rank, alpha / (math.sqrt(rank) if rslora else rank), table.get("target_modules")


def _pairs(file: Path, rank: int) -> dict[str, Pair]:
    found: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors_in(file):
        match = _TENSOR.fullmatch(tensor.name)
        if match is None:
            problem = f"{shown(tensor.name)} is neither A nor B of a linear layer"
            raise UnsupportedModel(str(file), problem, _MERGE)
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2 or tensor.shape[match["part"] == "B"] != rank:
            problem = f"{tensor.name} is {tensor.dtype} {tensor.shape}, and the rank is {rank}"
            raise ModelError(str(file), problem, _FETCH)
        if found.setdefault(match["layer"], {}).setdefault(match["part"], tensor) is not tensor:
            raise ModelError(str(file), f"holds {tensor.name} twice", _FETCH)
    for layer, parts in found.items():
        if len(parts) != 2:
            raise ModelError(str(file), f"holds only {next(iter(parts))} of {layer}", _FETCH)
    if not found:
        raise ModelError(str(file), "holds no tensor", _FETCH)
    return {layer: Pair(parts["A"], parts["B"]) for layer, parts in found.items()}


def _check_targets(folder: Path, targets: object, pairs: Mapping[str, Pair]) -> None:
    """PEFT leaves out what the configuration does not name. An expression is not followed: the tensors decide."""
    where = f"{folder / ADAPTER}: target_modules"
    if targets is None or isinstance(targets, str):
        return
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelError(where, f"{shown(targets)} is no list of names", _FETCH)
    ends = {layer: {".".join(layer.split(".")[at:]) for at in range(layer.count(".") + 1)} for layer in pairs}
    named = set(targets)
    astray = [layer for layer, names in ends.items() if not names & named]
    lacking = sorted(named - set().union(*ends.values()))
    if astray or lacking:
        problem = f"does not name {shown(astray[0])}, which has weights" if astray else ""
        raise ModelError(where, problem or f"names {shown(lacking[0])}, which has no weights", _FETCH)


def _changes(base: Path, adapter: Adapter) -> dict[StoredTensor, Callable[[], Change]]:
    """By the stored tensor, what the adapter makes of it."""
    bare = bare_model(base)
    copies, modules = names_of(bare.model, bare.stored).copies, dict(bare.model.named_modules())
    uses: dict[int, int] = {}
    for _, parameter in bare.model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    changes: dict[StoredTensor, Callable[[], Change]] = {}
    for layer, pair in adapter.pairs.items():
        module, name = modules.get(layer), f"{layer}.weight"
        if not isinstance(module, nn.Linear | Conv1D) or name not in copies:
            what = "no such layer" if module is None else f"a {type(module).__name__} there that cannot be merged into"
            problem = f"adapts {shown(layer)}, and {base} has {what}"
            raise UnsupportedModel(str(adapter.folder), problem, "give the model that the adapter was trained on")
        if uses[id(module.weight)] > 1:
            problem = f"adapts {layer}, whose weight another layer of the model shares"
            raise UnsupportedModel(str(adapter.folder), problem, _MERGE)
        shape = (pair.b.shape[0], pair.a.shape[1])
        transposed = isinstance(module, Conv1D)
        for tensor in copies[name]:
            if tensor.shape != (shape[::-1] if transposed else shape) or tensor.dtype not in FLOATS:
                problem = f"has {shape} for {layer}, and the model's weight is {tensor.dtype} {tensor.shape}"
                raise ModelError(str(adapter.folder), problem, "give the model that the adapter was trained on")
            changes[tensor] = partial(_change, adapter, pair, tensor, transposed=transposed)
    return changes


def _change(adapter: Adapter, pair: Pair, tensor: StoredTensor, *, transposed: bool) -> Change:
    with np.errstate(all="ignore"):
        change = merged(tensor, _values(pair.a), _values(pair.b), adapter.scaling, transposed=transposed)
    if not bool(torch.from_numpy(change.after).to(FLOATS[tensor.dtype]).isfinite().all()):
        problem = f"makes weights of {tensor.name} that {tensor.dtype} cannot hold"
        raise ModelError(str(adapter.folder), problem, "check the adapter, or use a base in another format")
    return change


def _values(tensor: StoredTensor) -> Float32Array:
    values: Any = torch.from_numpy(tensor.read("u1")).view(FLOATS[tensor.dtype]).float().reshape(tensor.shape)
    found: Float32Array = values.numpy()
    return found


def _place(base: Path, adapter: Adapter) -> Path:
    """Where the merged folder lies: its name tells everything that goes into it."""
    root = cache_folder()
    if root is None:
        raise ConfigError("adapter", "this user has no cache folder to merge it in", "set XDG_CACHE_HOME to a folder")
    tensors = {tensor.name: tensor for pair in adapter.pairs.values() for tensor in (pair.a, pair.b)}
    digest = hashlib.sha256(fingerprint(base) + hash_of(dict(sorted(tensors.items()))))
    digest.update(repr(adapter.scaling).encode())
    weights = {file.relative_to(base) for file in weight_files(base)}
    for name, file in sorted(exported_files(base).items()):
        if name not in weights:
            digest.update(f"\0{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return root / "merged" / digest.hexdigest()[:32]
