"""The files of a model folder. It may come from anybody: what leads out of it is refused before it is opened."""

import os
import stat
from pathlib import Path

from meerkat_mq.errors import ModelError, ModelNotFound

_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite"}
_MOST_LINKS = 40  # as many as Linux follows


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or `ModelNotFound` where the way there cannot be read."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in a name
        return False
    except OSError as error:
        raise _unreadable(path, error) from error


def model_files(folder: Path) -> dict[Path, Path]:
    """The files of a model folder and of its subfolders: by the path within the folder, where the bytes are.

    Hidden names, and weights in other formats than safetensors, do not belong to it.

    Raises:
        ModelNotFound: a link's target is missing, or a file or subfolder cannot be read.
        ModelError: a link leads out of the folder, or something is neither a file nor a folder.
    """
    found: dict[Path, Path] = {}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise _unreadable(place, error) from error
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith(".") or path.suffix in _OTHER_WEIGHTS:
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            else:
                found[path.relative_to(folder)] = real_file(path, folder)
    return found


def real_file(path: Path, folder: Path) -> Path:
    """Where the bytes of a model folder's file are: there, or where links within the folder lead.

    The links of a hub cache's snapshot may also lead to the `blobs` of the same model.

    Raises:
        ModelNotFound: the file, or what it links to, is missing or cannot be read.
        ModelError: a link leads out of the folder, or the file is none.
    """
    roots, place = _roots(folder), path
    try:
        for _ in range(_MOST_LINKS):
            place = Path(os.path.realpath(place.parent, strict=True), place.name)
            if not any(place.is_relative_to(root) for root in roots):
                problem = f"is a link out of the model folder, to {place}"
                raise ModelError(str(path), problem, "put the file itself into the folder, if you trust it")
            mode = place.lstat().st_mode
            if not stat.S_ISLNK(mode):
                return _readable(path, place, mode)
            place = place.parent / place.readlink()
    except FileNotFoundError as error:
        problem = f"is a link to {place}, which is missing" if path.is_symlink() else "is missing"
        raise ModelNotFound(str(path), problem, "fetch the model again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    raise ModelError(str(path), "is a link that leads to itself", "fetch the model again")


def _roots(folder: Path) -> list[Path]:
    real = Path(os.path.realpath(folder))
    snapshots = [place for place in real.parents if place.name == "snapshots"]
    return [real, *(place.parent / "blobs" for place in snapshots if place.parent.name.startswith("models--"))]


def _readable(path: Path, place: Path, mode: int) -> Path:
    if not stat.S_ISREG(mode):
        kind = "a link to a folder" if stat.S_ISDIR(mode) and path.is_symlink() else "no regular file"
        raise ModelError(str(path), f"is {kind}", "a model folder holds files and folders only: replace or remove it")
    if not os.access(place, os.R_OK):
        raise ModelNotFound(str(path), "cannot be read (Permission denied)", "let this user read it")
    return place


def _unreadable(path: Path, error: OSError) -> ModelNotFound:
    return ModelNotFound(str(path), f"cannot be read ({error.strerror})", "let this user read it, or fetch it again")
