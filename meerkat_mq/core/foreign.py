"""Files that somebody else may have made: what a name in them may be, where a path may lead, what is opened.

A model folder, a server's state_dir and single files of them are copied from machine to machine, and may come from
anybody. Three rules hold for all of them, and are written here alone.

1. A name that stands in a file (a shard in an index) is a plain file name: it names nothing outside of its folder.
2. A path in a folder may lead through links, but not out of the folder. The links of a hub cache's snapshot may also
   lead to the `blobs` of the same model.
3. Only regular files are opened, and none is waited for: a pipe would hold the reader up, a device has no end. A hard
   link is a regular file. It gives away nothing, for whoever makes one could read the file; and nothing is written
   through it, for files are written anew under a name of their own, and renamed.
4. JSON that cannot be read is one error, a ValueError, whatever is wrong with it.
"""

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Final

from meerkat_mq.errors import ModelError, ModelNotFound, shown

_MOST_LINKS: Final = 40  # as many as Linux follows
_LONGEST_NAME: Final = 128


def is_plain_name(name: object, suffix: str) -> bool:
    """Whether what stands in a file is the name of a file beside it: no folder, nothing hidden, nothing unprintable."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
        return False
    return name.endswith(suffix) and name != suffix and not name.startswith(".") and not set("/\\") & set(name)


def real_file(path: Path, folder: Path) -> Path:
    """Where the bytes of a model folder's file are: there, or where links within the folder lead.

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
        raise unreadable(path, error) from error
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


def unreadable(path: Path, error: OSError) -> ModelNotFound:
    """What to say of a model's file or folder that the system does not open."""
    return ModelNotFound(str(path), f"cannot be read ({error.strerror})", "let this user read it, or fetch it again")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, links to one too.

    Raises:
        OSError: it is none, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: as `open_regular`; or there are more than `most`, or than memory holds: a file with holes costs nobody
            anything.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; {most:,} are the most", str(path))
        try:
            return file.read()
        except MemoryError as error:
            raise OSError(errno.ENOMEM, f"it has {size:,} bytes, and memory has no room for them", str(path)) from error


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none (then a JSONDecodeError, with the line), is nested deeper than Python reads, holds a
            number of thousands of digits, or a key twice in an object: of two, each reader chooses as it likes.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {shown(next(key for key, n in counts.items() if n > 1))} comes twice")
    return found
