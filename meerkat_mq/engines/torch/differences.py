"""Exports of what training changed, without the base: sparse values, or an adapter of Hugging Face PEFT.

Of the forms that PEFT knows, two can hold a run:

- A mask of the method `lora` is a LoRA adapter: all of A and B are written as they are.
- A sparse mask of linear layers is a SHiRA adapter (Sparse High Rank Adapters, arXiv 2406.13175): PEFT adds single
  values to W at stored places. It adds, where we assign: d = θ − θ_0 is rounded to float32, and so is W + d. What comes
  out is counted here, value by value. A LoRA of low rank could only approximate such a difference, so none is made.

SHiRA wants r·(in + out) values in every layer, with one r. Layers with fewer are filled up with zeros.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.engines.torch.adapter import SCALING, adapter_pairs
from meerkat_mq.engines.torch.export import CARD, base_of, check_size, whole_folder, writing_in
from meerkat_mq.engines.torch.folder import ADAPTER
from meerkat_mq.engines.torch.kinds import bare_model
from meerkat_mq.engines.torch.merge import ADAPTER_WEIGHTS, PREFIX
from meerkat_mq.engines.torch.names import FLOATS, stored_copies
from meerkat_mq.errors import ModelError, UnsupportedModel

DELTA: Final = "delta.safetensors"

Card = Callable[[str], str]
Tensors = dict[str, npt.NDArray[Any]]

_WHOLE = "export the whole model instead: --as model"
_WITHOUT_MASK = "stored"  # as SHiRA's kind of mask: PEFT then draws none, and takes the places from the file


@dataclass(frozen=True, slots=True)
class Held:
    """How well a sum gives back theta: of `weights`, so many are `apart`, by `most` at most."""

    weights: int
    apart: int
    most: float

    def __str__(self) -> str:
        if not self.apart:
            return f"PEFT's sum of base and adapter gives all {self.weights:,} trained weights bit for bit."
        return (
            f"PEFT's sum of base and adapter gives {self.weights - self.apart:,} of {self.weights:,} trained weights "
            f"bit for bit. The others differ by rounding, by {self.most:.1e} at most."
        )


def export_delta(source: str | Path, mask: Mask, theta: Float32Array, out: Path, card: Card) -> str:
    """Write the trained weights alone: `delta.safetensors`, with the indices and values of each parameter.

    Values are theta, float32: they take the place of what the base holds. Indices are those of the flattened
    parameter, int32, or int64 where it is too large for that.

    Args:
        source, mask, theta, out: as `export_model`.
        card: makes the README.md, of what the export says of itself.

    Returns:
        What the export says of itself: nothing.

    Raises:
        ModelError: as `export_model`; or the mask is an adapter's, whose difference is not sparse.
        ModelNotFound, ModelMismatch: as `export_model`.
    """
    folder = base_of(source, mask)
    check_size(mask, theta)
    if adapter_pairs(mask):
        problem = "an adapter changes whole matrices: there is no sparse difference"
        raise ModelError("--as delta", problem, "use --as peft, which holds the adapter exactly, or --as model")
    tensors = Tensors()
    for matrix, part in mask.slices():
        small = np.prod(matrix.shape, dtype=object) < 2**31
        tensors[f"{matrix.name}.indices"] = matrix.indices.astype(np.int32 if small else np.int64)
        tensors[f"{matrix.name}.values"] = theta[part]
    _write(out, folder, {DELTA: save(tensors, {"format": "pt"})}, card(""))
    return ""


def export_peft(source: str | Path, mask: Mask, theta: Float32Array, out: Path, card: Card) -> str:
    """Write an adapter that `PeftModel.from_pretrained` adds to the base: LoRA of an adapter's mask, else SHiRA.

    Args: as `export_delta`.

    Returns:
        What the export says of itself: how exactly it holds theta.

    Raises:
        UnsupportedModel: no form of PEFT holds these weights.
        ModelError, ModelNotFound, ModelMismatch: as `export_model`.
    """
    folder = base_of(source, mask)
    check_size(mask, theta)
    pairs = adapter_pairs(mask)
    if pairs:
        tensors = _lora(mask, theta)
        ranks = sorted({rank for rank, _, _ in pairs.values()})
        layers, settings = list(pairs), {"peft_type": "LORA", "r": ranks[0], "lora_alpha": int(SCALING * ranks[0])}
        settings |= {"lora_dropout": 0.0, "bias": "none"}
        said = "It is a LoRA adapter, and holds the trained A and B bit for bit."
    else:
        layers = [matrix.name.removesuffix(".weight") for matrix in mask.matrices]
        rank = _check_shira(folder, mask, layers)
        tensors, held = _shira(folder, mask, theta, rank)
        settings = {"peft_type": "SHIRA", "r": rank, "mask_type": _WITHOUT_MASK}
        said = f"It is a SHiRA adapter: single values, added to the base's. {held}"
    settings |= {"target_modules": layers, "fan_in_fan_out": bool(pairs) and _transposed(folder, layers[0])}
    settings |= {"base_model_name_or_path": None if folder == Path(source) else str(source), "inference_mode": True}
    files = {ADAPTER: json.dumps(settings, indent=1).encode(), ADAPTER_WEIGHTS: save(tensors, {"format": "pt"})}
    _write(out, folder, files, card(said))
    return said


def _write(out: Path, base: Path, files: Mapping[str, bytes], card: str) -> None:
    with whole_folder(out, base) as new:
        for name, data in {**files, CARD: card.encode()}.items():
            with writing_in(out, Path(name)):
                (new / name).write_bytes(data)


def _lora(mask: Mask, theta: Float32Array) -> Tensors:
    return {
        PREFIX + matrix.name.replace(".default.", "."): theta[part].reshape(matrix.shape)
        for matrix, part in mask.slices()
    }


def _transposed(folder: Path, layer: str) -> bool:
    return isinstance(bare_model(folder).model.get_submodule(layer), Conv1D)


def _check_shira(folder: Path, mask: Mask, layers: list[str]) -> int:
    """The r with which SHiRA has room for the mask, or `UnsupportedModel`."""
    modules = dict(bare_model(folder).model.named_modules())
    for layer, matrix in zip(layers, mask.matrices, strict=True):
        module = modules.get(layer)
        if not isinstance(module, nn.Linear):
            what = f"a {type(module).__name__}" if module is not None else "no layer"
            problem = f"is {what}, and PEFT's adapter of single values (SHiRA) is for linear layers only"
            raise UnsupportedModel(f"--as peft: {matrix.name}", problem, _WHOLE)
    rank = max(-(-matrix.indices.size // sum(matrix.shape)) for matrix in mask.matrices)
    for matrix in mask.matrices:
        if rank * sum(matrix.shape) > np.prod(matrix.shape):
            problem = (
                f"has no room for {rank * sum(matrix.shape):,} values, which PEFT's adapter of single values needs"
            )
            raise UnsupportedModel(f"--as peft: {matrix.name}", problem, _WHOLE)
    return rank


def _shira(folder: Path, mask: Mask, theta: Float32Array, rank: int) -> tuple[Tensors, Held]:
    tensors, apart, most = Tensors(), 0, 0.0
    copies = stored_copies(folder)
    for matrix, part in mask.slices():
        dtype = FLOATS[copies[matrix.name][0].dtype]
        added, missed = _added(matrix.theta_0, theta[part], dtype)
        apart, most = apart + int(np.count_nonzero(missed)), max(most, float(missed.max()))
        places, values = _filled(matrix, added, rank * sum(matrix.shape))
        name = PREFIX + matrix.name.removesuffix(".weight")
        tensors[f"{name}.shira_indices"] = np.stack(np.divmod(places, matrix.shape[1])).astype(np.int32)
        tensors[f"{name}.shira_weight"] = values
    return tensors, Held(mask.size, apart, most)


def _added(before: Float32Array, after: Float32Array, dtype: torch.dtype) -> tuple[Float32Array, Float32Array]:
    """What PEFT is to add, float32, so that the sum, rounded to the base's format, is theta; and what is missed."""

    def rounded(values: Float32Array) -> Float32Array:
        return np.asarray(torch.tensor(values).to(dtype).float().numpy(), np.float32)

    wanted = rounded(after)
    added = (wanted.astype(np.float64) - before).astype(np.float32)
    for towards in (-np.inf, np.inf):  # the neighbours: one of them may round as we wish
        other = np.nextafter(added, np.float32(towards))
        better = (rounded(before + added) != wanted) & (rounded(before + other) == wanted)
        added[better] = other[better]
    return added, np.abs(rounded(before + added) - wanted)


def _filled(matrix: MaskedMatrix, values: Float32Array, size: int) -> tuple[npt.NDArray[np.int64], Float32Array]:
    """Places and values of a matrix, and places outside of the mask with zeros, so that there are `size`."""
    places = matrix.indices.astype(np.int64)
    first = np.arange(min(size + places.size, int(np.prod(matrix.shape))))
    others = np.setdiff1d(first, places, assume_unique=True)[: size - places.size]
    return np.concatenate([places, others]), np.concatenate([values, np.zeros(others.size, np.float32)])
