"""The folder of a model, looked at before any library reads it: what it is, and what it would have picked up. No torch.

transformers follows what a folder says: code to run, an adapter to add, other weights to read. None of this is in the
fingerprint that server and nodes agree on, so a folder that asks for it is refused. It may come from anybody: a link
that leads out of it is refused before it is opened.
"""

import asyncio
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from meerkat_mq.core.foreign import parse_json, real_file, unreadable
from meerkat_mq.errors import MeerkatError, ModelError, ModelNotFound, UnsupportedModel, cut, reason, shown

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER = "adapter_config.json"

_MOST_BYTES = {CONFIG: 16 << 20, TOKENIZER_CONFIG: 64 << 20, ADAPTER: 1 << 20}
_MOST_BYTES_ELSE = 128 << 20  # the largest tokenizer.json that we know has 33 MB
_DEEPEST = 64
_LONGEST_WAY = 120  # characters
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_WEIGHTS = ["*.json", "*.safetensors", "*.txt", "*.model"]
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite"}
_PARTS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_CHOICE = re.compile(r".*(attn|experts)_implementation.*")
_OWN_CODE = {"eager", "sdpa", "batched_mm", "grouped_mm"}  # others are fetched from the hub, or compiled when they run
_COMPILED = {"rwkv", "yoso", "mra"}
_FIELD = re.compile(r"Validation error for '?(?:field )?'?(\w+)'?")
_GGUF = ".gguf"
_FETCH = "fetch the model again"
_ORIGINAL = "give the folder of the model that it was made from, with safetensors"
_BESIDE = "give the model alone, and the adapter's folder as adapter (--adapter)"
DEQUANTISE = "give the original, unquantised model"

Json = dict[str, Any]


def find_folder(source: str | Path) -> Path:
    """The local folder of a model, after a look at it; a hub id is fetched, or found in the hub cache.

    Of a hub id the small files come first, so that weights are fetched only for a model that can be used.

    Raises:
        ModelNotFound: neither a folder with a config.json nor a hub id that can be resolved.
        ModelError, UnsupportedModel: as `look_at_folder`.
    """
    folder = Path(source)
    if is_folder(folder):
        look_at_folder(folder)
        return folder
    name = str(source)
    if folder.suffix and folder.is_file():
        gguf = folder.suffix == _GGUF
        what, remedy = ("a GGUF file (of llama.cpp)", _ORIGINAL) if gguf else ("a file", "give the folder of the model")
        raise ModelNotFound(name, f"is {what}, not a folder", remedy)
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFound(name, "no such folder", "give the folder of a Hugging Face model, or a hub id")
    for patterns in (["*.json"], _HUB_WEIGHTS):
        folder = _from_hub(name, patterns)
        look_at_folder(folder)
    return folder


def _from_hub(name: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        problem = f"is no folder here, and the hub does not give it ({reason(error)})"
        raise ModelNotFound(name, problem, "check the name, or download the model and give its folder") from error


def look_at_folder(folder: Path) -> None:
    """Make sure that a folder holds a plain model, and nothing that would be picked up beside it.

    Raises:
        ModelNotFound: it has no config.json.
        ModelError: it holds code, an adapter, other weights, or a link that leads out of it; or it cannot be read.
        UnsupportedModel: its weights are quantised.
    """
    is_one = any(os.path.lexists(folder / name) for name in (CONFIG, ADAPTER))
    files = model_files(folder) if is_one else {}  # what leads out of any other folder is not what is wrong
    if Path(ADAPTER) in files:
        _refuse_adapter(folder, whole=Path(CONFIG) in files)
    if Path(CONFIG) not in files:
        raise _no_config(folder)
    config = read_json(folder / CONFIG)
    _refuse_code(folder / CONFIG, config)
    if Path(TOKENIZER_CONFIG) in files:
        _refuse_code(folder / TOKENIZER_CONFIG, read_json(folder / TOKENIZER_CONFIG))
    _refuse_quantised(folder / CONFIG, config)
    for name in files:
        if _PARTS.fullmatch(str(name)):
            problem = "is a part of a distributed checkpoint"
            raise ModelError(str(folder / name), problem, "save it whole by save_pretrained()")
        if name.suffix == ".json":
            _check_size(folder / name)


def read_json(file: Path) -> Json:
    """A JSON object, of bounded size and depth.

    Raises:
        ModelError: it cannot be read, or is none.
    """
    _check_size(file)
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds {type(found).__name__}, not an object")
    except OSError as error:
        raise ModelError(str(file), f"cannot be read ({error.strerror})", "let this user read it") from error
    except (ValueError, TypeError) as error:
        said = reason(error) if isinstance(error, TypeError) else f"it is not JSON: {reason(error)}"
        raise ModelError(str(file), f"cannot be used ({said})", _FETCH) from error
    if any(len(path) > _DEEPEST for path, _ in walk(found)):
        raise ModelError(str(file), f"is nested more than {_DEEPEST} levels deep", _FETCH)
    return found


def _check_size(file: Path) -> None:
    most = _MOST_BYTES.get(file.name, _MOST_BYTES_ELSE)
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ModelError(str(file), f"cannot be read ({error.strerror})", _FETCH) from error
    if size > most:
        raise ModelError(str(file), f"has {size:,} bytes; {most:,} are the most", _FETCH)


def walk(found: Json) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value inside, with its path, without recursion; deeper ones than are allowed are not entered."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), found)]
    while waiting:
        path, value = waiting.pop()
        yield path, value
        if len(path) <= _DEEPEST:
            inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            waiting.extend(((*path, str(key)), item) for key, item in inner)


def place_in(file: Path, path: Sequence[str]) -> str:
    """A file and the way to a value in it, for an error."""
    return f"{file}: {cut('.'.join(path), _LONGEST_WAY)}"


def _refuse_code(file: Path, found: Json) -> None:
    """Whatever makes transformers run code or read weights that lie in the folder or on the hub, or compile code."""
    for path, value in walk(found):
        key, problem, remedy = path[-1] if path else "", "", "remove the key"
        chooses = any(_CHOICE.fullmatch(part) for part in path)  # one for all, or a table by part of the model
        if key == "auto_map" and value:
            problem = "names code that belongs to the model; Meerkat-MQ never runs code from a model"
            remedy = "use a model whose class transformers has itself; if it has this one, remove the key"
        elif key == "transformers_weights" and value:
            problem = f"names weights of its own ({shown(value)})"
        elif chooses and isinstance(value, str) and value not in _OWN_CODE:
            problem = f"names code of another place or code to compile ({shown(value)})"
        elif key == "model_type" and isinstance(value, str) and value in _COMPILED:
            problem = f"for {value!r} transformers looks for a compiler, and for code on the hub"
            raise UnsupportedModel(place_in(file, path), problem, "use another model")
        if problem:
            raise ModelError(place_in(file, path), problem, remedy)


def _refuse_adapter(folder: Path, *, whole: bool) -> None:
    if whole:
        problem = "is an adapter beside a whole model, which transformers would add without a word"
        raise ModelError(str(folder / ADAPTER), problem, f"take its files away, or {_BESIDE}")
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    raise ModelError(str(folder), f"is an adapter (of {shown(base)}), not a model", _BESIDE)


def _refuse_quantised(file: Path, config: Json) -> None:
    for path, value in walk(config):
        if path and path[-1] in ("quantization_config", "quantization") and isinstance(value, dict):
            method = next((cut(str(value[key])) for key in ("quant_method", "bits") if key in value), "some method")
            raise UnsupportedModel(place_in(file, path), f"its weights are quantised ({method})", DEQUANTISE)
    if (file.parent / "quantize_config.json").exists():
        raise UnsupportedModel(str(file.parent / "quantize_config.json"), "its weights are quantised", DEQUANTISE)


def _no_config(folder: Path) -> ModelNotFound:
    """What the folder seems to hold instead of a model."""
    names = sorted(path.name for path in folder.iterdir())
    gguf = [name for name in names if name.endswith(_GGUF)]
    inner = [name for name in names if (folder / name / CONFIG).is_file()]
    what, remedy = "", "give the folder of a Hugging Face model"
    if gguf:
        what, remedy = f" (it holds GGUF files of llama.cpp: {gguf[0]})", _ORIGINAL
    elif "params.json" in names:
        what, remedy = " (it holds a checkpoint in its maker's own format: params.json)", "convert it by transformers"
    elif inner:
        what, remedy = f" (it holds a model in {inner[0]})", f"give {folder / inner[0]}"
    return ModelNotFound(str(folder), f"has no {CONFIG}{what}", remedy)


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or `ModelNotFound` where the way there cannot be read."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in a name
        return False
    except OSError as error:
        raise unreadable(path, error) from error


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
            raise unreadable(place, error) from error
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith(".") or path.suffix in _OTHER_WEIGHTS:
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            else:
                found[path.relative_to(folder)] = real_file(path, folder)
    return found


@contextmanager
def in_words(where: str | Callable[[str], str], what: str, remedy: str) -> Iterator[None]:
    """Errors of a library inside this block become ModelErrors; it may raise all kinds, assertions and panics of Rust.

    Args:
        where: the file or folder that the library reads; or what finds it, and the key in it, from the library's words.
        what: what then holds of it, such as "cannot be loaded".
        remedy: what to do about it.
    """
    try:
        yield
    except (MeerkatError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        place = where if isinstance(where, str) else where(str(error))
        raise ModelError(place, f"{what} ({reason(error)})", remedy) from error


def key_of(said: str, table: Mapping[str, object]) -> str | None:
    """The key of a table that a library's words are about: it says its name, or quotes its value."""
    field = _FIELD.search(said)
    if field:
        return cut(field[1])
    quoted = (key for key, value in table.items() if isinstance(value, str) and len(value) > 1 and f"'{value}'" in said)
    named = (key for key in table if re.search(rf"\b{re.escape(key)}\b", said))
    key = next(quoted, None) or next(named, None)
    return key and cut(key)
