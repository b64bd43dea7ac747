"""Making a mask: keep the floor(size · density) best weights of each linear matrix; or all weights, or an adapter's.

Scores: `sensitivity` is the mean over calibration batches of the squared gradient of the causal-LM loss (of an encoder:
of in-batch contrast between the halves of a document), MEERKAT (arXiv 2506.03337); `magnitude-activation` is |w|·‖x‖₂;
`magnitude` is |w|; `random` is drawn from the seed. Two methods score nothing: `dense` takes every floating-point
parameter that passes use, tied ones once, MeZO (arXiv 2305.17333); `lora` takes all of a fresh adapter on the query and
value projections. What gets no gradient from the calibration loss, such as a vision tower, is left out: noise alone
would move it. So is, with `from_layer` = k, whatever the hidden state before block k depends on, also an embedding that
is tied to the output head: that state then stays the same for a whole run. With every method a last pass over the
batches yields g_p, the mean signed gradient on the mask.

Memory beyond the model's: one float32 matrix of scores for each linear matrix (`sensitivity` alone), and one gradient
and the activations of one block at a time.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.engines.protocol import Method
from meerkat_mq.engines.torch.adapter import adapter_weights, new_adapter
from meerkat_mq.engines.torch.blocks import Layer, blocks_of, body_pass, hidden_after, number_of, state_of, trial
from meerkat_mq.engines.torch.calibration import (
    CalibrationBatch,
    calibration_batches,
    each_gradient,
    input_norms,
    reached,
)
from meerkat_mq.engines.torch.load import LoadedModel, all_weights, linear_layers
from meerkat_mq.engines.torch.names import check_stored, check_writable
from meerkat_mq.errors import MaskError, UnsupportedModel, within
from meerkat_mq.wire.descriptor import MAX_RUN_WEIGHTS

METHODS: tuple[Method, ...] = get_args(Method)
Progress = Callable[[int, int], None]
Indices = npt.NDArray[np.int64]

_DEFAULT_BATCH = {"causal": 1, "encoder": 16}


def make_mask(
    loaded: LoadedModel,
    texts: Sequence[str],
    method: Method = "sensitivity",
    *,
    density: float = 1e-3,
    rank: int = 8,
    from_layer: Layer | None = None,
    seed: int = 0,
    sequences: int = 100,
    length: int = 512,
    batch_size: int | None = None,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Mask:
    """Score, choose, and take the mean gradient; ties go to the lowest index.

    Args:
        loaded: a model whose dtype holds the checkpoint exactly.
        texts: calibration text, like what the model was pretrained on.
        density: u, 0 < u ≤ 1, of the methods that score; 1 keeps every weight of the linear matrices.
        rank: of the adapter.
        from_layer: k; nothing that the hidden state before block k depends on is masked. Blocks count from 0. A share
            of the blocks, 0 < share < 1, stands for the block above it.
        seed: order of the texts, and the random mask.
        sequences, length: how many sequences (encoder: documents) of calibration text, and the tokens of each.
        batch_size: sequences a gradient; default: 1 for a causal LM, 16 for an encoder.
        progress: called with (batches done, all batches).
        say: called with what a user should know about the mask.

    Raises:
        MaskError: an argument is out of range, the text is too short, a score is not finite, or the mask would hold no
            weight, or more than a run can.
        UnsupportedModel: the model has no maskable matrices, or some that cannot be written back into the checkpoint.
        ModelError: `lora` without peft.
    """
    whole, candidates = density == 1 or method in ("dense", "lora"), _checked(loaded, method, density)
    size = _DEFAULT_BATCH[loaded.kind] if batch_size is None else batch_size
    batches = calibration_batches(loaded, texts, seed=seed, sequences=sequences, length=length, batch_size=size)
    weights = _inside(loaded, batches[0], candidates, say)
    if from_layer is not None:
        weights = _above(loaded, batches[0], weights, from_layer)
    if method == "lora":
        loaded = new_adapter(loaded, rank, weights)
        weights = adapter_weights(loaded.model)
    counts = _counts(weights, 1 if whole else density)
    passes = 1 + (not whole and method in ("sensitivity", "magnitude-activation"))
    done = itertools.count(1)

    def tick() -> None:
        progress(next(done), passes * len(batches))

    if whole:
        chosen = {name: np.arange(count) for name, count in counts.items()}
    else:
        score = _scorer(loaded, batches, method, seed, tick, weights=weights)
        with within(str(loaded.folder)):
            chosen = {name: best(_finite(score(name), name), count) for name, count in counts.items()}
    g_p = _mean_gradient(loaded, batches, weights, chosen, tick)
    with within(str(loaded.folder)):
        matrices = tuple(_matrix(name, weights[name], indices, g_p[name]) for name, indices in chosen.items())
    if method != "lora":
        check_stored(loaded.names, matrices)
    return Mask(matrices, loaded.fingerprint, loaded.tokenizer_fingerprint)


def _checked(loaded: LoadedModel, method: Method, density: float) -> Mapping[str, Tensor]:
    """What the mask chooses from, after all checks that take no pass."""
    if method not in METHODS:
        raise MaskError("mask method", f"{method!r} is unknown", f"use one of {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise MaskError("density", f"{density} is outside (0, 1]", "0.001 keeps one weight in a thousand")
    if not loaded.exact:
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        raise MaskError(str(loaded.folder), f"{dtype} rounds this checkpoint's weights", "load it in float32 for masks")
    candidates = _candidates(loaded, method)
    _counts(candidates, 1 if method in ("dense", "lora") else density)
    check_writable(loaded.names, candidates, loaded.folder)
    return candidates


def _candidates(loaded: LoadedModel, method: Method) -> Mapping[str, Tensor]:
    """What the mask chooses from, or adapts, ordered by the bytes of the names."""
    if method == "dense":
        return all_weights(loaded.model)
    with within(str(loaded.folder)):
        return {name: layer.weight for name, layer in linear_layers(loaded.model).items()}


def _inside(
    loaded: LoadedModel, batch: CalibrationBatch, weights: Mapping[str, Tensor], say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Those of the weights that the calibration loss depends on."""
    found = reached(loaded, batch, weights)
    outside = [name for name in weights if name not in found]
    if len(outside) == len(weights):
        raise MaskError(str(loaded.folder), "the calibration loss depends on no weight", "use another model")
    if outside:
        say(f"{len(outside)} matrices get no gradient from text and are left out: {outside[0]} …")
    return {name: weight for name, weight in weights.items() if name in found}


def _above(
    loaded: LoadedModel, batch: CalibrationBatch, weights: Mapping[str, Tensor], layer: Layer
) -> dict[str, Tensor]:
    """Those of the weights on which the hidden state before this block does not depend."""
    blocks = blocks_of(loaded)
    number = number_of(layer, len(blocks))
    below, inputs = blocks[:number], trial(loaded)

    def state(*_: object) -> Tensor:
        hidden = state_of(hidden_after(below, lambda: body_pass(loaded, inputs)))
        if hidden is None:
            raise UnsupportedModel(type(below[-1]).__name__, "gives more than a hidden state", "leave from-layer out")
        return hidden.sum()

    found = reached(loaded, batch, weights, state) if below else set()
    if found.issuperset(weights):
        problem = f"the hidden state before block {number} depends on every weight that could be masked"
        raise MaskError("from-layer", problem, "leave it out for this model")
    return {name: weight for name, weight in weights.items() if name not in found}


def _counts(weights: Mapping[str, Tensor], density: float) -> dict[str, int]:
    """How many weights each matrix keeps; matrices that keep none are left out."""
    share = Fraction(str(density))  # 0.29 · 100 in floats is below 29
    sizes = {name: weight.numel() for name, weight in weights.items()}
    counts = {name: int(size * share) for name, size in sizes.items() if int(size * share)}
    if not counts:
        raise MaskError("density", f"{density} of {max(sizes.values())} weights keeps none", "raise the density")
    if sum(counts.values()) > MAX_RUN_WEIGHTS:
        problem = f"{sum(counts.values()):,} weights, and a run holds {MAX_RUN_WEIGHTS:,} at most"
        raise MaskError("mask", problem, "lower the density")
    return counts


def _scorer(
    loaded: LoadedModel,
    batches: Sequence[CalibrationBatch],
    method: Method,
    seed: int,
    tick: Callable[[], None],
    *,
    weights: Mapping[str, Tensor],
) -> Callable[[str], Tensor]:
    """Scores of a matrix by its name, in the shape of its weight, or flat."""
    layers = linear_layers(loaded.model)
    if method == "sensitivity":
        squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

        def add(name: str, gradient: Tensor) -> None:
            squares[name].addcmul_(gradient, gradient)

        each_gradient(loaded, batches, weights, add, tick)
        return squares.pop
    if method == "magnitude-activation":
        norms = input_norms(loaded, batches, tick)
        across = {name: norm[:, None] if isinstance(layers[name], Conv1D) else norm for name, norm in norms.items()}
        return lambda name: layers[name].weight.float().abs() * across[name]
    if method == "magnitude":
        return lambda name: layers[name].weight.float().abs()
    place = {name: index for index, name in enumerate(layers)}
    return lambda name: torch.from_numpy(
        np.random.default_rng([seed, place[name]]).random(layers[name].weight.numel(), dtype=np.float32)
    )


def _finite(scores: Tensor, name: str) -> Float32Array:
    flat = np.asarray(scores.flatten().cpu().numpy())
    if not np.isfinite(flat).all():
        raise MaskError(name, "a score is not finite", "check the checkpoint and the calibration text")
    return flat


def best(scores: Float32Array, count: int) -> Indices:
    """Positions of the 1 ≤ `count` ≤ m highest of finite scores, float32 (m,), ascending; of equal ones the lowest."""
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, level]))


def _mean_gradient(
    loaded: LoadedModel,
    batches: Sequence[CalibrationBatch],
    weights: Mapping[str, Tensor],
    chosen: Mapping[str, Indices],
    tick: Callable[[], None],
) -> dict[str, Float32Array]:
    """The mean signed gradient of each matrix at the chosen positions, float32."""
    places: dict[str, Tensor | slice] = {}
    sums: dict[str, Tensor] = {}
    for name, indices in chosen.items():
        weight = weights[name]
        whole = indices.size == weight.numel()  # no indices on the device, then
        places[name] = slice(None) if whole else torch.from_numpy(indices).to(weight.device)
        sums[name] = torch.zeros(indices.size, dtype=torch.float64, device=weight.device)

    def visit(name: str, gradient: Tensor) -> None:
        sums[name] += gradient.flatten()[places[name]]

    each_gradient(loaded, batches, {name: weights[name] for name in chosen}, visit, tick)
    return {name: (total / len(batches)).float().cpu().numpy() for name, total in sums.items()}


def _matrix(name: str, weight: Tensor, indices: Indices, g_p: Float32Array) -> MaskedMatrix:
    theta_0 = weight.detach().flatten().cpu()[torch.from_numpy(indices)].float().numpy()
    return MaskedMatrix(name, tuple(weight.shape), indices.astype(np.uint32), theta_0, g_p)
