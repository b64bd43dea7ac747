"""Files that a crash cannot tear."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from meerkat_mq.errors import ConfigError, MeerkatError


@contextmanager
def writing(
    where: str, remedy: str = "choose another folder", kind: type[MeerkatError] = ConfigError
) -> Iterator[None]:
    """Say what cannot be written, and why, where an OSError comes.

    Raises:
        MeerkatError: of this kind.
    """
    try:
        yield
    except OSError as error:
        raise kind(where, f"cannot be written ({error.strerror})", remedy) from error


def write_atomically(path: Path, data: bytes, *, durable: bool = True, secret: bool = False) -> None:
    """Write a file so that a crash leaves the old one or the new one, whole.

    Args:
        durable: wait until it would outlive a power cut.
        secret: only its owner can read it, from the first moment.

    Raises:
        OSError: the folder is missing, read-only or full; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        mode = 0o600 if secret else 0o666
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            keep_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def keep_names(folder: Path) -> None:
    """Wait until the names in a folder would outlive a power cut.

    Raises:
        OSError: there is no such folder, or its device fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_folder(out: Path | None, default: Path) -> Path:
    """Make the folder for what a command leaves: nothing of an earlier run is in it, and nothing of one is lost.

    Args:
        out: as the user chose it; must not exist yet, or be empty.
        default: where nothing was chosen; if something is there, a number follows its name: demo, demo-2, demo-3 …

    Raises:
        ConfigError: `out` holds something, or a folder cannot be made.
    """
    if out is not None:
        if not _is_new(out):
            found = "is not empty" if out.is_dir() else "is no folder"
            raise ConfigError(f"--out {out}", found, "name a new folder, or remove what is there")
        return out
    names = (default if number == 1 else default.with_name(f"{default.name}-{number}") for number in count(1))
    return next(folder for folder in names if _is_new(folder))


def _is_new(folder: Path) -> bool:
    with writing(f"--out {folder}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            return False
        return not any(folder.iterdir())
