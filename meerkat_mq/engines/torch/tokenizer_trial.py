"""A tokenizer is tried in a process of its own first: what it does to a process, it does to that one.

Its library aborts where memory ends, writes its own panics to the terminal, and has no limit of time: a folder from
anybody may hold an expression that takes exponentially long, or one that makes each text endless.
"""

import contextlib
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from meerkat_mq.errors import ModelError, reason, shown

# The 64 strings whose token ids identify a tokenizer. Normative: changing one changes every fingerprint.
PROBES: tuple[str, ...] = tuple(json.loads(Path(__file__).with_name("probes.json").read_text(encoding="utf-8")))

TOKEN_KEYS = frozenset({"content", "single_word", "lstrip", "rstrip", "normalized", "special"})

_SECONDS, _SECONDS_A_MIB = 10, 2  # of processor time, and so many more for each MiB of the file
_MEMORY, _MEMORY_A_BYTE = 1 << 30, 64  # bytes, and so many more for each of the file
_REFUSED = 4
_ALONE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


def try_tokenizer(file: Path) -> None:
    """Read a tokenizer.json and apply it to the probes, within bounds of time and memory.

    Once for each state of the file. Where no process can be started, nothing is tried.

    Raises:
        ModelError: it cannot be read, or not within these bounds.
    """
    state = file.stat()
    problem = _try(str(file.resolve()), state.st_size, state.st_mtime_ns)
    if problem:
        remedy = "put this model's own tokenizer files into the folder"
        raise ModelError(str(file), f"the tokenizer cannot be loaded ({problem})", remedy)


@lru_cache(maxsize=64)
def _try(file: str, size: int, _changed: int) -> str:
    """What is wrong with it; empty where nothing is."""
    seconds, memory = _SECONDS + _SECONDS_A_MIB * (size >> 20), _MEMORY + _MEMORY_A_BYTE * size
    command = [sys.executable, "-P", "-m", __name__, file, str(seconds), str(memory)]
    try:
        done = subprocess.run(  # noqa: S603 - this very file
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | _ALONE,
            check=False,
        )
    except OSError:
        return ""
    if done.returncode < 0:
        return f"it takes more than {seconds} s or {memory >> 20:,} MiB, or ends the process that reads it"
    return done.stdout.decode(errors="replace") if done.returncode == _REFUSED else ""


def fingerprint_of(texts: Iterable[Sequence[int]]) -> bytes:
    """32 bytes: SHA-256 over the ids of texts; each enters as u32 count, then its u32 ids, little-endian."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(b"".join(value.to_bytes(4, "little") for value in [len(ids), *ids]))
    return digest.digest()


def _main(file: str, seconds: int, memory: int) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # a tighter limit is there already
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        tokenizer = Tokenizer.from_file(file)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_batch(list(PROBES))
        for token in json.loads(Path(file).read_bytes()).get("added_tokens") or ():
            if strange := token.keys() - TOKEN_KEYS - {"id"}:  # of which the library says so on stdout
                raise ValueError(f"a token has no {shown(min(strange))}")
    except BaseException as error:  # a panic in Rust is no Exception
        sys.stdout.buffer.write(reason(error).encode(errors="replace"))
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
