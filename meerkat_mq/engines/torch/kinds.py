"""Which kind of model a configuration describes: decided by its class, as transformers maps it, not by a name."""

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from meerkat_mq.engines.torch.checkpoint import StoredTensor, stored_tensors
from meerkat_mq.engines.torch.folder import CONFIG, Json, in_words, key_of, read_json
from meerkat_mq.errors import ModelError, UnsupportedModel, cut, shown

Kind = Literal["causal", "encoder"]

LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}

_BOUNDS = {  # the least and the largest value of a key
    "num_labels": (0, 1 << 16),  # each is an object in memory
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), (1, 1 << 24)),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), (1, 1 << 12)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "intermediate_size", "n_inner"), (1, 1 << 31)),
    **dict.fromkeys(("vocab_size", "head_dim", "num_attention_heads", "n_head", "n_heads"), (1, 1 << 31)),
    "num_key_value_heads": (1, 1 << 31),
}
_CAUSAL = re.compile("Causal|LMHead")  # also in a name that transformers does not know
_MOST_TRIED = 64
_MODULES = 1000  # of a model at most, and for each tensor of the checkpoint _MODULES_A_TENSOR more
_MODULES_A_TENSOR = 50
_MOST_BUFFERS = 1 << 30  # bytes
RESTORE = "restore the model's own config.json"

# Held while transformers makes a model: it then changes its own classes, such as how weights are tied, and torch's
# default dtype, for all threads; two that overlap would leave them changed for good.
MAKING = threading.Lock()
_ANOTHER = "give a causal LM (…ForCausalLM), or an encoder such as BERT or MiniLM"


@dataclass(frozen=True)
class Bare:
    """A model before its weights are read.

    Attributes:
        stored: the checkpoint's tensors.
        config: transformers' configuration.
        kind: what is loaded.
        model: names, shapes and ties, in no memory.
    """

    stored: dict[str, StoredTensor]
    config: Any
    kind: Kind
    model: Any


def bare_model(folder: Path, say: Callable[[str, str], None] = lambda *_: None) -> Bare:
    """What checkpoint and configuration say that a model is.

    Args:
        folder: after a look at it.
        say: called with "weights" and "kind", and what was found.

    Raises:
        ModelNotFound, ModelError: a file of the checkpoint is missing or damaged; or config.json describes no model,
            contradicts itself, or describes something far larger than the checkpoint; names the key where it is known.
        UnsupportedModel: it is neither a causal LM nor an encoder.
    """
    stored = stored_tensors(folder)
    say("weights", f"{len(stored)} tensors in {', '.join(sorted({tensor.dtype for tensor in stored.values()}))}")
    config = _read_config(folder, len(stored))
    kind = kind_of(config, folder)
    model = _skeleton(config, kind, folder, len(stored))
    say("kind", f"{'causal LM' if kind == 'causal' else 'encoder'}, {type(model).__name__}")
    return Bare(stored, config, kind, model)


def _read_config(folder: Path, tensors: int) -> Any:
    """The model's configuration; no model has more layers than tensors."""
    file = folder / CONFIG
    table = read_json(file)
    _check_table(file, table, tensors)
    for key in ("text_config", "vision_config", "audio_config"):
        if isinstance(table.get(key), dict):
            _check_table(file, table[key], tensors, f"{key}.")
    with in_words(partial(_place, file, table, _config), "cannot be used", RESTORE):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        config.return_dict = True  # outputs are read by name
        pad, ids = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is not None and ids is not None and not -ids <= pad < ids:  # Llama's -1 is the last
        raise ModelError(f"{file}: pad_token_id", f"{shown(pad)} is no id of the {shown(ids)} embeddings", RESTORE)
    return config


def _check_table(file: Path, table: Json, tensors: int, prefix: str = "") -> None:
    """Values that would be believed: sizes below one, layers or positions without end."""
    for key, value in table.items():
        if key == "attention_types":
            _check_repeats(f"{file}: {prefix}{key}", value, tensors)
        least, most = (1, tensors) if key in LAYERS else _BOUNDS.get(key, (0, 0))
        if most and value is not None and not (type(value) is int and least <= value <= most):
            problem = f"{shown(value)} is no integer from {least} to {most:,}"
            raise ModelError(f"{file}: {prefix}{key}", problem, "restore the model's own value")
    if not prefix:
        _check_type(file, table)


def _check_repeats(where: str, groups: object, tensors: int) -> None:
    """GPT-Neo's list of (kinds of attention, how often): transformers writes it out before it looks at the length."""
    try:
        layers = sum(len(kinds) * times for kinds, times in groups or ())  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ModelError(where, f"{shown(groups)} is no list of pairs", RESTORE) from error
    if not (type(layers) is int and layers <= tensors):
        problem = f"describes {shown(layers)} layers, and the checkpoint holds {tensors} tensors"
        raise ModelError(where, problem, RESTORE)


def _check_type(file: Path, table: Json) -> None:
    model_type, names = table.get("model_type"), table.get("architectures")
    if not isinstance(model_type, str):
        raise ModelError(f"{file}: model_type", "is missing, or no name", "give the folder of a Hugging Face model")
    if model_type not in CONFIG_MAPPING_NAMES:
        problem = f"{shown(model_type)} cannot be used: transformers {transformers.__version__} does not know it"
        raise ModelError(f"{file}: model_type", problem, "update transformers, or use another model")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"{file}: architectures", f"{shown(names)} is no list of names", "restore the model's own")


def kind_of(config: Any, folder: Path) -> Kind:
    """Causal LM or encoder, by the configuration's class; one that can be both, such as BERT, by its `is_decoder`.

    Raises:
        UnsupportedModel: it is neither, or says that it is a causal LM while its attention sees later tokens.
    """
    family, named = config.model_type, next(iter(config.architectures or ()), None)
    causal, encoder = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, family in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    where = f"{folder / CONFIG}: architectures"
    if getattr(config, "is_encoder_decoder", False) or not (causal or encoder):
        raise UnsupportedModel(where, f"{cut(named or family)} is neither a causal LM nor an encoder", _ANOTHER)
    if causal and (not encoder or getattr(config, "is_decoder", False)):
        return "causal"
    if named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or _CAUSAL.search(named or ""):
        problem = f"{cut(str(named))} is a causal LM, but is_decoder is false, so that its attention sees later tokens"
        remedy = "set is_decoder to true; or, for an encoder, architectures to the class without a head"
        raise UnsupportedModel(where, problem, remedy)
    return "encoder"


def class_of(kind: Kind) -> Any:
    """The class of transformers that loads a kind."""
    return transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel


def _skeleton(config: Any, kind: Kind, folder: Path, tensors: int) -> Any:
    """The model without weights; what has far more parts than the checkpoint has tensors is no model of it."""

    def build(config: Any) -> Any:
        with MAKING, torch.device("meta"), _few_modules(_MODULES + _MODULES_A_TENSOR * tensors):
            return class_of(kind).from_config(config, trust_remote_code=False)

    file = folder / CONFIG
    place = partial(_place, file, read_json(file), lambda table: build(_config(table)))
    with in_words(place, "cannot be used", RESTORE):
        bare = build(config)
    buffers = {name: buffer.numel() * buffer.element_size() for name, buffer in bare.named_buffers()}
    if sum(buffers.values()) > _MOST_BUFFERS:
        largest = max(buffers, key=buffers.__getitem__)
        raise ModelError(str(file), f"{largest} would take {buffers[largest]:,} bytes of memory", RESTORE)
    return bare


@contextmanager
def _few_modules(most: int) -> Iterator[None]:
    """A configuration may ask for any number of blocks, experts or streams: refuse before they take all memory."""
    builder, left = threading.get_ident(), itertools.count(most, -1)

    def count(*_: object) -> None:
        if threading.get_ident() == builder and next(left) < 0:
            raise ValueError(f"it describes more than {most:,} parts, and the checkpoint holds far fewer tensors")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _config(table: Json) -> Any:
    return transformers.AutoConfig.for_model(**table)


def _place(file: Path, table: Json, build: Callable[[Json], Any], said: str) -> str:
    """The file, and the key that is wrong: the library names it, or without it all is well."""
    key = key_of(said, table)
    if key is None:
        likely = sorted(table, key=lambda key: -table[key] if type(table[key]) is int else 0)  # a number without end
        others = [key for key in likely if key != "model_type"][:_MOST_TRIED]
        key = next((key for key in others if _works(build, {k: v for k, v in table.items() if k != key})), None)
    return f"{file}: {cut(key)}" if key else str(file)


def _works(build: Callable[[Json], Any], table: Json) -> bool:
    try:
        build(table)
    except Exception:
        return False
    return True
