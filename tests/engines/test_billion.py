"""Masks of models of a billion weights, by their configurations alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.billion import CONFIGS
from meerkat_mq.engines.torch.load import linear_layers
from meerkat_mq.engines.torch.masks import _counts


@pytest.mark.parametrize(
    ("name", "masked"), [("llama-3.2-1b", 973_040), ("qwen2-1.5b", 1_310_120), ("gemma-2-2b", 2_024_178)]
)
def test_how_many_weights_a_mask_keeps(name: str, masked: int) -> None:
    config, expected = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config())
    weights = {key: layer.weight for key, layer in linear_layers(model).items()}
    assert sum(_counts(weights, 1e-3).values()) == masked == expected
