"""What theta makes of a checkpoint's tensors, in the checkpoint's own bits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask, UInt32Array
from meerkat_mq.engines.torch.adapter import SCALING, adapter_pairs
from meerkat_mq.engines.torch.checkpoint import StoredTensor
from meerkat_mq.engines.torch.names import FLOATS
from meerkat_mq.errors import ModelMismatch

PIECE = 1 << 20  # values held at a time

Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Change:
    """New values of a stored tensor.

    Attributes:
        indices: uint32 (k,), ascending.
        before: float32 (k,), what the base must hold there; None: not looked at.
        after: float32 (k,).
    """

    indices: UInt32Array
    before: Float32Array | None
    after: Float32Array


def changes_of(
    copies: Mapping[str, Sequence[StoredTensor]], mask: Mask, theta: Float32Array
) -> dict[StoredTensor, Callable[[], Change]]:
    """By the stored tensor, what theta makes of it; merged weights are made when they are asked for.

    Args:
        copies: of the base, by parameter: `names.stored_copies`. All tied copies change.
        mask: of the run.
        theta: float32 (n,).

    Raises:
        ModelMismatch: the checkpoint has no such tensors.
    """
    pairs = adapter_pairs(mask)
    changes: dict[StoredTensor, Callable[[], Change]] = {}
    if not pairs:
        for matrix, part in mask.slices():
            change = partial(Change, matrix.indices, matrix.theta_0, theta[part])
            changes |= dict.fromkeys(_stored(copies, matrix.name, {matrix.shape}), change)
        return changes
    parts = {matrix.name: theta[part].reshape(matrix.shape) for matrix, part in mask.slices()}
    for layer, (_, inputs, outputs) in pairs.items():
        name, (a, b) = f"{layer}.weight", (parts[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        for tensor in _stored(copies, name, {(outputs, inputs), (inputs, outputs)}):
            changes[tensor] = partial(_merged, tensor, a, b)
    return changes


def rewritten(tensor: StoredTensor, make: Callable[[], Change] | None) -> Iterator[tuple[int, Bits, Bits]]:
    """A stored tensor in pieces: the number of a piece's first value, its values, and what a change makes of them.

    Values are unsigned integers of their format's width: NumPy has no bfloat16. A tensor without a change is bytes.

    Raises:
        ModelMismatch: the base does not hold the mask's theta_0.
    """
    change = make() if make else Change(np.empty(0, np.uint32), None, np.empty(0, np.float32))
    dtype = FLOATS[tensor.dtype] if make else torch.uint8
    before, after = None if change.before is None else _bits(change.before, dtype), _bits(change.after, dtype)
    for start in range(0, tensor.size // after.itemsize, PIECE):
        old: Bits = tensor.read(after.dtype, start, PIECE)
        part = slice(*map(int, np.searchsorted(change.indices, (start, start + old.size))))
        places, new = change.indices[part] - start, old.copy()
        if before is not None and not np.array_equal(old[places], before[part]):
            problem = f"{tensor.name} differs from the mask's theta_0"
            raise ModelMismatch(str(tensor.file), problem, "export the run's base")
        new[places] = after[part]
        yield start, old, new


def _bits(values: Float32Array, dtype: torch.dtype) -> Bits:
    """The values cast to another format."""
    cast: Bits = torch.tensor(values).to(dtype).view(torch.uint8).numpy().view(f"u{dtype.itemsize}")
    return cast


def _merged(tensor: StoredTensor, a: Float32Array, b: Float32Array) -> Change:
    """W + 2·B·A in float64, rank by rank and without BLAS: the same bits on every machine.

    Args:
        tensor: W, (out, in), or (in, out) of a Conv1D.
        a: (r, in).
        b: (out, r).
    """
    added = np.zeros((len(b), a.shape[1]))
    for row, column in zip(a.astype(np.float64), b.T.astype(np.float64), strict=True):
        added += np.multiply.outer(column, row)
    base = torch.from_numpy(tensor.read(np.uint8)).view(FLOATS[tensor.dtype]).double().numpy()
    shift = added if tensor.shape == added.shape else added.T
    after = base + SCALING * shift.flatten()
    return Change(np.arange(base.size, dtype=np.uint32), None, after.astype(np.float32))


def _stored(
    copies: Mapping[str, Sequence[StoredTensor]], name: str, shapes: set[tuple[int, ...]]
) -> Sequence[StoredTensor]:
    found = copies.get(name, ())
    if not found or any(tensor.shape not in shapes or tensor.dtype not in FLOATS for tensor in found):
        problem = "is no tensor of the checkpoint" if not found else f"is stored as {found[0].dtype} {found[0].shape}"
        raise ModelMismatch(name, problem, "give the base model that the run's mask was made on")
    return found
