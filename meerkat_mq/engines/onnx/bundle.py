"""`meerkat bundle`: a model and a mask become a bundle, or a quantised base, where PyTorch is."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.continuations import SYSTEM, rendered
from meerkat_mq.engines.onnx.engine import OnnxEngine
from meerkat_mq.engines.onnx.families import Described, check_all_read, describe
from meerkat_mq.engines.onnx.graph import Graph, Tensor, packed
from meerkat_mq.engines.onnx.manifest import GRAPH, MANIFEST, PREFIX, TOKENIZER, WEIGHTS, open_bundle
from meerkat_mq.engines.onnx.quantise import LARGEST, Weights, dequantised, quantised
from meerkat_mq.engines.torch.checkpoint import INDEX, SINGLE, StoredTensor, weight_files
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.export import copy_file, exported_files, whole_folder, writing_in
from meerkat_mq.engines.torch.load import LoadedModel, linear_layers, load_model
from meerkat_mq.errors import ModelError, ModelMismatch, UnsupportedModel
from meerkat_mq.tasks.classification import Classification

TOLERANCE: Final = 1e-4  # of losses in a trial: two float32 implementations differ by some 1e-6

_ITEM: Final = {"F32": 4, "F16": 2, "I8": 1, "U8": 1}
_TRIAL: Final = Classification(
    name="trial",
    fields=("line",),
    template="{line} It was",
    label_words=(" good", " not at all what they had wanted"),
    text="{line}",
    descriptions=("something good", "a thing that nobody wanted"),
    max_tokens=64,
)
_TEXTS: Final = ("A short text.", "The quick brown fox jumps over the lazy dog, and over the cat that has slept there.")

Say = Callable[[str], None]


def make_bundle(source: str, mask: Mask, weights: Weights, out: Path, say: Say) -> None:
    """Write a bundle, and try it: its losses must be the model's.

    Args:
        source: the run's base model: local folder or hub id.
        mask: of the run; others with weights of the same matrices may use the bundle too.
        weights: how linear weights and embeddings are stored. They must hold the base's values exactly.
        out: a folder that does not exist yet, or is empty.
        say: told what was found.

    Raises:
        ModelMismatch: the mask is of another base.
        UnsupportedModel: the model has no graph, or the mask is of weights that a bundle does not train.
        ModelError: the base's values are none that these weights hold; out is not empty, or cannot be written.
    """
    loaded = load_model(source)
    if (loaded.fingerprint, loaded.tokenizer_fingerprint) != (mask.fingerprint, mask.tokenizer_fingerprint):
        raise ModelMismatch(str(loaded.folder), "is not the model that the mask was made on", "give the run's base")
    others = sorted({matrix.name for matrix in mask.matrices} - linear_layers(loaded.model).keys())
    if others:
        problem = f"the mask has weights that a bundle does not train: {others[0]}"
        raise UnsupportedModel(str(loaded.folder), problem, "make a mask of linear weights: no dense mask, no adapter")
    frozen = min(_block_of(matrix.name) for matrix in mask.matrices)
    built = _built(loaded, weights, {matrix.name for matrix in mask.matrices}, frozen)
    tables = _tables(loaded, built.described)
    _check_exact(loaded, sorted(_linear_names(loaded, built) | set(tables)), weights)
    kind: Weights = "int8" if weights == "int4" else weights
    tensors = list(built.tensors.values())
    for name in tables:
        tensors += packed(name, tables[name], _values(loaded)[name], kind)
    with whole_folder(out, loaded.folder) as new:
        with writing_in(out):
            for name, graph in built.graphs.items():
                (new / name).write_bytes(graph)
            write_tensors(new / WEIGHTS, tensors)
            _save_tokenizer(loaded, new / TOKENIZER)
            manifest = _manifest(loaded, weights, built.described) | {
                "matrices": {matrix.name: matrix.shape for matrix in mask.matrices},
                "files": {name: _facts(new / name) for name in (*built.graphs, WEIGHTS, TOKENIZER)},
            }
            manifest |= {"frozen": frozen} if frozen else {}
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        say(f"losses differ from the model's by {_tried(loaded, mask, new):.1e} at most")


def publish_base(source: str, weights: Weights, out: Path) -> None:
    """Write a copy of a model whose linear weights and embeddings are what a bundle of these weights gives back.

    Raises:
        UnsupportedModel: the model has no graph.
        ModelError: out is not empty, or cannot be written; or the weights are float32, which changes nothing.
    """
    if weights == "float32":
        raise ModelError("--as-base", "float32 holds every model as it is", "use --out with the model itself")
    loaded = load_model(source)
    built = _built(loaded, weights, set(), 0)
    tables, linear = _tables(loaded, built.described), _linear_names(loaded, built)
    values, dtype = _values(loaded), "F16" if weights == "float16" else "F32"
    rounded: dict[StoredTensor, tuple[str, Weights]] = {}
    for name in linear | set(tables):
        kind: Weights = "int8" if weights == "int4" and name in tables else weights
        rounded |= dict.fromkeys(loaded.names.copies[name], (name, kind))
    tensors = []
    for stored in sorted({tensor for group in loaded.names.copies.values() for tensor in group}, key=lambda t: t.name):
        if stored in rounded:
            name, kind = rounded[stored]
            make = partial(_given_back, values[name], kind)
            tensors.append(Tensor(stored.name, dtype, stored.shape, make))
        else:
            tensors.append(Tensor(stored.name, stored.dtype, stored.shape, partial(stored.read, np.uint8)))
    with whole_folder(out, loaded.folder) as new, writing_in(out):
        skipped = {file.relative_to(loaded.folder) for file in weight_files(loaded.folder)} | {Path(INDEX)}
        for place, file in exported_files(loaded.folder).items():
            if place not in skipped:
                copy_file(loaded.folder / place, file, new / place)
        write_tensors(new / SINGLE, tensors)


def _block_of(name: str) -> int:
    """The number of the block that a linear weight is in."""
    return next(int(part) for part in name.split(".") if part.isdigit())


@dataclass(frozen=True, slots=True)
class _Built:
    """The graphs of a model by the names of their files; what the weights file must hold, and what they read of it."""

    graphs: dict[str, bytes]
    tensors: dict[str, Tensor]
    used: set[str]
    described: Described


def _built(loaded: LoadedModel, weights: Weights, masked: set[str], frozen: int) -> _Built:
    """One graph, or one of the frozen blocks and one of those above."""
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()}
    count, hidden = loaded.model.config.num_hidden_layers, loaded.model.config.hidden_size
    graphs, tensors, used = dict[str, bytes](), dict[str, Tensor](), set[str]()
    for name, blocks in {PREFIX: range(frozen), GRAPH: range(frozen, count)}.items():
        if name == PREFIX and not frozen:
            continue
        graph = Graph(weights, _values(loaded), shapes, masked)
        described, output = describe(loaded, graph, blocks)
        rows = "wanted" if name == GRAPH and loaded.kind == "causal" else "tokens"
        graphs[name] = graph.model([(output, [rows, hidden])]).SerializeToString(deterministic=True)
        tensors |= {tensor.name: tensor for tensor in graph.tensors}
        used |= graph.used
    check_all_read(loaded, used)
    if loaded.names.made:
        problem = f"the checkpoint holds {min(loaded.names.made)} in several tensors"
        raise UnsupportedModel(str(loaded.folder), problem, "save the model anew by save_pretrained()")
    return _Built(graphs, tensors, used, described)


def _values(loaded: LoadedModel) -> dict[str, Callable[[], Float32Array]]:
    return {name: partial(_numbers, parameter) for name, parameter in loaded.model.named_parameters()}


def _numbers(parameter: torch.Tensor) -> Float32Array:
    found: Float32Array = parameter.detach().float().numpy()
    return found


def _linear_names(loaded: LoadedModel, built: _Built) -> set[str]:
    return linear_layers(loaded.model).keys() & built.used


def _tables(loaded: LoadedModel, described: Described) -> dict[str, tuple[int, int]]:
    names = {described.embedding, described.head or described.embedding}
    shapes = {name: parameter.shape for name, parameter in loaded.model.named_parameters() if name in names}
    return {name: (int(shape[0]), int(shape[1])) for name, shape in sorted(shapes.items())}


def _given_back(values: Callable[[], Float32Array], weights: Weights) -> npt.NDArray[np.floating[Any]]:
    """What is left of a weight that is stored like this."""
    found = values()
    if weights in LARGEST:
        return dequantised(*quantised(found, LARGEST[weights]))
    return found.astype(np.float16) if weights == "float16" else found


def _check_exact(loaded: LoadedModel, names: Sequence[str], weights: Weights) -> None:
    """Refuse weights that do not hold the base: nodes with and without PyTorch would train different models."""
    values, linear = _values(loaded), linear_layers(loaded.model)
    for name in names:
        kind: Weights = "int8" if weights == "int4" and name not in linear else weights
        if not np.array_equal(_given_back(values[name], kind), values[name]()):
            problem = f"{name} has values that {kind} does not hold: the bundle would be of another model"
            remedy = f"make that model the run's base: `meerkat bundle --weights {weights} --as-base FOLDER`"
            raise ModelError(str(loaded.folder), problem, f"{remedy}, then a mask of it")


def write_tensors(file: Path, tensors: Iterable[Tensor]) -> None:
    """A safetensors file, one tensor in memory at a time; the widest numbers come first, so that all are aligned."""
    ordered = sorted(tensors, key=lambda tensor: (-_ITEM.get(tensor.dtype, 2), tensor.name))
    header, place = dict[str, Any](), 0
    for tensor in ordered:
        size = int(np.prod(tensor.shape, dtype=np.int64)) * _ITEM.get(tensor.dtype, 2)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    head = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    head += b" " * (-len(head) % 64)
    with file.open("xb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for tensor in ordered:
            stream.write(np.ascontiguousarray(tensor.data()).data)


def _save_tokenizer(loaded: LoadedModel, file: Path) -> None:
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    if backend is None:
        problem = "its tokenizer is not of the tokenizers library"
        raise UnsupportedModel(str(loaded.folder), problem, "use a node with PyTorch for this model")
    text = backend.to_str()
    table = json.loads(text) | {"padding": None, "truncation": None}
    file.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")


def _manifest(loaded: LoadedModel, weights: Weights, described: Described) -> dict[str, Any]:
    """What does not depend on mask and files."""
    shapes = _tables(loaded, described)

    def table(name: str | None) -> dict[str, Any] | None:
        return None if name is None else {"name": name, "shape": shapes[name]}

    return {
        "format": 2,
        "kind": loaded.kind,
        "weights": weights,
        "fingerprint": loaded.fingerprint.hex(),
        "tokenizer_fingerprint": loaded.tokenizer_fingerprint.hex(),
        "max_tokens": loaded.max_tokens,
        "positions": described.positions,
        "start": loaded.start,
        "pad": loaded.tokenizer.pad_token_id or 0,
        "end": loaded.tokenizer.eos_token_id,
        "chat": _chat(loaded, ""),
        "chat_with_system": _chat(loaded, SYSTEM),
        "embedding": table(described.embedding),
        "head": table(described.head),
        "embed_scale": described.embed_scale,
        "head_cap": described.head_cap,
    }


def _chat(loaded: LoadedModel, system: str) -> dict[str, str] | None:
    """What the chat template makes of words that stand for the messages; None where it does not say each once."""
    if not getattr(loaded.tokenizer, "chat_template", None):
        return None
    try:
        asked, whole = rendered(loaded.tokenizer, system)
    except Exception:
        return None
    if system and (asked.count(system), whole.count(system)) != (1, 1):
        return None
    return {"asked": asked, "whole": whole}


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _tried(loaded: LoadedModel, mask: Mask, folder: Path) -> float:
    """How far the bundle's losses are from the model's, at theta_0 and at another theta.

    Raises:
        ModelError: too far.
    """
    task = _TRIAL.with_limit(min(_TRIAL.max_tokens, loaded.max_tokens))
    rows = [task.row_of(text, number) for number, text in enumerate(_TEXTS)]
    ours, theirs = OnnxEngine(open_bundle(folder), mask, task), TransformersEngine(loaded, mask, task)
    ours.check(mask)
    farthest = 0.0
    for theta in (mask.theta_0, (mask.theta_0 * np.float32(1.25) + np.float32(1e-3)).astype(np.float32)):
        ours.write(theta)
        theirs.write(theta)
        found, wanted = ours.losses(ours.prepare(rows)), theirs.losses(theirs.prepare(rows))
        farthest = max(farthest, float(np.abs(found - wanted).max()))
    if not farthest <= TOLERANCE:
        problem = f"the graph's losses differ from the model's by {farthest:.2g}"
        raise ModelError(str(loaded.folder), problem, "use a node with PyTorch for this model, and report it")
    return farthest
