"""LoRA adapters (arXiv 2106.09685), through `peft`: what a mask of the method "lora" stands for.

An adapter adds 2·B·A to the weight of each query and value projection. Its trainable vector is all of A and B. Names
and shapes say all that is needed to build one, so nothing but the mask travels.
"""

import copy
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.load import LoadedModel, linear_layers
from meerkat_mq.errors import MaskError, ModelMismatch, UnsupportedModel
from meerkat_mq.extras import importing

SCALING = 2.0  # peft's lora_alpha ÷ r; MeZO (arXiv 2305.17333) has 16 ÷ 8
MAX_RANK = 256

_SEED = 0
_QUERY_AND_VALUE = {"q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "q", "v"}
_FUSED = {"c_attn", "query_key_value", "qkv_proj", "Wqkv"}  # query, key and value are one matrix
_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.default\.weight")

Shape = tuple[int, ...]


def new_adapter(loaded: LoadedModel, rank: int, among: Collection[str] | None = None) -> LoadedModel:
    """The model with a fresh adapter on its query and value projections, `among` those with these weights, by name.

    `loaded` stays as it is; weights are shared.

    B = 0. A is Gaussian, as in arXiv 2106.09685, section 4.1, with the standard deviation of peft's and MeZO's own
    start, 1 ÷ √(3·in): slices of direction stream mk1, seed 0, matrix after matrix: the same bits on all machines.

    Raises:
        MaskError: the rank is out of range.
        UnsupportedModel: no layer is named like a query or value projection.
        MissingExtra: peft is not installed.
    """
    if not 1 <= rank <= MAX_RANK:
        raise MaskError("rank", f"{rank} is outside 1…{MAX_RANK}", "8 is common")
    names = [name for name in linear_layers(loaded.model) if among is None or name in among]
    layers = [name.removesuffix(".weight") for name in names]
    chosen = [layer for layer in layers if layer.rpartition(".")[2] in _QUERY_AND_VALUE | _FUSED]
    if not chosen:
        found = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        where = f"{loaded.folder}: {type(loaded.model).__name__}"
        problem = "has no linear layer named like a query or value projection"
        raise UnsupportedModel(where, problem, f"its layers are {found}; use another method")
    return _with_layers(loaded, chosen, rank)


def with_adapter(loaded: LoadedModel, mask: Mask) -> LoadedModel:
    """The model that the mask's names and shapes speak of: with their adapter, or `loaded` itself where there is none.

    Raises:
        ModelMismatch: the adapter does not fit the model, or the mask does not hold it whole.
        MissingExtra: peft is not installed.
    """
    pairs = adapter_pairs(mask)
    if not pairs or mask.matrices[0].name in dict(loaded.model.named_parameters()):
        return loaded
    found = dict(loaded.model.named_modules())
    ranks = {rank for rank, _, _ in pairs.values()}
    for layer, (_, *ends) in pairs.items():
        if sorted(ends) != sorted(getattr(getattr(found.get(layer), "weight", None), "shape", ())):
            problem = f"has no layer {layer} for the mask's adapter"
            raise ModelMismatch(str(loaded.folder), problem, "give the run's base model")
    if len(ranks) != 1:
        raise ModelMismatch(str(loaded.folder), f"the mask's adapter has ranks {sorted(ranks)}", "make the mask again")
    return _with_layers(loaded, list(pairs), ranks.pop())


def adapter_pairs(mask: Mask) -> dict[str, tuple[int, int, int]]:
    """By the adapted layer's name: rank, inputs, outputs. Empty where the mask is none of an adapter.

    Raises:
        ModelMismatch: the mask holds an adapter only in part.
    """
    shapes: dict[str, dict[str, Shape]] = {}
    for matrix in mask.matrices:
        match = _ADAPTER.fullmatch(matrix.name)
        if match is not None and len(matrix.shape) == 2 and matrix.indices.size == np.prod(matrix.shape):
            shapes.setdefault(match["layer"], {})[match["part"]] = matrix.shape
        elif shapes or match is not None:
            raise ModelMismatch("mask", f"holds no whole adapter: {matrix.name}", "make the mask again")
    pairs = {}
    for layer, parts in shapes.items():
        a, b = parts.get("A", (0, 0)), parts.get("B", (0, 0))
        if not 1 <= a[0] == b[1] <= MAX_RANK:
            raise ModelMismatch("mask", f"A {a} and B {b} of {layer} do not fit", "make the mask again")
        pairs[layer] = (a[0], a[1], b[0])
    return pairs


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """All of A and B by their names, ordered by the bytes of these."""
    weights = {name: weight for name, weight in model.named_parameters() if _ADAPTER.fullmatch(name)}
    return dict(sorted(weights.items(), key=lambda item: item[0].encode()))


def _with_layers(loaded: LoadedModel, layers: list[str], rank: int) -> LoadedModel:
    with importing("lora", "a LoRA adapter"):
        import peft  # noqa: PLC0415

    shared = itertools.chain(loaded.model.parameters(), loaded.model.buffers())
    model = copy.deepcopy(loaded.model, {id(tensor): tensor for tensor in shared})
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=int(SCALING * rank),
        lora_dropout=0.0,
        target_modules=layers,
        fan_in_fan_out=isinstance(model.get_submodule(layers[0]), Conv1D),
    )
    model = peft.inject_adapter_in_model(config, model).eval().requires_grad_(False)
    _start(adapter_weights(model), loaded.model.device)
    return replace(loaded, model=model)


def _start(weights: Mapping[str, Tensor], device: torch.device) -> None:
    """B = 0 and A from the direction stream; float32 whatever the model's dtype, so that no perturbation is rounded."""
    start = 0
    for name, weight in weights.items():
        value = np.zeros(weight.shape, np.float32)
        if ".lora_A." in name:
            z = direction("mk1", _SEED, start, start + weight.numel()).reshape(weight.shape)
            value = z * np.float32((3 * weight.shape[1]) ** -0.5)
            start += weight.numel()
        weight.data = torch.from_numpy(value).to(device)
