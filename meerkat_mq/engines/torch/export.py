"""Export: the fine-tuned model as a Hugging Face folder, in the checkpoint's own bits, and the check of one.

`differences` writes what training changed, without the base.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.files import keep_names
from meerkat_mq.core.mask import Mask, UInt32Array
from meerkat_mq.engines.torch.adapter import SCALING, adapter_pairs
from meerkat_mq.engines.torch.checkpoint import INDEX, SINGLE, StoredTensor, fingerprint, stored_tensors, weight_files
from meerkat_mq.engines.torch.folder import find_folder, model_files
from meerkat_mq.engines.torch.names import FLOATS, stored_copies
from meerkat_mq.errors import ModelError, ModelMismatch, ModelNotFound

PIECE = 1 << 20  # values held at a time
CARD = "README.md"
BASE_CARD = "README.base.md"

Bits = npt.NDArray[np.unsignedinteger[Any]]

EXPORT_AGAIN = "export the model again"
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
    """By the stored tensor, each tied copy too, what theta makes of it; merged weights are made when asked for.

    Raises:
        ModelMismatch: the checkpoint, by parameter as `stored_copies` gives it, has no such tensors.
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
            changes[tensor] = partial(merged, tensor, a, b, SCALING, transposed=tensor.shape != (outputs, inputs))
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


def merged(tensor: StoredTensor, a: Float32Array, b: Float32Array, scaling: float, *, transposed: bool) -> Change:
    """W + scaling·B·A in float64, rank by rank and without BLAS: the same bits on every machine.

    a is (r, in), b is (out, r), W is (out, in), or `transposed`, as of a Conv1D.
    """
    added = np.zeros((len(b), a.shape[1]))
    for row, column in zip(a.astype(np.float64), b.T.astype(np.float64), strict=True):
        added += np.multiply.outer(column, row)
    base = torch.from_numpy(tensor.read(np.uint8)).view(FLOATS[tensor.dtype]).double().numpy()
    after = base + scaling * (added.T if transposed else added).flatten()
    return Change(np.arange(base.size, dtype=np.uint32), None, after.astype(np.float32))


def _stored(
    copies: Mapping[str, Sequence[StoredTensor]], name: str, shapes: set[tuple[int, ...]]
) -> Sequence[StoredTensor]:
    found = copies.get(name, ())
    if not found or any(tensor.shape not in shapes or tensor.dtype not in FLOATS for tensor in found):
        problem = "is no tensor of the checkpoint" if not found else f"is stored as {found[0].dtype} {found[0].shape}"
        raise ModelMismatch(name, problem, "give the base model that the run's mask was made on")
    return found


def export_model(source: str | Path, mask: Mask, theta: Float32Array, out: Path, card: str | None = None) -> None:
    """Write a copy of the base whose masked weights are theta, cast to the checkpoint's dtype; all else stays as it is.

    Of an adapter's theta, the adapted weights become W + 2·B·A, so the folder needs no peft.

    Copies config, tokenizer and the checkpoint's safetensors files; other weights, which would be stale, are left out.
    The folder appears whole or not at all, and nothing else is written.

    Args:
        source: the base: local folder or hub id.
        mask, theta: of the run; float32 (n,).
        out: a folder that does not exist yet, or is empty.
        card: the export's README.md; that of the base, if it has one, becomes README.base.md.

    Raises:
        ModelError: out is not empty, cannot be written, or theta does not fit the mask; or the base has a link that
            leads out of its folder.
        ModelNotFound: there is no such base, or a file of it cannot be read.
        ModelMismatch: the base is not the one that the mask was made on.
    """
    folder = base_of(source, mask)
    check_size(mask, theta)
    write_changed(folder, changes_of(stored_copies(folder), mask, theta), out, card)


def write_changed(
    folder: Path, changes: Mapping[StoredTensor, Callable[[], Change]], out: Path, card: str | None = None
) -> None:
    """Write a copy of a model with some of its tensors changed; arguments and errors as of `export_model`."""
    files = exported_files(folder)
    if card is not None and Path(CARD) in files:
        files[Path(BASE_CARD)] = files.pop(Path(CARD))
    with whole_folder(out, folder) as new:
        if card is not None:
            with writing_in(out, Path(CARD)):
                (new / CARD).write_text(card, encoding="utf-8")
        for name, file in files.items():
            with writing_in(out, name):
                copy_file(folder / name, file, new / name)
        for tensor, change in changes.items():
            name = tensor.file.relative_to(folder)
            with writing_in(out, name):
                _patch(new / name, tensor, change)
        for name in files:
            with writing_in(out, name):
                keep_names(new / name)


def check_export(folder: Path, source: str | Path, mask: Mask, theta: Float32Array) -> None:
    """Compare an exported model, in `folder`, with its base and theta, bit for bit, in pieces of a million values.

    Raises:
        ModelNotFound: one of the two is missing.
        ModelMismatch: the base is not the one that the mask was made on, or the model is not base + theta; names the
            first tensor and weight that differ.
    """
    base = base_of(source, mask)
    expected, found = stored_tensors(base), stored_tensors(folder)
    changes = changes_of(stored_copies(base), mask, theta)
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name), found.get(name)
        layouts = {(tensor.dtype, tensor.shape, tensor.size) if tensor else None for tensor in (ours, theirs)}
        if ours is None or theirs is None or len(layouts) > 1:
            raise ModelMismatch(str(folder), f"{name} is not as in the base, by dtype and shape", EXPORT_AGAIN)
        _compare(ours, theirs, changes.get(ours))


def check_size(mask: Mask, theta: Float32Array) -> None:
    """Refuse a theta of another mask."""
    if theta.shape != (mask.size,):
        problem = f"has shape {theta.shape}, the mask {mask.size} weights"
        raise ModelError("theta", problem, "export with the run's mask")


def base_of(source: str | Path, mask: Mask) -> Path:
    """The folder of the run's base, or `ModelMismatch`."""
    folder = find_folder(source)
    if fingerprint(folder) != mask.fingerprint:
        raise ModelMismatch(str(folder), "is not the checkpoint that the mask was made on", "give the run's base model")
    return folder


def exported_files(folder: Path) -> dict[Path, Path]:
    """What an export holds of the base, as `model_files`: of its own safetensors files only those of the checkpoint."""
    weights = [file.relative_to(folder) for file in weight_files(folder)]
    stale = {Path(INDEX)} if weights == [Path(SINGLE)] else set()
    return {
        name: file
        for name, file in model_files(folder).items()
        if name in weights or not (name in stale or (name.suffix == ".safetensors" and len(name.parts) == 1))
    }


@contextmanager
def whole_folder(out: Path, base: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when all went well."""
    temporary, in_the_way = None, ModelError(str(out), "exists and is not an empty folder", "name a new folder")
    with writing_in(out):
        try:
            place = Path(os.path.realpath(out))
            if place.is_relative_to(os.path.realpath(base)):
                raise ModelError(str(out), "lies in the base model's folder", "name a folder elsewhere")
            if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
                raise in_the_way
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
            yield temporary
            temporary.chmod(0o755)
            try:
                temporary.replace(place)
            except OSError as error:
                raise in_the_way if error.errno in _OCCUPIED else error from error
            keep_names(place.parent)
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing_in(out: Path, name: Path | None = None) -> Iterator[None]:
    """Name the file of the export, and the reason, where it cannot be written."""
    try:
        yield
    except OSError as error:
        remedy = "free some space, or choose another disk" if error.errno in _FULL else "choose another folder"
        place = "" if name is None else f" at {name}"
        raise ModelError(str(out), f"cannot be written ({error.strerror}){place}", remedy) from error


def copy_file(name: Path, source: Path, target: Path) -> None:
    """Copy a file's bytes alone: its mode, owner and links are the base's own affair."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        opened = source.open("rb")
    except OSError as error:
        raise ModelNotFound(str(name), f"cannot be read ({error.strerror})", "let this user read it") from error
    with opened, target.open("xb") as new:
        shutil.copyfileobj(opened, new, PIECE)


def _patch(file: Path, tensor: StoredTensor, change: Callable[[], Change]) -> None:
    """Write the change into a copy. Not by a memory map: where the disk is full, that ends the process."""
    with file.open("r+b") as stream:
        for start, _, new in rewritten(tensor, change):
            stream.seek(tensor.start + start * new.itemsize)
            stream.write(new.tobytes())


def _compare(ours: StoredTensor, theirs: StoredTensor, change: Callable[[], Change] | None) -> None:
    for start, old, new in rewritten(ours, change):
        found = theirs.read(new.dtype, start, new.size)
        if not np.array_equal(new, found):
            at = int(np.flatnonzero(new != found)[0])
            what, whose = "weight" if change else "byte", "the base's" if new[at] == old[at] else "theta's"
            raise ModelMismatch(str(theirs.file), f"{what} {start + at} of {ours.name} is not {whose}", EXPORT_AGAIN)
