"""Checkpoint files: where each tensor's bytes lie, and the fingerprint over them. No torch.

Only safetensors: other formats are pickles, which run code when they are read.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.foreign import is_plain_name, open_regular, parse_json, read_regular, real_file
from meerkat_mq.errors import ModelError, ModelNotFound, reason, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000
_MOST_INDEX = 32 << 20
_LONGEST_NAME = 255  # characters
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `file[start:stop]`, dtype as safetensors names it ("F32", "BF16" …)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    def read(self, as_type: npt.DTypeLike, first: int = 0, most: int | None = None) -> npt.NDArray[Any]:
        """Its bytes as values of a NumPy type, from the `first` on; `most`: so many, or as many as there are."""
        width = np.dtype(as_type).itemsize
        left = self.size // width - first
        return np.fromfile(self.file, as_type, min(left, most or left), offset=self.start + first * width)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads. Each lies in the folder, or where `real_file` lets it be.

    Raises:
        ModelNotFound: there are none, or one is missing.
        ModelError: the index is damaged, names anything but plain file names, or a link leads out of the folder.
    """
    if os.path.lexists(folder / SINGLE):
        names = [SINGLE]
    elif os.path.lexists(folder / INDEX):
        names = _shards(folder / INDEX, folder)
    else:
        remedy = "convert the checkpoint: load it and call save_pretrained()"
        raise ModelNotFound(str(folder), f"has no {SINGLE}", remedy)
    for name in names:
        real_file(folder / name, folder)
    return [folder / name for name in names]


def _shards(index: Path, folder: Path) -> list[str]:
    try:
        table = parse_json(read_regular(real_file(index, folder), _MOST_INDEX))
        names = list(table["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(str(index), f"is no checkpoint index ({reason(error)})", "fetch the model again") from error
    wrong = [name for name in names if not is_plain_name(name, ".safetensors")]
    if wrong or not names:
        problem = f"weight_map: {wrong[0]!r:.200} is no plain file name" if wrong else "weight_map: names no file"
        raise ModelError(str(index), problem, "name .safetensors files beside the index, or fetch the model again")
    return sorted(set(names))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, ordered by the bytes of their names.

    Raises:
        ModelNotFound: a weight file is missing.
        ModelError: a weight file is damaged or cut short, or two files hold a tensor of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for file in weight_files(folder) for tensor in tensors_in(file)):
        if (other := tensors.setdefault(tensor.name, tensor)) is not tensor:
            problem = f"holds {tensor.name}, and so does {other.file.name}"
            raise ModelError(str(tensor.file), problem, "remove one of them")
    return dict(sorted(tensors.items(), key=lambda item: item[0].encode()))


def tensors_in(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in its order; raises as `stored_tensors`."""
    try:
        size = file.stat().st_size
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            table: dict[str, Any] = parse_json(stream.read(length))
        table.pop("__metadata__", None)
        return [_tensor(file, name, entry, 8 + length, size) for name, entry in table.items()]
    except OSError as error:
        raise ModelNotFound(str(file), f"cannot be read ({error.strerror})", "fetch the model again") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(str(file), f"is no safetensors file ({reason(error)})", "fetch the model again") from error


def _tensor(file: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    """A tensor of the header, where what its entry says can be shown, and fits together and the file's size.

    `data` is where the file's data begin.
    """
    if not (name.isprintable() and len(name) <= _LONGEST_NAME):  # it is shown in what is found, and in errors
        raise ValueError(f"{shown(name)} is no name of a tensor")
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"{shown(dtype)} is no format of numbers")
    numbers = [start, stop, *shape]
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers) or start > stop:
        raise ValueError(f"shape {shown(shape)}, bytes {shown(start)} to {shown(stop)}")
    if stop > size - data:
        raise ValueError(f"{size} bytes instead of {data + stop}")
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"{stop - start} bytes for {dtype} of shape {shown(shape)}")
    return StoredTensor(name, file, dtype, tuple(shape), data + start, data + stop)


def fingerprint(folder: Path, cache: Path | None = None) -> bytes:
    """32 bytes: SHA-256 over name, dtype, shape and bytes of the checkpoint's tensors, sorted by name.

    Each tensor enters as `name NUL dtype NUL dim,dim,… NUL bytes`. Reads the files in pieces of 1 MiB; the result is
    cached by path, size and modification time, in `cache`, or `fingerprints.json` of the user's cache folder.

    Raises:
        ModelNotFound, ModelError: as `stored_tensors`.
    """
    cache = cache or _cache_file()
    key = str(folder.resolve())
    stats = [(file.name, file.stat()) for file in weight_files(folder)]
    state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    known = _read_cache(cache)
    entry = known.get(key)
    if isinstance(entry, dict) and entry.get("files") == state:
        return bytes.fromhex(str(entry["fingerprint"]))
    digest = hash_of(stored_tensors(folder))
    if cache is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            cache.parent.mkdir(parents=True, exist_ok=True)
            table = known | {key: {"files": state, "fingerprint": digest.hex()}}
            write_atomically(cache, json.dumps(table, indent=1).encode(), durable=False)
    return digest


def hash_of(tensors: Mapping[str, StoredTensor]) -> bytes:
    """32 bytes: SHA-256 over tensors in this order, as `fingerprint` says."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{tensor.dtype}\0{shape}\0".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            left = tensor.size
            while left:
                piece = stream.read(min(_CHUNK, left))
                if not piece:
                    raise ModelError(str(tensor.file), "was cut short while being read", "fetch the model again")
                digest.update(piece)
                left -= len(piece)
    return digest.digest()


def cache_folder() -> Path | None:
    """Where a user keeps what can be made again; None where there is no such place."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home: a user id without an account, as in many containers
        return None
    return Path(root) / "meerkat-mq"


def _cache_file() -> Path | None:
    root = cache_folder()
    return None if root is None else root / "fingerprints.json"


def _read_cache(path: Path | None) -> dict[str, object]:
    try:
        table = parse_json(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
