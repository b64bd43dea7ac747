"""Checkpoint files: where each tensor's bytes lie, and the fingerprint over them. No torch.

Only safetensors: other formats are pickles, which run code when they are read.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from meerkat_mq.core.files import write_atomically
from meerkat_mq.errors import ModelError, ModelNotFound

_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `file[start:stop]`, dtype as safetensors names it ("F32", "BF16" …)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads.

    Raises:
        ModelNotFound: there are none.
        ModelError: the index is damaged.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        raise ModelNotFound(
            str(folder), f"has no {_SINGLE}", "convert the checkpoint: load it and call save_pretrained()"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(str(index), f"is no checkpoint index ({error})", "fetch the model again") from error
    return [folder / name for name in sorted(names)]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, ordered by the bytes of their names.

    Raises:
        ModelNotFound: a weight file is missing.
        ModelError: a weight file is damaged or cut short.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors.update(_header(file))
    return dict(sorted(tensors.items(), key=lambda item: item[0].encode()))


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            table = json.loads(stream.read(length))
        tensors = {
            name: StoredTensor(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in table.items()
            if name != "__metadata__"
        }
        longest = max((tensor.stop for tensor in tensors.values()), default=size)
        if longest > size:
            raise ValueError(f"{size} bytes instead of {longest}")
    except OSError as error:
        raise ModelNotFound(str(file), f"cannot be read ({error.strerror})", "fetch the model again") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(str(file), f"is no safetensors file ({error})", "fetch the model again") from error
    return tensors


def fingerprint(folder: Path, cache: Path | None = None) -> bytes:
    """32 bytes: SHA-256 over name, dtype, shape and bytes of the checkpoint's tensors, sorted by name.

    Each tensor enters as `name NUL dtype NUL dim,dim,… NUL bytes`. Reads the files in pieces of 1 MiB; the result is
    cached by path, size and modification time.

    Args:
        folder: the checkpoint.
        cache: the cache file; default: `fingerprints.json` in the user's cache folder.

    Raises:
        ModelNotFound, ModelError: as `stored_tensors`.
    """
    cache = cache or _cache_file()
    key = str(folder.resolve())
    state = [[file.name, stat.st_size, stat.st_mtime_ns] for file in weight_files(folder) for stat in [_stat(file)]]
    known = _read_cache(cache)
    entry = known.get(key)
    if isinstance(entry, dict) and entry.get("files") == state:
        return bytes.fromhex(str(entry["fingerprint"]))
    digest = _hash(stored_tensors(folder))
    _write_cache(cache, known | {key: {"files": state, "fingerprint": digest.hex()}})
    return digest


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise ModelNotFound(str(file), f"cannot be read ({error.strerror})", "fetch the model again") from error


def _hash(tensors: dict[str, StoredTensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{tensor.dtype}\0{shape}\0".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            left = tensor.stop - tensor.start
            while left:
                piece = stream.read(min(_CHUNK, left))
                if not piece:
                    raise ModelError(str(tensor.file), "was cut short while being read", "fetch the model again")
                digest.update(piece)
                left -= len(piece)
    return digest.digest()


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "meerkat-mq" / "fingerprints.json"


def _read_cache(path: Path) -> dict[str, object]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _write_cache(path: Path, table: dict[str, object]) -> None:
    """Best effort: a cache that cannot be written costs time, not correctness."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table, indent=1).encode(), durable=False)
