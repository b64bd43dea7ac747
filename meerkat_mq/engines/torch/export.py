"""Export: the fine-tuned model as a Hugging Face folder. The bare difference is `wire.difference`."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.files import keep_names
from meerkat_mq.core.mask import Mask, UInt32Array
from meerkat_mq.engines.torch.changes import Change, bits, changes_of
from meerkat_mq.engines.torch.checkpoint import INDEX, SINGLE, StoredTensor, fingerprint, stored_tensors, weight_files
from meerkat_mq.engines.torch.folder import find_folder
from meerkat_mq.engines.torch.links import model_files
from meerkat_mq.engines.torch.names import FLOATS, stored_copies
from meerkat_mq.errors import ModelError, ModelMismatch, ModelNotFound

_EXPORT_AGAIN = "export the model again"
_PIECE = 1 << 20
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def export_model(source: str | Path, mask: Mask, theta: Float32Array, out: Path) -> None:
    """Write a copy of the base whose masked weights are theta, cast to the checkpoint's dtype; all else stays as it is.

    Of an adapter's theta, the adapted weights become W + 2·B·A, so the folder needs no peft.

    Copies config, tokenizer and the checkpoint's safetensors files; other weights, which would be stale, are left out.
    The folder appears whole or not at all, and nothing else is written.

    Args:
        source: the base: local folder or hub id.
        mask: of the run.
        theta: float32 (n,).
        out: a folder that does not exist yet, or is empty.

    Raises:
        ModelError: out is not empty, cannot be written, or theta does not fit the mask; or the base has a link that
            leads out of its folder.
        ModelNotFound: there is no such base, or a file of it cannot be read.
        ModelMismatch: the base is not the one that the mask was made on.
    """
    folder = find_folder(source)
    if theta.shape != (mask.size,):
        raise ModelError(
            "theta", f"has shape {theta.shape}, the mask {mask.size} weights", "export with the run's mask"
        )
    if fingerprint(folder) != mask.fingerprint:
        raise ModelMismatch(str(folder), "is not the checkpoint that the mask was made on", "give the run's base model")
    changes, files = changes_of(stored_copies(folder), mask, theta), exported_files(folder)
    with _new_folder(out, folder) as new:
        for name, file in files.items():
            with _writing(out, name):
                _copy(folder / name, file, new / name)
        for tensor, change in changes.items():
            name = tensor.file.relative_to(folder)
            with _writing(out, name):
                _patch(new / name, tensor, change())
        for name in files:
            with _writing(out, name):
                keep_names(new / name)


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
    changes = changes_of(stored_copies(base), mask, theta)
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or _layout(ours) != _layout(theirs):
            raise ModelMismatch(str(folder), f"{name} is not as in the base, by dtype and shape", _EXPORT_AGAIN)
        _compare(name, ours, theirs, changes.get(ours))


def exported_files(folder: Path) -> dict[Path, Path]:
    """What an export holds of the base, as `model_files`: of its own safetensors files only those of the checkpoint.

    Raises:
        ModelNotFound, ModelError: as `model_files` and `weight_files`.
    """
    weights = [file.relative_to(folder) for file in weight_files(folder)]
    stale = {Path(INDEX)} if weights == [Path(SINGLE)] else set()
    return {
        name: file
        for name, file in model_files(folder).items()
        if name in weights or not (name in stale or (name.suffix == ".safetensors" and len(name.parts) == 1))
    }


@contextmanager
def _new_folder(out: Path, base: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when all went well."""
    temporary = None
    in_the_way = ModelError(str(out), "exists and is not an empty folder", "name a new folder")
    with _writing(out):
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
def _writing(out: Path, name: Path | None = None) -> Iterator[None]:
    """Name the file of the export, and the reason, where it cannot be written."""
    try:
        yield
    except OSError as error:
        remedy = "free some space, or choose another disk" if error.errno in _FULL else "choose another folder"
        place = "" if name is None else f" at {name}"
        raise ModelError(str(out), f"cannot be written ({error.strerror}){place}", remedy) from error


def _copy(name: Path, source: Path, target: Path) -> None:
    """Copy a file's bytes alone: its mode, owner and links are the base's own affair."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        opened = source.open("rb")
    except OSError as error:
        raise ModelNotFound(str(name), f"cannot be read ({error.strerror})", "let this user read it") from error
    with opened, target.open("xb") as new:
        shutil.copyfileobj(opened, new, _PIECE)


def _patch(file: Path, tensor: StoredTensor, change: Change) -> None:
    """Write the change into a copy. Not by a memory map: where the disk is full, that ends the process."""
    dtype = FLOATS[tensor.dtype]
    before = None if change.before is None else bits(change.before, dtype)
    after = bits(change.after, dtype)
    with file.open("r+b") as stream:
        for piece in _pieces(change.indices, (tensor.stop - tensor.start) // after.itemsize):
            places, start = change.indices[piece.changed] - piece.start, tensor.start + piece.start * after.itemsize
            if not places.size:
                continue
            stream.seek(start)
            weights = np.frombuffer(stream.read((piece.stop - piece.start) * after.itemsize), after.dtype).copy()
            if before is not None and not np.array_equal(weights[places], before[piece.changed]):
                problem = f"{change.name} differs from the mask's theta_0"
                raise ModelMismatch(str(tensor.file), problem, "export the run's base")
            weights[places] = after[piece.changed]
            stream.seek(start)
            stream.write(weights.tobytes())


def _layout(tensor: StoredTensor) -> tuple[str, tuple[int, ...], int]:
    return tensor.dtype, tensor.shape, tensor.stop - tensor.start


def _compare(name: str, ours: StoredTensor, theirs: StoredTensor, make: Callable[[], Change] | None) -> None:
    values: npt.NDArray[Any] = np.empty(0, np.uint8)
    indices = np.empty(0, np.uint32)
    if make is not None:
        change = make()
        indices, values = change.indices, bits(change.after, FLOATS[ours.dtype])
    for piece in _pieces(indices, (ours.stop - ours.start) // values.itemsize):
        expected, found = (
            np.fromfile(
                tensor.file, values.dtype, piece.stop - piece.start, offset=tensor.start + piece.start * values.itemsize
            )
            for tensor in (ours, theirs)
        )
        expected[indices[piece.changed] - piece.start] = values[piece.changed]
        if not np.array_equal(expected, found):
            at = piece.start + int(np.flatnonzero(expected != found)[0])
            what = "byte" if make is None else "weight"
            whose = "theta's" if at in indices else "the base's"
            raise ModelMismatch(str(theirs.file), f"{what} {at} of {name} is not {whose}", _EXPORT_AGAIN)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor's values, small enough to hold.

    Attributes:
        start, stop: which values.
        changed: which of a change's indices lie there.
    """

    start: int
    stop: int
    changed: slice


def _pieces(indices: UInt32Array, count: int) -> Iterator[_Piece]:
    """A tensor of `count` values, a million at a time."""
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        yield _Piece(start, stop, slice(*map(int, np.searchsorted(indices, (start, stop)))))
