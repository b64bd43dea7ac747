import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.pretrain_demo import Recipe, pretrain, train_tokenizer
from meerkat_mq.core.mask import Mask
from meerkat_mq.demo.corpus import TASK, pretraining_text, triage_rows
from meerkat_mq.demo.settings import DEMO, WEIGHTS
from meerkat_mq.engines.evaluate import evaluate, first_order
from meerkat_mq.engines.prompts import candidate_ids
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SMALL = Recipe(vocabulary=400, hidden=16, layers=1, heads=2, intermediate=32, steps=4, batch=2, length=16, warmup=2)

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module", autouse=True)
def torch_state() -> Iterator[None]:
    """One thread: several would wait for each other beside parallel tests; and what `pretrain` sets is undone."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def mask() -> Mask:
    texts = list(pretraining_text(1000, DEMO.calibration_lines))
    return make_mask(load_model(WEIGHTS), texts, density=DEMO.density, sequences=64, length=DEMO.calibration_tokens)


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model(WEIGHTS)


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) <= 4_000_000


def test_the_model_is_what_the_recipe_says(loaded: LoadedModel) -> None:
    recipe, config = Recipe(), loaded.model.config
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 935_040
    assert (config.vocab_size, config.hidden_size) == (recipe.vocabulary, recipe.hidden)
    assert (config.num_hidden_layers, config.intermediate_size) == (recipe.layers, recipe.intermediate)
    assert loaded.exact


def test_the_shipped_tokenizer_is_what_the_recipe_makes() -> None:
    made = json.loads(train_tokenizer(Recipe()).backend_tokenizer.to_str())
    assert made == json.loads((WEIGHTS / "tokenizer.json").read_text())


def test_label_words_are_one_token_each_and_lines_fit(loaded: LoadedModel) -> None:
    assert [len(ids) for ids in candidate_ids(loaded.tokenizer, TASK)] == [1, 1, 1, 1]
    prompts = [TASK.template.format(**row) for row in triage_rows(0, 500, "held-out")]
    assert max(map(len, loaded.tokenizer(prompts)["input_ids"])) < TASK.max_tokens


def test_a_line_survives_the_tokenizer(loaded: LoadedModel) -> None:
    line = "08:21 WARN pump-07: größer {x}\tand 12345 things; temp 21 C"
    assert loaded.tokenizer.decode(loaded.tokenizer(line)["input_ids"], skip_special_tokens=True) == line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_knows_the_causes_but_has_room_to_learn(mask: Mask, dtype: str) -> None:
    engine = TransformersEngine(load_model(WEIGHTS, dtype=dtype), mask, TASK)
    found = evaluate(engine, triage_rows(11, 400, "held-out"))
    assert found.figures["majority"] + 0.05 <= found.accuracy <= 0.75


def test_the_mask_reaches_well_beyond_fifteen_points(mask: Mask, loaded: LoadedModel) -> None:
    engine = TransformersEngine(loaded, mask, TASK)
    held_out = triage_rows(12, 400, "held-out")
    before = evaluate(engine, held_out).accuracy
    first_order(engine, mask.theta_0, triage_rows(12, 800, "train"), steps=60, lr=1e-2)
    assert evaluate(engine, held_out).accuracy >= before + 0.2


def test_pretraining_again_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = tmp_path / "first", tmp_path / "second"
    losses = [pretrain(SMALL, folder, Console(quiet=True)) for folder in folders]
    assert losses[0] == losses[1]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert set(contents[0]) == FILES
    assert contents[0] == contents[1]


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    def weights(seed: int) -> dict[str, Any]:
        pretrain(replace(SMALL, seed=seed), tmp_path / str(seed), Console(quiet=True))
        return dict(load_model(tmp_path / str(seed)).model.state_dict())

    first, second = weights(1), weights(2)
    assert not any(torch.equal(first[name], second[name]) for name in first if "proj" in name)
