"""Bundles of tiny models, where ONNX Runtime is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.extras import missing
from tests.engines import tiny
from tests.engines.test_continuations import TEMPLATE

Bundled = Callable[..., tuple[Path, Path, Mask]]


def families() -> dict[str, Callable[[], Any]]:
    """Random models of each family that has a graph."""
    import transformers

    sizes = {**tiny.SIZES, "initializer_range": 0.2, "vocab_size": tiny.VOCABULARY + 8}  # Qwen's class adds a token
    grouped = {**sizes, "num_key_value_heads": 2}
    scaled = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    return {
        "llama": tiny.llama,
        "llama-scaled": lambda: tiny.llama(rope_parameters=scaled),
        "llama-tied": lambda: tiny.llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**grouped)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**grouped)),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**grouped, head_dim=16)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**grouped, head_dim=8, query_pre_attn_scalar=8, sliding_window=64)
        ),
        "bert": tiny.bert,
    }


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Bundled:
    """Make, once, a base of a family that these weights hold, its mask and its bundle: (base, bundle, mask)."""
    if lacking := missing("onnx") or missing("bundle"):
        pytest.skip(f"{lacking}: pip install 'meerkat-mq[onnx,bundle]'")
    from meerkat_mq.engines.onnx.bundle import make_bundle, publish_base
    from meerkat_mq.engines.onnx.quantise import Weights

    made: dict[tuple[str, Weights, Path | None], tuple[Path, Path, Mask]] = {}
    root = tmp_path_factory.mktemp("bundles")

    def make(family: str, weights: Weights = "float32", genuine: Path | None = None) -> tuple[Path, Path, Mask]:
        if (family, weights, genuine) not in made:
            torch.manual_seed(0)
            name = family.removesuffix("-chat").removesuffix("-upper")
            place = root / f"{'genuine' if genuine else family}-{weights}"
            folder = base = genuine or tiny.save(families()[name](), place)
            if family.endswith("-chat"):
                (folder / "chat_template.jinja").write_text(TEMPLATE)
            if weights != "float32":
                base = place.with_name(f"{place.name}-base")
                publish_base(str(folder), weights, base)
            settings: dict[str, Any] = {"density": 0.1, "from_layer": 1 if family.endswith("-upper") else 0}
            mask = make_mask(load_model(base), tiny.TEXTS, "magnitude", **settings, **tiny.SMALL)
            out = place.with_name(f"{place.name}-bundle")
            make_bundle(str(base), mask, weights, out, lambda _: None)
            made[family, weights, genuine] = base, out, mask
        return made[family, weights, genuine]

    return make
