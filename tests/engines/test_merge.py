"""A LoRA adapter as the base of a run: what PEFT merges, from files that may be hostile."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from meerkat_mq.config import NodeConfig, check_config
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import make_engine
from meerkat_mq.engines.torch.checkpoint import fingerprint
from meerkat_mq.engines.torch.merge import base_folder, read_adapter
from meerkat_mq.errors import ConfigError, ModelError, ModelMismatch, ModelNotFound, UnsupportedModel
from tests.engines import tiny
from tests.support.command import Meerkat

LAYERS = {
    "llama": ["q_proj", "k_proj", "model.layers.1.mlp.down_proj"],
    "llama-bf16": ["q_proj", "k_proj"],
    "gpt2": ["c_attn", "c_proj"],  # of the attention, c_proj is square
    "bert": ["query", "output.dense"],
}
FAMILIES = {"bert": AutoModel}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Adapt = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which PEFT looks at


def peft_model(base: Path, name: str, **settings: Any) -> Any:
    """A model with a random adapter."""
    torch.manual_seed(7)
    model = FAMILIES.get(name, AutoModelForCausalLM).from_pretrained(base)
    chosen = {"r": 3, "lora_alpha": 5, "target_modules": LAYERS[name], "fan_in_fan_out": name == "gpt2"} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    for key, weight in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture
def adapt(folders: dict[str, Path], tmp_path: Path) -> Adapt:
    """The folder of an adapter, as PEFT saves it."""

    def make(name: str = "llama", **settings: Any) -> Path:
        peft_model(folders[name], name, **settings).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("llama", {"use_rslora": True}), ("llama-bf16", {}), ("gpt2", {}), ("bert", {"lora_alpha": 1})],
)
def test_it_is_merged_as_peft_merges(
    folders: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    model = peft_model(folders[name], name, **settings)
    model.save_pretrained(tmp_path / "adapter")
    made = Path(base_folder(folders[name], tmp_path / "adapter"))
    expected = dict(model.merge_and_unload().named_parameters())
    found = dict(FAMILIES.get(name, AutoModelForCausalLM).from_pretrained(made).named_parameters())
    base = dict(FAMILIES.get(name, AutoModelForCausalLM).from_pretrained(folders[name]).named_parameters())
    assert found.keys() == expected.keys()
    changed = {key for key in base if not torch.equal(base[key], found[key])}
    assert {key for key in base if not torch.equal(base[key], expected[key])} == changed != set()
    for key, value in found.items():
        rounding = 2.0**-7 if value.dtype == torch.bfloat16 else 1e-6  # PEFT rounds the product too
        torch.testing.assert_close(value, expected[key], rtol=rounding, atol=rounding)
    assert fingerprint(made) != fingerprint(folders[name])


def test_each_bit_is_that_of_the_sum(folders: dict[str, Path], adapt: Adapt) -> None:
    adapter = adapt("llama-bf16", use_rslora=True)
    made = load_file(Path(base_folder(folders["llama-bf16"], adapter)) / "model.safetensors")
    base, parts = load_file(folders["llama-bf16"] / "model.safetensors"), load_file(adapter / WEIGHTS)
    name = "model.layers.0.self_attn.k_proj"
    a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "AB")
    added = sum(np.multiply.outer(b[:, rank], a[rank]) for rank in range(3))
    after = base[f"{name}.weight"].double().numpy() + 5 / math.sqrt(3) * added
    assert torch.equal(made[f"{name}.weight"], torch.from_numpy(after).float().bfloat16())


def test_it_is_made_once_and_its_name_tells_what_it_is_of(
    folders: dict[str, Path], adapt: Adapt, copy: Callable[[str], Path]
) -> None:
    adapter, said = adapt(), list[str]()
    made = base_folder(folders["llama"], adapter, said.append)
    written = (Path(made) / "model.safetensors").stat().st_mtime_ns
    assert base_folder(folders["llama"], str(adapter)) == made == said[0]
    assert (Path(made) / "model.safetensors").stat().st_mtime_ns == written
    assert base_folder(folders["llama"], None) == str(folders["llama"])
    other = copy("llama")
    tiny.change(other / "config.json", rms_norm_eps=0.1)
    tiny.change(adapter / CONFIG, lora_dropout=0.5, task_type="CAUSAL_LM")
    assert base_folder(folders["llama"], adapter) == made
    places = {made, base_folder(other, adapter)}
    tiny.change(adapter / CONFIG, lora_alpha=6)
    places.add(base_folder(folders["llama"], adapter))
    assert len(places) == 3


SETTINGS: dict[str, tuple[Any, str]] = {
    "peft_type": ("SHIRA", "peft_type: is 'SHIRA', not LORA"),
    "use_dora": (True, "use_dora: is True, which is not supported"),
    "bias": ("lora_only", "bias: is 'lora_only': trained biases are not merged"),
    "modules_to_save": (["lm_head"], "modules_to_save: is ['lm_head']"),
    "rank_pattern": ({"q_proj": 4}, "rank_pattern: is {'q_proj': 4}"),
    "alpha_pattern": ({"(a+)+$": 4}, "alpha_pattern: is"),
    "layer_replication": ([[0, 2]], "layer_replication: is"),
    "init_lora_weights": ("pissa", "init_lora_weights: 'pissa' changes the base model too"),
    "a_setting_of_tomorrow": (0.5, "a_setting_of_tomorrow: is 0.5, which is not supported"),
    "r": (1000, "r: 1000 is no integer from 1 to 256"),
    "lora_alpha": (1e999, "lora_alpha: inf is no number above 0"),
    "use_rslora": ("yes", "use_rslora: 'yes' is neither true nor false"),
    "target_modules": (["q_proj"], "target_modules: does not name"),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_would_change_the_sum_are_refused_by_name(adapt: Adapt, key: str) -> None:
    value, words = SETTINGS[key]
    folder = adapt()
    tiny.change(folder / CONFIG, **{key: value})
    with pytest.raises(ModelError) as raised:
        read_adapter(folder)
    assert words in str(raised.value)


def test_an_expression_for_modules_is_not_followed(adapt: Adapt) -> None:
    folder = adapt()
    tiny.change(folder / CONFIG, target_modules="(a+)+$", a_setting_that_is_off=None)
    assert len(read_adapter(folder).pairs) == 5


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _put(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    return kept if value is None else kept | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{Q}.lora_B.weight", None, "holds only A of model.layers.0.self_attn.q_proj"),
        (f"{Q}.lora_A.weight", torch.zeros(4, 32), "is F32 (4, 32), and the rank is 3"),
        (f"{Q}.lora_A.weight", torch.zeros(3, 32, dtype=torch.int8), "is I8 (3, 32)"),
        (f"{Q}.lora_A.weight", torch.zeros(3, 33), "has (32, 33) for model.layers.0.self_attn.q_proj"),
        (f"{Q}.lora_A.weight", torch.full((3, 32), torch.nan), "that F32 cannot hold"),
        (f"{Q}.lora_B.weight", torch.full((32, 3), 1e300, dtype=torch.float64), "that F32 cannot hold"),
        (f"{Q}.lora_magnitude_vector", torch.zeros(32), "is neither A nor B of a linear layer"),
        ("base_model.model.lm_head.weight", torch.zeros(2, 2), "is neither A nor B of a linear layer"),
    ],
)
def test_tensors_that_do_not_fit(
    folders: dict[str, Path], adapt: Adapt, name: str, value: torch.Tensor | None, words: str
) -> None:
    folder = adapt()
    save_file(_put(load_file(folder / WEIGHTS), name, value), folder / WEIGHTS)
    with pytest.raises(ModelError) as raised:
        base_folder(folders["llama"], folder)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("model.layers.9.self_attn.q_proj", "has no such layer"),
        ("model.embed_tokens", "has a Embedding there that cannot be merged into"),
        ("model.layers.0.mlp", "that cannot be merged into"),
        ("../../etc", "has no such layer"),
    ],
)
def test_layers_that_the_model_does_not_have(folders: dict[str, Path], adapt: Adapt, layer: str, words: str) -> None:
    folder = adapt()
    more = {f"base_model.model.{layer}.lora_{p}.weight": torch.zeros(s) for p, s in (("A", (3, 32)), ("B", (32, 3)))}
    save_file(load_file(folder / WEIGHTS) | more, folder / WEIGHTS)
    tiny.change(folder / CONFIG, target_modules=None)
    with pytest.raises(UnsupportedModel, match="give the model that the adapter was trained on") as raised:
        base_folder(folders["llama"], folder)
    assert words in str(raised.value)


def test_a_weight_that_another_layer_shares(tmp_path: Path) -> None:
    base = tiny.save(tiny.llama(tie_word_embeddings=True), tmp_path / "tied")
    folder = tmp_path / "adapter"
    folder.mkdir()
    parts = {"A": torch.zeros(3, 32), "B": torch.zeros(tiny.VOCABULARY, 3)}
    save_file({f"base_model.model.lm_head.lora_{p}.weight": v for p, v in parts.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3}))
    with pytest.raises(UnsupportedModel, match="lm_head"):
        base_folder(base, folder)


def test_folders_that_are_no_adapter(folders: dict[str, Path], adapt: Adapt, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"adapter .*absent: no such folder; give the folder of a LoRA adapter"):
        read_adapter(tmp_path / "absent")
    with pytest.raises(ModelNotFound, match=r"has no adapter_config\.json"):
        read_adapter(folders["llama"])
    folder = adapt()
    shutil.move(folder / WEIGHTS, folder / "adapter_model.bin")
    with pytest.raises(ModelNotFound, match=r"has no adapter_model\.safetensors, but a pickle, which can run code"):
        read_adapter(folder)
    (folder / WEIGHTS).symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match="is a link out of the model folder"):
        read_adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="is no safetensors file"):
        read_adapter(folder)


def test_a_run_on_a_merged_base(meerkat: Meerkat, folders: dict[str, Path], adapt: Adapt, tmp_path: Path) -> None:
    adapter = adapt()
    (tmp_path / "t.txt").write_text("\n\n".join(tiny.TEXTS))
    made = meerkat(
        *("mask", "--model", folders["llama"], "--adapter", adapter, "--text", tmp_path / "t.txt"),
        *("--out", tmp_path / "m.mkm", "--method", "magnitude", "--density", 0.1, "--sequences", 2, "--length", 16),
    )
    assert made.code == 0, made
    assert "model and adapter are merged in" in made.err
    mask = Mask.load(tmp_path / "m.mkm")
    assert mask.fingerprint == fingerprint(Path(base_folder(folders["llama"], adapter)))
    make_engine("transformers", Setup(mask, tiny.TASK, str(folders["llama"]), adapter=str(adapter)), "a test")
    with pytest.raises(ModelMismatch, match="another checkpoint"):
        make_engine("transformers", Setup(mask, tiny.TASK, str(folders["llama"])), "a test")


def test_a_node_with_an_adapter_names_its_model() -> None:
    table = {"id": "n", "federation": "f", "data": "d", "state_dir": "s", "adapter": "a"}
    with pytest.raises(ConfigError, match="adapter is merged into a model: name its base as model"):
        check_config(table, NodeConfig, where="node.toml")
