"""Calibration: batches of pre-training-like text, and gradients and activations over them."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import structlog
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from meerkat_mq.engines.prompts import prompt_ids
from meerkat_mq.engines.torch.folder import in_words
from meerkat_mq.engines.torch.head import SLICE, body_of, in_slices, logits_of
from meerkat_mq.engines.torch.load import LoadedModel, linear_layers
from meerkat_mq.engines.torch.scoring import Inputs, embed, tokenise
from meerkat_mq.engines.torch.widen import float32_linear
from meerkat_mq.errors import MaskError, within
from meerkat_mq.tasks.data import problem_of

CONTRAST_SCALE = 20.0
_SLICE = SLICE

Halves = tuple[Inputs, Inputs]
CalibrationBatch = Tensor | Halves
Loss = Callable[[LoadedModel, CalibrationBatch], Tensor]


def calibration_batches(
    loaded: LoadedModel, texts: Sequence[str], *, seed: int, sequences: int, length: int, batch_size: int
) -> list[CalibrationBatch]:
    """Batches in an order that the seed fixes.

    Causal LM: the texts, one after the other, cut into sequences of `length` tokens: int64 (batch, length). Encoder:
    `sequences` documents, each as its two halves of up to length ÷ 2 tokens.

    Raises:
        MaskError: the texts are too short for a single batch.
    """
    order = _usable(loaded, random.Random(seed).sample(list(texts), len(texts)))  # noqa: S311
    if loaded.kind == "causal":
        return [*torch.split(_packed(loaded, order, sequences, min(length, loaded.max_tokens)), batch_size)]
    return [*_halves(loaded, order, sequences, length // 2, batch_size)]


def _usable(loaded: LoadedModel, texts: Iterable[str]) -> Iterator[str]:
    """The texts that the tokenizer takes, one by one as they are wanted."""
    for text in texts:
        try:
            loaded.tokenizer(text)
        except BaseException as error:
            problem = problem_of(error)
            structlog.get_logger().warning("text left out: it cannot be tokenised", text=text[:60], problem=problem)
        else:
            yield text


def _packed(loaded: LoadedModel, texts: Iterable[str], sequences: int, length: int) -> Tensor:
    end = loaded.tokenizer.eos_token_id
    tokens: list[int] = []
    for text in texts:
        tokens += prompt_ids(loaded, [text])[0]
        if end is not None and tokens and tokens[-1] != end:
            tokens.append(end)
        if len(tokens) >= sequences * length:
            break
    count = min(sequences, len(tokens) // length)
    if not count:
        raise MaskError("text", f"{len(tokens)} tokens make no sequence of {length}", "give more calibration text")
    return torch.tensor(tokens[: count * length], device=loaded.model.device).view(count, length)


def _halves(loaded: LoadedModel, texts: Iterable[str], count: int, length: int, batch_size: int) -> Iterator[Halves]:
    pairs = list(islice((half for half in map(_split, texts) if half is not None), count))
    if min(len(pairs), batch_size) < 2:
        problem = f"{len(pairs)} documents in batches of {batch_size}"
        raise MaskError("text", problem, "contrast needs two or more of both")
    for start in range(0, len(pairs) - 1, batch_size):
        first, second = zip(*pairs[start : start + batch_size], strict=True)
        yield tokenise(loaded, list(first), length), tokenise(loaded, list(second), length)


def _split(text: str) -> tuple[str, str] | None:
    """A document's two halves, cut at the first space after its middle."""
    middle = text.find(" ", len(text) // 2)
    first, second = (text[:middle].strip(), text[middle:].strip()) if middle > 0 else ("", "")
    return (first, second) if first and second else None


def calibration_loss(loaded: LoadedModel, batch: CalibrationBatch) -> Tensor:
    """Mean next-token cross-entropy; of an encoder, in-batch contrast between the halves (cosine × 20)."""
    if isinstance(batch, Tensor):
        with within(str(loaded.folder)):
            return _next_token_loss(loaded.model, batch)
    first, second = (embed(loaded.model, half) for half in batch)
    scores = CONTRAST_SCALE * first @ second.T
    return functional.cross_entropy(scores, torch.arange(len(first), device=scores.device))


def _next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """Logits exist for `_SLICE` positions at a time, as in `head`."""
    layer, outputs = model.get_output_embeddings(), body_of(model)(input_ids=ids, use_cache=False)

    def loss(start: int) -> Tensor:
        targets = ids[:, start + 1 : start + 1 + _SLICE]
        part = slice(start, start + targets.shape[1])
        logits = logits_of(model, ids, outputs, lambda hidden: float32_linear(layer, hidden[:, part]))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    return torch.stack(in_slices(loss, ids.shape[1] - 1, _SLICE)).sum() / ids[:, 1:].numel()


def each_gradient(
    loaded: LoadedModel,
    batches: Iterable[CalibrationBatch],
    weights: Mapping[str, Tensor],
    visit: Callable[[str, Tensor], None],
    tick: Callable[[], None],
    *,
    loss: Loss | None = None,
) -> None:
    """Show `visit` the gradient of each of the model's `weights`, float32, batch by batch; `tick` after each batch.

    `loss` is that of calibration, unless another is given. A gradient lives only until its visit is over, and
    activations only inside one block and as its input: each block is computed again on the way back.
    """

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            if weight.grad is not None:
                visit(name, weight.grad.float())
            weight.grad = None

        return hook

    with trainable(weights.values()), _recomputing(loaded.model):
        handles = [
            weight.register_post_accumulate_grad_hook(hook_for(name))  # type: ignore[no-untyped-call]
            for name, weight in weights.items()
        ]
        try:
            for batch in batches:
                with in_words(str(loaded.folder), "gives no gradients", "use another model, or more memory"):
                    torch.autograd.backward((loss or calibration_loss)(loaded, batch))
                tick()
        finally:
            for handle in handles:
                handle.remove()


def reached(
    loaded: LoadedModel, batch: CalibrationBatch, weights: Mapping[str, Tensor], loss: Loss | None = None
) -> set[str]:
    """Names of the weights that the loss of a batch, of calibration or given, depends on: a vision tower is none."""
    names: set[str] = set()
    each_gradient(loaded, [batch], weights, lambda name, _: names.add(name), lambda: None, loss=loss)
    return names


@contextmanager
def trainable(weights: Iterable[Tensor]) -> Iterator[None]:
    """Gradients are switched on for these for a while."""
    chosen = list(weights)
    for weight in chosen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in chosen:
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """The repeated blocks keep their inputs only, and run a second time when gradients are wanted."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [module for path, module in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    blocks = [block for blocks in outer for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def input_norms(
    loaded: LoadedModel, batches: Iterable[CalibrationBatch], tick: Callable[[], None]
) -> dict[str, Tensor]:
    """Per linear matrix ‖x‖₂ of each input feature over all calibration tokens: float32 (in,)."""
    squares: dict[str, Tensor] = {}
    real: Tensor | None = None

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].flatten(0, -2) if real is None else inputs[0][real]
            squares[name] = squares.get(name, torch.zeros(())) + tokens.float().square().sum(dim=0)

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in linear_layers(loaded.model).items()]
    try:
        for batch in batches:
            for inputs in ({"input_ids": batch},) if isinstance(batch, Tensor) else batch:
                real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
                settings = {"use_cache": False} if isinstance(batch, Tensor) else {}
                with torch.inference_mode():
                    loaded.model.base_model(**inputs, **settings)
            tick()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}
