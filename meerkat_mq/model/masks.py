"""Making a mask: score the weights of each linear matrix and keep the best."""

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.errors import MaskError
from meerkat_mq.model.calibration import CalibrationBatch, calibration_batches, each_gradient, input_norms
from meerkat_mq.model.load import LoadedModel, linear_layers

Method = Literal["sensitivity", "magnitude-activation", "magnitude", "random"]
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
    seed: int = 0,
    sequences: int = 100,
    length: int = 512,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Mask:
    """Keep the floor(size · density) best weights of each linear matrix; ties go to the lowest index.

    Scores: `sensitivity` is the mean over calibration batches of the squared gradient of the causal-LM loss (of an
    encoder: of in-batch contrast between the halves of a document), MEERKAT (arXiv 2506.03337); `magnitude-activation`
    is |w|·‖x‖₂; `magnitude` is |w|; `random` is drawn from the seed. With every method a last pass over the batches
    yields g_p, the mean signed gradient on the mask. Memory beyond the model's: one float32 matrix of scores for each
    linear matrix (`sensitivity` alone), and one gradient at a time.

    Args:
        loaded: a model whose dtype holds the checkpoint exactly.
        texts: calibration text, like what the model was pretrained on.
        method: one of METHODS.
        density: u, 0 < u ≤ 1; 1 keeps every weight of the linear matrices.
        seed: order of the texts, and the random mask.
        sequences: how many sequences (encoder: documents) of calibration text.
        length: tokens a sequence.
        batch_size: sequences a gradient; default: 1 for a causal LM, 16 for an encoder.
        progress: called with (batches done, all batches).

    Raises:
        MaskError: an argument is out of range, the text is too short, a score is not finite, or no weight is left.
        UnsupportedModel: the model has no maskable matrices.
    """
    counts = _counts(loaded, method, density)
    batches = calibration_batches(
        loaded,
        texts,
        seed=seed,
        sequences=sequences,
        length=length,
        batch_size=_DEFAULT_BATCH[loaded.kind] if batch_size is None else batch_size,
    )
    passes = 1 + (density < 1 and method in ("sensitivity", "magnitude-activation"))
    tick = _ticker(progress, passes * len(batches))
    if density == 1:
        chosen = {name: np.arange(count) for name, count in counts.items()}
    else:
        score = _scorer(loaded, batches, method, seed, tick)
        chosen = {name: best(_finite(score(name), name), count) for name, count in counts.items()}
    g_p = _mean_gradient(loaded, batches, chosen, tick)
    weights = {name: layer.weight for name, layer in linear_layers(loaded.model).items()}
    matrices = tuple(_matrix(name, weights[name], indices, g_p[name]) for name, indices in chosen.items())
    return Mask(matrices, loaded.fingerprint, loaded.tokenizer_fingerprint)


def _counts(loaded: LoadedModel, method: Method, density: float) -> dict[str, int]:
    """How many weights each matrix keeps; matrices that keep none are left out."""
    if method not in METHODS:
        raise MaskError("mask method", f"{method!r} is unknown", f"use one of {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise MaskError("density", f"{density} is outside (0, 1]", "0.001 keeps one weight in a thousand")
    if not loaded.exact:
        raise MaskError(str(loaded.folder), "bfloat16 rounds this checkpoint's weights", "load it in float32 for masks")
    share = Fraction(str(density))  # 0.29 · 100 in floats is below 29
    sizes = {name: layer.weight.numel() for name, layer in linear_layers(loaded.model).items()}
    counts = {name: int(size * share) for name, size in sizes.items() if int(size * share)}
    if not counts:
        raise MaskError("density", f"{density} of {max(sizes.values())} weights keeps none", "raise the density")
    return counts


def _ticker(progress: Progress | None, total: int) -> Callable[[], None]:
    done = itertools.count(1)

    def tick() -> None:
        number = next(done)
        if progress is not None:
            progress(number, total)

    return tick


def _scorer(
    loaded: LoadedModel,
    batches: Sequence[CalibrationBatch],
    method: Method,
    seed: int,
    tick: Callable[[], None],
) -> Callable[[str], Tensor]:
    """Scores of a matrix by its name, in the shape of its weight, or flat."""
    layers = linear_layers(loaded.model)
    if method == "sensitivity":
        squares = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}

        def add(name: str, gradient: Tensor) -> None:
            squares[name].addcmul_(gradient, gradient)

        each_gradient(loaded, batches, add, tick)
        return squares.pop
    if method == "magnitude-activation":
        norms = input_norms(loaded, batches, tick)
        return lambda name: layers[name].weight.float().abs() * _per_input(layers[name], norms[name])
    if method == "magnitude":
        return lambda name: layers[name].weight.float().abs()
    place = {name: index for index, name in enumerate(layers)}
    return lambda name: torch.from_numpy(
        np.random.default_rng([seed, place[name]]).random(layers[name].weight.numel(), dtype=np.float32)
    )


def _per_input(layer: nn.Module, norms: Tensor) -> Tensor:
    return norms[:, None] if isinstance(layer, Conv1D) else norms[None, :]


def _finite(scores: Tensor, name: str) -> Float32Array:
    flat = np.asarray(scores.flatten().cpu().numpy())
    if not np.isfinite(flat).all():
        raise MaskError(name, "a score is not finite", "check the checkpoint and the calibration text")
    return flat


def best(scores: Float32Array, count: int) -> Indices:
    """Positions of the `count` highest scores, ascending; of equal scores the lowest positions.

    Args:
        scores: float32 (m,), 1 ≤ count ≤ m, finite.
    """
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, level]))


def _mean_gradient(
    loaded: LoadedModel, batches: Sequence[CalibrationBatch], chosen: dict[str, Indices], tick: Callable[[], None]
) -> dict[str, Float32Array]:
    """The mean signed gradient of each matrix at the chosen positions, float32."""
    device = loaded.model.device
    places = {name: torch.from_numpy(indices).to(device) for name, indices in chosen.items()}
    sums = {name: torch.zeros(len(indices), dtype=torch.float64, device=device) for name, indices in chosen.items()}

    def visit(name: str, gradient: Tensor) -> None:
        if name in sums:
            sums[name] += gradient.flatten()[places[name]].double()

    each_gradient(loaded, batches, visit, tick)
    return {name: (total / len(batches)).float().cpu().numpy() for name, total in sums.items()}


def _matrix(name: str, weight: Tensor, indices: Indices, g_p: Float32Array) -> MaskedMatrix:
    theta_0 = weight.detach().flatten().cpu()[torch.from_numpy(indices)].float().numpy()
    return MaskedMatrix(name, tuple(weight.shape), indices.astype(np.uint32), theta_0, g_p)
