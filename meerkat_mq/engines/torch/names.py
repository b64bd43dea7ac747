"""Which tensors of a checkpoint hold which parameter of the model: transformers renames, fuses and ties as it loads.

Its own rules are asked, on a model without weights, so that what a mask names can be written back into the checkpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from meerkat_mq.core.mask import MaskedMatrix
from meerkat_mq.engines.torch.checkpoint import StoredTensor, stored_tensors
from meerkat_mq.engines.torch.in_words import in_words
from meerkat_mq.engines.torch.kinds import kind_of, read_config, skeleton
from meerkat_mq.errors import UnsupportedModel

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 1 << 20


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

    copies: dict[str, tuple[str, ...]]
    made: dict[str, tuple[str, ...]]
    missing: list[str]
    misshapen: list[str]
    unused: list[str]


def stored_copies(folder: Path) -> dict[str, tuple[StoredTensor, ...]]:
    """By parameter, the tensors of the checkpoint that hold it whole, every tied copy; no weights are loaded.

    Parameters that transformers puts together from several tensors are absent.

    Raises:
        ModelNotFound, ModelError, UnsupportedModel: as `load_model`.
    """
    stored = stored_tensors(folder)
    config = read_config(folder, len(stored))
    found = names_of(skeleton(config, kind_of(config, folder), folder, len(stored)), stored)
    return {name: tuple(stored[copy] for copy in copies) for name, copies in found.copies.items()}


def names_of(model: Any, stored: Mapping[str, StoredTensor]) -> Names:
    """Hold a model's parameters against a checkpoint's tensors.

    Args:
        model: of transformers, with or without weights.
        stored: the checkpoint's tensors.

    Raises:
        ModelError: transformers' rules for this model cannot be followed.
    """
    takers, made, unused = _takers(model, stored)
    groups: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    copies: dict[str, tuple[str, ...]] = {}
    missing = []
    for aliases in groups.values():
        whole = [alias for alias in aliases if alias in takers]
        parts = next((made[alias] for alias in aliases if alias in made), ())
        if parts:
            made[aliases[0]] = parts
        elif not whole:
            missing.append(aliases[0])
        elif _all_same([stored[takers[alias]] for alias in whole]):
            copies[aliases[0]] = tuple(takers[alias] for alias in whole)
        else:  # tied by the configuration, but not in fact: transformers leaves them apart
            copies |= {alias: (takers[alias],) for alias in whole}
    misshapen = [
        name for name, found in copies.items() if any(stored[copy].shape != parameters[name].shape for copy in found)
    ]
    return Names(copies, made, missing, misshapen, unused)


def check_writable(found: Names, stored: Mapping[str, StoredTensor], wanted: Iterable[str], folder: Path) -> None:
    """Make sure that new values of these parameters can be written back into the checkpoint.

    Raises:
        UnsupportedModel: one is put together from several tensors, or stored in no floating-point format, or its tied
            copies are stored in two.
    """
    for name in wanted:
        if name not in found.copies:
            parts = found.made.get(name, ())
            raise UnsupportedModel(
                f"{folder}: {name}",
                f"is put together from {len(parts)} tensors of the checkpoint ({', '.join(parts[:2])} …)"
                if parts
                else "is no tensor of the checkpoint",
                "it cannot be written back: mask other weights (a method other than dense), or use another model",
            )
        for copy in found.copies[name]:
            if stored[copy].dtype not in FLOATS:
                raise UnsupportedModel(
                    f"{folder}: {copy}", f"is stored as {stored[copy].dtype}", "use an unquantised checkpoint"
                )
        if len(formats := sorted({stored[copy].dtype for copy in found.copies[name]})) > 1:
            raise UnsupportedModel(
                f"{folder}: {name}",
                f"its tied copies are stored as {' and '.join(formats)}, which would round new values differently",
                "load the model and save it again by save_pretrained()",
            )


def check_stored(found: Names, stored: Mapping[str, StoredTensor], matrices: Iterable[MaskedMatrix]) -> None:
    """Make sure that the checkpoint holds theta_0, bit for bit, where the model's names say that it lies.

    Raises:
        UnsupportedModel: transformers changes these values as it loads them.
    """
    for matrix in matrices:
        for copy in found.copies[matrix.name]:
            tensor = stored[copy]
            dtype = FLOATS[tensor.dtype]
            width = {8: np.uint64, 4: np.uint32, 2: np.uint16}[dtype.itemsize]
            bits = np.memmap(tensor.file, width, "r", tensor.start, (int(np.prod(tensor.shape)),))[matrix.indices]
            values = torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype).float()
            if values.numpy().tobytes() != matrix.theta_0.tobytes():
                raise UnsupportedModel(
                    f"{tensor.file}: {copy}",
                    f"its values are not those of {matrix.name}: transformers changes them as it loads them",
                    "use another model",
                )


def _takers(
    model: Any, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]], list[str]]:
    """By parameter or buffer the tensor that holds it; those made of several tensors; tensors that nothing takes."""
    with in_words(type(model).__name__, "its names cannot be followed", "update transformers, or use another model"):
        state = model.state_dict(keep_vars=True)
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        takers: dict[str, str] = {}
        made: dict[str, list[str]] = {}
        unused = []
        for tensor in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
            if name not in state and tensor in state:
                name, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
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


def _all_same(tensors: list[StoredTensor]) -> bool:
    """Whether all hold the same values."""
    first = tensors[0]
    return all(other.shape == first.shape and _same(first, other) for other in tensors[1:])


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if not {one.dtype, other.dtype} <= FLOATS.keys():
        return False
    count = int(np.prod(one.shape))
    return all(
        torch.equal(_values(one, start, count).double(), _values(other, start, count).double())
        for start in range(0, count, _PIECE)
    )


def _values(tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
    dtype = FLOATS[tensor.dtype]
    size = dtype.itemsize
    piece = np.fromfile(tensor.file, np.uint8, min(_PIECE, count - start) * size, offset=tensor.start + start * size)
    return torch.from_numpy(piece).view(dtype)
