"""Which tensors of a checkpoint hold which parameter of the model: transformers renames, fuses and ties as it loads.

Its own rules are asked, on a model without weights, so that what a mask names can be written back into the checkpoint.
Whether configuration and checkpoint are of one model is found from names and shapes too, before weights are read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from meerkat_mq.core.mask import MaskedMatrix
from meerkat_mq.engines.torch.checkpoint import StoredTensor
from meerkat_mq.engines.torch.folder import CONFIG, DEQUANTISE, Json, in_words, read_json
from meerkat_mq.engines.torch.kinds import LAYERS, bare_model
from meerkat_mq.errors import ModelError, UnsupportedModel, cut, shown

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NEEDLESS = re.compile(r"(^|\.)pooler\.")  # encoders are mean-pooled here

_PIECE = 1 << 20
_OF_TWO = "weights and config.json are of different models: take both from the same one"
_QUANTISED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".weight_scale", ".weight_scale_inv")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Names:
    """How the parameters of a model (names of `named_parameters()`) and a checkpoint's tensors belong together.

    Attributes:
        copies: by parameter, the tensors that hold it whole: more than one where tied copies are stored.
        made: by parameter, the tensors that it is put together from.
        missing: parameters and tied groups of which the checkpoint holds nothing, by the first name.
        misshapen: parameters whose tensor has another shape.
        unused: tensors that no parameter or buffer takes.
    """

    copies: dict[str, tuple[StoredTensor, ...]]
    made: dict[str, tuple[StoredTensor, ...]]
    missing: list[str]
    misshapen: list[str]
    unused: list[StoredTensor]


def stored_copies(folder: Path) -> dict[str, tuple[StoredTensor, ...]]:
    """By parameter, the tensors of the checkpoint that hold it whole, every tied copy; no weights are loaded.

    Parameters that transformers puts together from several tensors are absent.

    Raises:
        ModelNotFound, ModelError, UnsupportedModel: as `load_model`.
    """
    bare = bare_model(folder)
    return names_of(bare.model, bare.stored).copies


def names_of(model: Any, stored: Mapping[str, StoredTensor]) -> Names:
    """Hold a model's parameters, with or without weights, against a checkpoint's tensors.

    Raises:
        ModelError: transformers' rules for this model cannot be followed.
    """
    takers, made, unused = _takers(model, stored)
    groups: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    copies: dict[str, tuple[StoredTensor, ...]] = {}
    missing = []
    for aliases in groups.values():
        whole = {alias: takers[alias] for alias in aliases if alias in takers}
        parts = next((made[alias] for alias in aliases if alias in made), ())
        if parts:
            made[aliases[0]] = parts
        elif not whole:
            missing.append(aliases[0])
        elif _all_same(list(whole.values())):
            copies[aliases[0]] = tuple(whole.values())
        else:  # tied by the configuration, but not in fact: transformers leaves them apart
            copies |= {alias: (tensor,) for alias, tensor in whole.items()}
    misshapen = [name for name, found in copies.items() if any(copy.shape != parameters[name].shape for copy in found)]
    return Names(copies, made, missing, misshapen, unused)


def check_writable(found: Names, wanted: Iterable[str], folder: Path) -> None:
    """Make sure that new values of these parameters can be written back into the checkpoint.

    Raises:
        UnsupportedModel: one is put together from several tensors, or stored in no floating-point format, or its tied
            copies are stored in two.
    """
    for name in wanted:
        copies, parts = found.copies.get(name, ()), [part.name for part in found.made.get(name, ())]
        formats = sorted({copy.dtype for copy in copies})
        other = next((copy for copy in copies if copy.dtype not in FLOATS), None)
        if other is not None:
            where, problem, remedy = other.name, f"is stored as {other.dtype}", "use an unquantised checkpoint"
        elif not copies:
            made = f"is put together from {len(parts)} tensors of the checkpoint ({', '.join(parts[:2])} …)"
            where, problem = name, made if parts else "is no tensor of the checkpoint"
            remedy = "it cannot be written back: mask other weights (a method other than dense), or use another model"
        elif len(formats) > 1:
            where, remedy = name, "load the model and save it again by save_pretrained()"
            problem = f"its tied copies are stored as {' and '.join(formats)}, which would round new values differently"
        else:
            continue
        raise UnsupportedModel(f"{folder}: {where}", problem, remedy)


def check_stored(found: Names, matrices: Iterable[MaskedMatrix]) -> None:
    """Make sure that the checkpoint holds theta_0, bit for bit, where the model's names say that it lies.

    Raises:
        UnsupportedModel: transformers changes these values as it loads them.
    """
    for matrix in matrices:
        for copy in found.copies[matrix.name]:
            dtype = FLOATS[copy.dtype]
            bits = copy.read(f"i{dtype.itemsize}")[matrix.indices]
            if torch.from_numpy(bits).view(dtype).float().numpy().tobytes() != matrix.theta_0.tobytes():
                problem = f"its values are not those of {matrix.name}: transformers changes them as it loads them"
                raise UnsupportedModel(f"{copy.file}: {copy.name}", problem, "use another model")


def check_fit(names: Names, bare: Any, folder: Path) -> list[str]:
    """Make sure that the checkpoint holds the whole model, and no more of its blocks; what is left out besides.

    Raises:
        ModelError: they are of different models; names the key of config.json where it is known.
        UnsupportedModel: the weights are quantised.
    """
    table = read_json(folder / CONFIG)
    held = [copy for copies in names.copies.values() for copy in copies if copy.dtype not in FLOATS]
    quantised = [*held, *(part for part in names.unused if part.name.endswith(_QUANTISED))]
    if quantised:
        problem = f"is quantised ({quantised[0].dtype})"
        raise UnsupportedModel(f"{folder}: {quantised[0].name}", problem, DEQUANTISE)
    needless = [NEEDLESS.pattern, *(bare._keys_to_ignore_on_load_missing or ())]
    missing = [name for name in names.missing if not _is_like(name, needless)]
    head = bare.get_output_embeddings()
    if missing and head is not None and dict(bare.named_parameters()).get(missing[0]) is head.weight:
        named = next(iter(bare.config.architectures or ()), "the model")
        if named == type(bare).__name__ and "tie_word_embeddings" in table:
            problem = f"is {shown(table['tie_word_embeddings'])}, and the weights hold no {missing[0]}"
            raise ModelError(f"{folder / CONFIG}: tie_word_embeddings", problem, _OF_TWO)
        problem = f"{cut(named)} is loaded as {type(bare).__name__}, whose trained head {missing[0]} the weights lack"
        raise ModelError(f"{folder / CONFIG}: architectures", problem, "give the causal LM that it was made from")
    wrong = min([*missing, *names.misshapen], default=None)
    if wrong is not None:
        raise mismatch(wrong, folder, _key(wrong, names, bare, table))
    ignored = bare._keys_to_ignore_on_load_unexpected or ()
    unused = [tensor for tensor in names.unused if not _is_like(tensor.name, ignored)]
    held_somehow = [copy for copies in (*names.copies.values(), *names.made.values()) for copy in copies]
    used = {_NUMBER.sub("#", copy.name) for copy in held_somehow}
    blocks = [part.name for part in unused if _NUMBER.search(part.name) and _NUMBER.sub("#", part.name) in used]
    if blocks:
        problem = f"leaves out {blocks[0]} and {len(blocks) - 1} more tensors"
        raise ModelError(f"{folder / CONFIG}{_layers_key(table)}", problem, _OF_TWO)
    return [tensor.name for tensor in unused if tensor.dtype in FLOATS]


def mismatch(name: str, folder: Path, key: str = "") -> ModelError:
    """The error of a parameter that the checkpoint does not hold as the configuration says."""
    return ModelError(f"{folder / CONFIG}{key}", f"the weights lack or misshape {name}", _OF_TWO)


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _key(name: str, names: Names, bare: Any, table: Json) -> str:
    """The key that seems to be wrong: a size that is found in the model's shape and not in the checkpoint's."""
    if name not in names.copies:
        return _layers_key(table) if _NUMBER.search(name) else ""
    shape = dict(bare.named_parameters())[name].shape
    strange = set(shape) - set(names.copies[name][0].shape)
    return next((f": {cut(key)}" for key, value in table.items() if type(value) is int and value in strange), "")


def _layers_key(table: Json) -> str:
    return next((f": {key}" for key in table if key in LAYERS), "")


def _takers(
    model: Any, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, tuple[StoredTensor, ...]], list[StoredTensor]]:
    """By parameter or buffer the tensor that holds it; those made of several tensors; tensors that nothing takes."""
    with in_words(type(model).__name__, "its names cannot be followed", "update transformers, or use another model"):
        state = model.state_dict(keep_vars=True)
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        takers: dict[str, StoredTensor] = {}
        made: dict[str, list[StoredTensor]] = {}
        unused = []
        for source in sorted(stored, key=dot_natural_key):
            tensor = stored[source]
            name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
            if name not in state and source in state:
                name, pattern = rename_source_key(source, [], [], model.base_model_prefix, state)
            if name not in state:
                unused.append(tensor)
            elif pattern is not None:
                rule = next(rule for rule in converters if pattern in rule.source_patterns)
                for target in rule.target_patterns:
                    made.setdefault(name.replace(rule.target_patterns[0], target), []).append(tensor)
            elif name in takers:
                made.setdefault(name, [takers[name]]).append(tensor)
            else:
                takers[name] = tensor
    for name in made:
        takers.pop(name, None)
    return takers, {name: tuple(parts) for name, parts in made.items()}, unused


def _all_same(tensors: Sequence[StoredTensor]) -> bool:
    """Whether all hold the same values, in whatever formats."""
    first, count = tensors[0], int(np.prod(tensors[0].shape))
    return all(
        other.shape == first.shape
        and {first.dtype, other.dtype} <= FLOATS.keys()
        and all(torch.equal(_values(first, start), _values(other, start)) for start in range(0, count, _PIECE))
        for other in tensors[1:]
    )


def _values(tensor: StoredTensor, start: int) -> torch.Tensor:
    dtype = FLOATS[tensor.dtype]
    return torch.from_numpy(tensor.read(f"i{dtype.itemsize}", start, _PIECE)).view(dtype).double()
