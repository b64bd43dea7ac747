"""Proof of an exported model by what loads: its bytes are compared by `export.check_export`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.torch.adapter import adapter_pairs
from meerkat_mq.engines.torch.checkpoint import INDEX, weight_files
from meerkat_mq.engines.torch.engine import TransformersEngine, to_numpy
from meerkat_mq.engines.torch.export import CARD, changes_of, exported_files
from meerkat_mq.engines.torch.folder import find_folder
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.names import FLOATS, stored_copies
from meerkat_mq.engines.torch.scoring import mean_loss, scorer_for
from meerkat_mq.engines.torch.tokenizer_trial import PROBES
from meerkat_mq.errors import ModelMismatch
from meerkat_mq.tasks.task import Task

# Of the largest output: what may differ where an adapter is merged, since W + 2·B·A is rounded to the stored format.
MERGED_TOLERANCE = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}

_TEXTS = [text for text in PROBES if len(text) >= 20][:8]

Outputs = dict[str, Float32Array]


def check_loaded(folder: Path, source: str | Path, mask: Mask, theta: Float32Array, task: Task) -> None:
    """Load the base and its export in `folder` as `from_pretrained` does, write theta into the base, and compare both.

    Theta is written through the engine, as nodes and server do, after it was rounded to the checkpoint's formats. Both
    models are loaded in float32, which holds these exactly, one after the other. Then what the tokenizers make of the
    probes, every parameter by its name, the outputs over eight texts, and scores and losses of eight rows of the task
    must be the same, bit for bit. Of an adapter, whose export is merged, no parameters are compared, and outputs may
    differ by `MERGED_TOLERANCE`.

    Raises:
        ModelNotFound, ModelError: one of the two does not load.
        ModelMismatch: names what differs.
        MissingExtra: the mask is an adapter's, and peft is not installed.
    """
    base = find_folder(source)
    rounded, formats = _rounded(base, mask, theta)
    merged = bool(adapter_pairs(mask))
    engine = TransformersEngine(load_model(base), mask, task)
    engine.write(theta if merged else rounded)
    expected = _look(engine.loaded, task)
    del engine
    found = _look(load_model(folder, finite=False), task)
    tolerance = max(map(MERGED_TOLERANCE.__getitem__, formats)) if merged else 0.0
    problem = next(_differences(expected, found, tolerance, parameters=not merged), None)
    if problem is not None:
        problem += _altered(folder, base)
        raise ModelMismatch(str(folder), problem, "export the model again, and change no file of it")


@dataclass(frozen=True, slots=True)
class _Look:
    """Of a loaded model: its tokenizer's fingerprint, a digest of each parameter by all of its names, its outputs."""

    tokenizer: bytes
    parameters: dict[str, bytes]
    outputs: Outputs


def _look(loaded: LoadedModel, task: Task) -> _Look:
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()  # sums can depend on where a tensor begins in memory
    with torch.inference_mode():
        outputs = _outputs(loaded, task)
    made_up = set(loaded.names.missing)  # such as a BERT's pooler: drawn anew at each load, and never used
    digests = {name: _digest(value) for name, value in loaded.model.state_dict().items() if name not in made_up}
    return _Look(loaded.tokenizer_fingerprint, digests, outputs)


def _differences(expected: _Look, found: _Look, tolerance: float, *, parameters: bool) -> Iterator[str]:
    if found.tokenizer != expected.tokenizer:
        yield "its tokenizer gives other ids than the base's"
    for name in sorted(expected.parameters.keys() | found.parameters.keys()):
        if parameters and expected.parameters.get(name) != found.parameters.get(name):
            yield f"{name} does not load as base and theta give it"
    for what, wanted in expected.outputs.items():
        values = found.outputs[what]
        if wanted.shape != values.shape:
            yield f"{what}: shape {values.shape}, base and theta give {wanted.shape}"
        elif not np.array_equal(values, wanted, equal_nan=True):
            apart = float(np.abs(values - wanted).max())
            if not apart <= tolerance * float(np.abs(wanted).max()):
                yield f"{what} differ by up to {apart:.3g} from what base and theta give"


def _altered(folder: Path, base: Path) -> str:
    """Which file may be the reason, in brackets."""
    ours = exported_files(base)
    for name in sorted(
        ours.keys() - {file.relative_to(base) for file in weight_files(base)} - {Path(INDEX), Path(CARD)}
    ):
        theirs = folder / name
        if not theirs.is_file() or theirs.read_bytes() != ours[name].read_bytes():
            return f" ({name} is not the base's)"
    return ""


def _outputs(loaded: LoadedModel, task: Task) -> Outputs:
    """Of each text, logits of a causal LM, or hidden states of an encoder; of a row made of it, scores and loss."""
    scorer, found = scorer_for(loaded, task), Outputs()
    for number, text in enumerate(_TEXTS):
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"][: loaded.max_tokens]], device=loaded.model.device)
        if loaded.kind == "causal":
            found[f"logits of {text!r}"] = to_numpy(loaded.model(input_ids=ids, use_cache=False).logits[0])
        else:
            found[f"states of {text!r}"] = to_numpy(loaded.model(input_ids=ids).last_hidden_state[0])
        example = task.example(task.row_of(text, number))
        one_pass: Any = scorer.collate(scorer.tokens([example]))
        scores = scorer.scores([one_pass])
        found[f"scores of the row {text!r}"] = to_numpy(scores)
        label = torch.tensor([example.answer], device=scores.device)
        found[f"loss of the row {text!r}"] = to_numpy(mean_loss(scores, label))
    return found


def _rounded(base: Path, mask: Mask, theta: Float32Array) -> tuple[Float32Array, set[str]]:
    """Theta as the checkpoint's formats hold it, and which these are."""
    copies = stored_copies(base)
    formats = {tensor.dtype for tensor in changes_of(copies, mask, theta)}
    if adapter_pairs(mask):
        return theta, formats
    dtypes = [FLOATS[copies[matrix.name][0].dtype] for matrix in mask.matrices]
    parts = [torch.tensor(theta[part]).to(dtype) for dtype, (_, part) in zip(dtypes, mask.slices(), strict=True)]
    return to_numpy(torch.cat([part.float() for part in parts])), formats


def _digest(tensor: Any) -> bytes:
    values = tensor.detach().cpu().contiguous()
    shape = f"{values.dtype} {tuple(values.shape)} ".encode()
    digest = hashlib.sha256(shape)
    digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.digest()
