"""What theta makes of a checkpoint's tensors, in the checkpoint's own bits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask, UInt32Array
from meerkat_mq.errors import ModelMismatch
from meerkat_mq.model.adapter import SCALING, adapter_pairs
from meerkat_mq.model.checkpoint import StoredTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Bits = npt.NDArray[np.uint32] | npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Change:
    """New values of a stored tensor.

    Attributes:
        name: of the parameter.
        indices: uint32 (k,), ascending.
        before: float32 (k,), what the base must hold there; None: not looked at.
        after: float32 (k,).
    """

    name: str
    indices: UInt32Array
    before: Float32Array | None
    after: Float32Array


def changes_of(
    stored: dict[str, StoredTensor], mask: Mask, theta: Float32Array
) -> dict[StoredTensor, Callable[[], Change]]:
    """By the stored tensor, what theta makes of it; merged weights are made when they are asked for.

    Raises:
        ModelMismatch: the checkpoint has no such tensors.
    """
    pairs = adapter_pairs(mask)
    if not pairs:
        return {
            _find(stored, matrix.name, {matrix.shape}): partial(
                Change, matrix.name, matrix.indices, matrix.theta_0, theta[part]
            )
            for matrix, part in mask.slices()
        }
    parts = {matrix.name: theta[part].reshape(matrix.shape) for matrix, part in mask.slices()}
    changes: dict[StoredTensor, Callable[[], Change]] = {}
    for layer, (_, inputs, outputs) in pairs.items():
        name, (a, b) = f"{layer}.weight", (parts[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        tensor = _find(stored, name, {(outputs, inputs), (inputs, outputs)})
        changes[tensor] = partial(_merged, name, tensor, a, b)
    return changes


def bits(values: Float32Array, dtype: torch.dtype) -> Bits:
    """The values in another dtype, as unsigned integers of its width: NumPy has no bfloat16."""
    cast = torch.tensor(values).to(dtype)
    if dtype == torch.float32:
        return np.asarray(cast.view(torch.int32).numpy().view(np.uint32))
    return np.asarray(cast.view(torch.int16).numpy().view(np.uint16))


def _merged(name: str, tensor: StoredTensor, a: Float32Array, b: Float32Array) -> Change:
    """W + 2·B·A in float64, rank by rank and without BLAS: the same bits on every machine.

    Args:
        name: of the parameter.
        tensor: W, (out, in), or (in, out) of a Conv1D.
        a: (r, in).
        b: (out, r).
    """
    added = np.zeros((len(b), a.shape[1]))
    for row, column in zip(a.astype(np.float64), b.T.astype(np.float64), strict=True):
        added += np.multiply.outer(column, row)
    stored = np.fromfile(tensor.file, np.uint8, tensor.stop - tensor.start, offset=tensor.start)
    base = torch.from_numpy(stored).view(FLOATS[tensor.dtype]).double().numpy()
    shift = added if tensor.shape == added.shape else added.T
    after = base + SCALING * shift.flatten()
    return Change(name, np.arange(base.size, dtype=np.uint32), None, after.astype(np.float32))


def _find(stored: dict[str, StoredTensor], name: str, shapes: set[tuple[int, ...]]) -> StoredTensor:
    """The stored tensor of a parameter; checkpoints of bare models and of models with a head differ by a prefix."""
    found = [
        tensor
        for key, tensor in stored.items()
        if key == name or (name not in stored and (key.endswith(f".{name}") or name.endswith(f".{key}")))
        if tensor.shape in shapes and tensor.dtype in FLOATS
    ]
    if len(found) != 1:
        raise ModelMismatch(
            name, f"{len(found)} tensors of the checkpoint match", "export a checkpoint saved by save_pretrained()"
        )
    return found[0]
