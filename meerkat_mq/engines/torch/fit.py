"""Whether a configuration and a checkpoint are of one model: found from names and shapes, before weights are read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from meerkat_mq.engines.torch.checkpoint import StoredTensor
from meerkat_mq.engines.torch.folder import CONFIG, DEQUANTISE, Json, read_json
from meerkat_mq.engines.torch.kinds import LAYERS
from meerkat_mq.engines.torch.names import FLOATS, Names
from meerkat_mq.errors import ModelError, UnsupportedModel, cut, shown

NEEDLESS = re.compile(r"(^|\.)pooler\.")  # encoders are mean-pooled here

_REMEDY = "weights and config.json are of different models: take both from the same one"
_QUANTISED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".weight_scale", ".weight_scale_inv")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_fit(names: Names, stored: Mapping[str, StoredTensor], bare: Any, folder: Path) -> list[str]:
    """Make sure that the checkpoint holds the whole model, and no more of its blocks; what is left out besides.

    Args:
        names: of `bare` and `stored`.
        stored: the checkpoint's tensors.
        bare: the model without weights.
        folder: the checkpoint.

    Raises:
        ModelError: they are of different models; names the key of config.json where it is known.
        UnsupportedModel: the weights are quantised.
    """
    table = read_json(folder / CONFIG)
    _refuse_quantised(names, stored, folder)
    missing = _not_like(names.missing, [NEEDLESS.pattern, *(bare._keys_to_ignore_on_load_missing or ())])
    head = bare.get_output_embeddings()
    if missing and head is not None and dict(bare.named_parameters()).get(missing[0]) is head.weight:
        named = next(iter(bare.config.architectures or ()), "the model")
        if named == type(bare).__name__ and "tie_word_embeddings" in table:
            problem = f"is {shown(table['tie_word_embeddings'])}, and the weights hold no {missing[0]}"
            raise ModelError(f"{folder / CONFIG}: tie_word_embeddings", problem, _REMEDY)
        raise ModelError(
            f"{folder / CONFIG}: architectures",
            f"{cut(named)} is loaded as {type(bare).__name__}, whose trained head {missing[0]} the weights lack",
            "give the causal LM that it was made from",
        )
    wrong = min([*missing, *names.misshapen], default=None)
    if wrong is not None:
        raise mismatch(wrong, folder, _key(wrong, names, stored, bare, table))
    unused = _not_like(names.unused, bare._keys_to_ignore_on_load_unexpected or ())
    used = {_NUMBER.sub("#", copy) for copies in [*names.copies.values(), *names.made.values()] for copy in copies}
    blocks = [name for name in unused if _NUMBER.search(name) and _NUMBER.sub("#", name) in used]
    if blocks:
        key = _layers_key(table)
        raise ModelError(
            f"{folder / CONFIG}{key}", f"leaves out {blocks[0]} and {len(blocks) - 1} more tensors", _REMEDY
        )
    return [name for name in unused if stored[name].dtype in FLOATS]


def _refuse_quantised(names: Names, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """Weights of a quantised model whose configuration does not say so."""
    held = [copy for copies in names.copies.values() for copy in copies if stored[copy].dtype not in FLOATS]
    parts = [name for name in names.unused if name.endswith(_QUANTISED)]
    for name in [*held, *parts][:1]:
        raise UnsupportedModel(f"{folder}: {name}", f"is quantised ({stored[name].dtype})", DEQUANTISE)


def mismatch(name: str, folder: Path, key: str = "") -> ModelError:
    """The error of a parameter that the checkpoint does not hold as the configuration says."""
    return ModelError(f"{folder / CONFIG}{key}", f"the weights lack or misshape {name}", _REMEDY)


def _not_like(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if not any(pattern.search(name) for pattern in compiled)]


def _key(name: str, names: Names, stored: Mapping[str, StoredTensor], bare: Any, table: Json) -> str:
    """The key that seems to be wrong: a size that is found in the model's shape and not in the checkpoint's."""
    if name not in names.copies:
        return _layers_key(table) if _NUMBER.search(name) else ""
    shape = dict(bare.named_parameters())[name].shape
    strange = set(shape) - set(stored[names.copies[name][0]].shape)
    return next((f": {cut(key)}" for key, value in table.items() if type(value) is int and value in strange), "")


def _layers_key(table: Json) -> str:
    return next((f": {key}" for key in table if key in LAYERS), "")
