"""Exports of what training changed, without the base: sparse values, or an adapter of Hugging Face PEFT; their check.

Of the forms that PEFT knows, two can hold a run:

- A mask of the method `lora` is a LoRA adapter: all of A and B are written as they are.
- A sparse mask of linear layers is a SHiRA adapter (Sparse High Rank Adapters, arXiv 2406.13175): PEFT adds single
  values to W at stored places. It adds, where we assign: d = θ − θ_0 is rounded to float32, and so is W + d. What comes
  out is counted here, value by value. A LoRA of low rank could only approximate such a difference, so none is made.

SHiRA wants r·(in + out) values in every layer, with one r. Layers with fewer are filled up with zeros.
"""

import json
from collections.abc import Callable, Iterator, Mapping
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
from meerkat_mq.core.foreign import real_file
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.engines.torch.adapter import SCALING, adapter_pairs
from meerkat_mq.engines.torch.checkpoint import tensors_in
from meerkat_mq.engines.torch.export import CARD, EXPORT_AGAIN, base_of, check_size, whole_folder, writing_in
from meerkat_mq.engines.torch.folder import ADAPTER, Json, read_json
from meerkat_mq.engines.torch.kinds import bare_model
from meerkat_mq.engines.torch.merge import ADAPTER_WEIGHTS, PREFIX
from meerkat_mq.engines.torch.names import FLOATS, stored_copies
from meerkat_mq.errors import ModelError, ModelMismatch, UnsupportedModel, printable

DELTA: Final = "delta.safetensors"

Card = Callable[[str], str]
Tensors = dict[str, npt.NDArray[Any]]

_WHOLE = "export the whole model instead: --as model"
_FORMATS = {"float32": "F32", "int32": "I32", "int64": "I64"}
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
    _write(out, folder, {DELTA: save(_delta(mask, theta), {"format": "pt"})}, card(""))
    return ""


def _delta(mask: Mask, theta: Float32Array) -> Tensors:
    if adapter_pairs(mask):
        problem = "an adapter changes whole matrices: there is no sparse difference"
        raise ModelError("--as delta", problem, "use --as peft, which holds the adapter exactly, or --as model")
    tensors = Tensors()
    for matrix, part in mask.slices():
        small = np.prod(matrix.shape, dtype=object) < 2**31
        tensors[f"{matrix.name}.indices"] = matrix.indices.astype(np.int32 if small else np.int64)
        tensors[f"{matrix.name}.values"] = theta[part]
    return tensors


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
    tensors, settings, said = _adapter(folder, mask, theta)
    settings |= {"base_model_name_or_path": None if folder == Path(source) else str(source)}
    files = {ADAPTER: json.dumps(settings, indent=1).encode(), ADAPTER_WEIGHTS: save(tensors, {"format": "pt"})}
    _write(out, folder, files, card(said))
    return said


def check_difference(folder: Path, source: str | Path, mask: Mask, theta: Float32Array) -> bool:
    """Compare an export of what training changed with what base and theta give, bit for bit.

    Returns:
        Whether `folder` is such an export: else it may be a whole model.

    Raises:
        ModelNotFound, ModelError: a file is missing or damaged.
        ModelMismatch: the base is not the one that the mask was made on, or the export is not what base and theta give;
            names the first tensor, setting or file that differs.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if not names & {DELTA, ADAPTER}:
        return False
    base, settings = base_of(source, mask), Json()
    if DELTA in names:
        weights, tensors = DELTA, _delta(mask, theta)
    else:
        weights, (tensors, settings, _) = ADAPTER_WEIGHTS, _adapter(base, mask, theta)
    problem = next(_wrong(folder, weights, tensors, settings, names), None)
    if problem is not None:
        raise ModelMismatch(str(folder), problem, EXPORT_AGAIN)
    return True


def _wrong(folder: Path, weights: str, tensors: Tensors, settings: Json, names: set[str]) -> Iterator[str]:
    """What is not as an export has it; whoever loads it is told its base by name, which may be another place's."""
    if strange := sorted(names - {weights, CARD} - ({ADAPTER} if settings else set())):
        yield f"holds {printable(strange[0])}, which no export of this kind has"
    if settings:
        found = read_json(real_file(folder / ADAPTER, folder))
        for key in sorted((settings.keys() | found.keys()) - {"base_model_name_or_path"}):
            if key not in found or key not in settings or found[key] != settings[key]:
                yield f"{ADAPTER}: {printable(key)} is not what the run gives"
    stored = {tensor.name: tensor for tensor in tensors_in(real_file(folder / weights, folder))}
    for name in sorted(tensors.keys() | stored.keys()):
        wanted, tensor = tensors.get(name), stored.get(name)
        if wanted is None or tensor is None:
            yield f"{name} is {'missing' if tensor is None else 'no tensor of such an export'}"
        elif (tensor.dtype, tensor.shape) != (_FORMATS[wanted.dtype.name], wanted.shape):
            yield f"{name} is not stored as {_FORMATS[wanted.dtype.name]} {wanted.shape}"
        elif tensor.read(np.uint8).tobytes() != wanted.tobytes():
            yield f"{name} is not what base and theta give"


def _adapter(folder: Path, mask: Mask, theta: Float32Array) -> tuple[Tensors, Json, str]:
    """The adapter's tensors and settings, and what it says of itself."""
    pairs = adapter_pairs(mask)
    if pairs:
        tensors = _lora(mask, theta)
        ranks = sorted({rank for rank, _, _ in pairs.values()})
        layers = list(pairs)
        settings: Json = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": int(SCALING * ranks[0])}
        settings |= {"lora_dropout": 0.0, "bias": "none"}
        said = "It is a LoRA adapter, and holds the trained A and B bit for bit."
    else:
        layers = [matrix.name.removesuffix(".weight") for matrix in mask.matrices]
        rank = _check_shira(folder, mask, layers)
        tensors, held = _shira(folder, mask, theta, rank)
        settings = {"peft_type": "SHIRA", "r": rank, "mask_type": _WITHOUT_MASK}
        said = f"It is a SHiRA adapter: single values, added to the base's. {held}"
    settings |= {"target_modules": layers, "fan_in_fan_out": bool(pairs) and _transposed(folder, layers[0])}
    return tensors, settings | {"inference_mode": True}, said


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
