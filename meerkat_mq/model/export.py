"""Export: the fine-tuned model as a Hugging Face folder. The bare difference is `wire.difference`."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask, UInt32Array
from meerkat_mq.errors import ModelError, ModelMismatch
from meerkat_mq.model.adapter import SCALING, adapter_pairs
from meerkat_mq.model.checkpoint import StoredTensor, fingerprint, stored_tensors
from meerkat_mq.model.load import find_folder

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 1 << 20
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite"}
_EXPORT_AGAIN = "export the model again"


def export_model(source: str | Path, mask: Mask, theta: Float32Array, out: Path) -> None:
    """Write a copy of the base whose masked weights are theta, cast to the checkpoint's dtype; all else stays as it is.

    Of an adapter's theta, the adapted weights become W + 2·B·A, so the folder needs no peft.

    Copies config, tokenizer and safetensors files; weights in other formats, which would be stale, are left out. The
    folder appears whole or not at all.

    Args:
        source: the base: local folder or hub id.
        mask: of the run.
        theta: float32 (n,).
        out: a folder that does not exist yet, or is empty.

    Raises:
        ModelError: out is not empty, cannot be written, or theta does not fit the mask.
        ModelNotFound: there is no such base.
        ModelMismatch: the base is not the one that the mask was made on.
    """
    folder = find_folder(source)
    if theta.shape != (mask.size,):
        raise ModelError(
            "theta", f"has shape {theta.shape}, the mask {mask.size} weights", "export with the run's mask"
        )
    if fingerprint(folder) != mask.fingerprint:
        raise ModelMismatch(str(folder), "is not the checkpoint that the mask was made on", "give the run's base model")
    stored = stored_tensors(folder)
    with _new_folder(out) as new:
        shutil.copytree(folder, new, ignore=_stale, dirs_exist_ok=True)
        for tensor, change in _changes(stored, mask, theta).items():
            _patch(new / tensor.file.relative_to(folder), tensor, change())


def check_export(folder: Path, source: str | Path, mask: Mask, theta: Float32Array) -> None:
    """Compare an exported model with base and theta, bit for bit, in pieces of a million values.

    Args:
        folder: the exported model.
        source: the base: local folder or hub id.
        mask: of the run.
        theta: float32 (n,).

    Raises:
        ModelNotFound: one of the two is missing.
        ModelMismatch: the base is not the one that the mask was made on, or the model is not base + theta; names the
            first tensor and weight that differ.
    """
    base = find_folder(source)
    if fingerprint(base) != mask.fingerprint:
        raise ModelMismatch(str(base), "is not the checkpoint that the mask was made on", "give the run's base model")
    expected, found = stored_tensors(base), stored_tensors(folder)
    changes = _changes(expected, mask, theta)
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or _layout(ours) != _layout(theirs):
            raise ModelMismatch(str(folder), f"{name} is not as in the base, by dtype and shape", _EXPORT_AGAIN)
        _compare(name, ours, theirs, changes.get(ours))


@dataclass(frozen=True, slots=True)
class _Change:
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


def _changes(
    stored: dict[str, StoredTensor], mask: Mask, theta: Float32Array
) -> dict[StoredTensor, Callable[[], _Change]]:
    """By the stored tensor, what theta makes of it; merged weights are made when they are asked for."""
    pairs = adapter_pairs(mask)
    if not pairs:
        return {
            _find(stored, matrix.name, {matrix.shape}): partial(
                _Change, matrix.name, matrix.indices, matrix.theta_0, theta[part]
            )
            for matrix, part in mask.slices()
        }
    parts = {matrix.name: theta[part].reshape(matrix.shape) for matrix, part in mask.slices()}
    changes: dict[StoredTensor, Callable[[], _Change]] = {}
    for layer, (_, inputs, outputs) in pairs.items():
        name, (a, b) = f"{layer}.weight", (parts[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        tensor = _find(stored, name, {(outputs, inputs), (inputs, outputs)})
        changes[tensor] = partial(_merged, name, tensor, a, b)
    return changes


def _merged(name: str, tensor: StoredTensor, a: Float32Array, b: Float32Array) -> _Change:
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
    base = torch.from_numpy(stored).view(_FLOATS[tensor.dtype]).double().numpy()
    shift = added if tensor.shape == added.shape else added.T
    after = base + SCALING * shift.flatten()
    return _Change(name, np.arange(base.size, dtype=np.uint32), None, after.astype(np.float32))


def _layout(tensor: StoredTensor) -> tuple[str, tuple[int, ...], int]:
    return tensor.dtype, tensor.shape, tensor.stop - tensor.start


def _compare(name: str, ours: StoredTensor, theirs: StoredTensor, make: Callable[[], _Change] | None) -> None:
    bits: npt.NDArray[Any] = np.empty(0, np.uint8)
    indices = np.empty(0, np.uint32)
    if make is not None:
        change = make()
        indices, bits = change.indices, _bits(change.after, _FLOATS[ours.dtype])
    count = (ours.stop - ours.start) // bits.itemsize
    for start in range(0, count, _PIECE):
        expected, found = (
            np.fromfile(
                tensor.file, bits.dtype, min(_PIECE, count - start), offset=tensor.start + start * bits.itemsize
            )
            for tensor in (ours, theirs)
        )
        here = slice(*np.searchsorted(indices, (start, start + expected.size)))
        expected[indices[here] - start] = bits[here]
        if not np.array_equal(expected, found):
            at = start + int(np.flatnonzero(expected != found)[0])
            what = "byte" if make is None else "weight"
            whose = "theta's" if at in indices else "the base's"
            raise ModelMismatch(str(theirs.file), f"{what} {at} of {name} is not {whose}", _EXPORT_AGAIN)


def _stale(_: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(name).suffix in _OTHER_WEIGHTS or name.startswith(".")]


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when all went well."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(str(out), "exists and is not an empty folder", "name a new folder")
    temporary = None
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(out)
    except OSError as error:
        raise ModelError(str(out), f"cannot be written ({error.strerror})", "choose another folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _find(stored: dict[str, StoredTensor], name: str, shapes: set[tuple[int, ...]]) -> StoredTensor:
    """The stored tensor of a parameter; checkpoints of bare models and of models with a head differ by a prefix."""
    found = [
        tensor
        for key, tensor in stored.items()
        if key == name or (name not in stored and (key.endswith(f".{name}") or name.endswith(f".{key}")))
        if tensor.shape in shapes and tensor.dtype in _FLOATS
    ]
    if len(found) != 1:
        raise ModelMismatch(
            name, f"{len(found)} tensors of the checkpoint match", "export a checkpoint saved by save_pretrained()"
        )
    return found[0]


def _patch(file: Path, tensor: StoredTensor, change: _Change) -> None:
    dtype = _FLOATS[tensor.dtype]
    width: npt.DTypeLike = np.uint32 if tensor.dtype == "F32" else np.uint16
    file.chmod(0o644)
    weights = np.memmap(file, width, "r+", tensor.start, (int(np.prod(tensor.shape)),))
    if change.before is not None and not np.array_equal(weights[change.indices], _bits(change.before, dtype)):
        raise ModelMismatch(str(tensor.file), f"{change.name} differs from the mask's theta_0", "export the run's base")
    weights[change.indices] = _bits(change.after, dtype)
    weights.flush()


def _bits(values: Float32Array, dtype: torch.dtype) -> npt.NDArray[np.uint32] | npt.NDArray[np.uint16]:
    """The values in another dtype, as unsigned integers of its width: NumPy has no bfloat16."""
    cast = torch.tensor(values).to(dtype)
    if dtype == torch.float32:
        return np.asarray(cast.view(torch.int32).numpy().view(np.uint32))
    return np.asarray(cast.view(torch.int16).numpy().view(np.uint16))
