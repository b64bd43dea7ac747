"""The repeated blocks of a model: the hidden state between two of them, and passes that go on from it.

A transformer's body is embeddings, then blocks one after the other, each of which makes a hidden state, (sequences,
length, width), of the one before it. Nothing here knows an architecture. The blocks are those that a short pass calls;
which weights the hidden state before block k depends on is what autograd says, so tied and shared weights are found
wherever they are. A pass that goes on from block k is the model's own: the blocks below give what is already known.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meerkat_mq.engines.prompts import padded, prompt_ids
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.engines.torch.scoring import Inputs, tokenise
from meerkat_mq.errors import MaskError, UnsupportedModel

Layer = int | float  # a block's number, or a share of the blocks
Pass = Callable[[], Tensor]

_TEXTS = ["The pump in the cellar was broken when the farmer came back on Monday, and nobody knew why.", "A ship left."]
_TRIED = 16  # tokens


class _Reached(Exception):
    """A pass has come as far as it was to go."""

    def __init__(self, number: int, output: Any) -> None:
        super().__init__()
        self.number = number
        self.output = output


def trial(loaded: LoadedModel) -> Inputs:
    """Two short texts of different lengths, padded: what a pass takes."""
    if loaded.kind == "encoder":
        return tokenise(loaded, _TEXTS, _TRIED)
    ids = [text[: min(_TRIED, loaded.max_tokens)] for text in prompt_ids(loaded, _TEXTS)]
    return {"input_ids": torch.from_numpy(padded(ids)).to(loaded.model.device)}


def body_pass(loaded: LoadedModel, inputs: Inputs) -> Tensor:
    """The last hidden state, (sequences, length, width)."""
    settings = {"use_cache": False} if loaded.kind == "causal" else {}
    hidden: Tensor = loaded.model.base_model(**inputs, **settings).last_hidden_state
    return hidden


def blocks_of(loaded: LoadedModel) -> list[nn.Module]:
    """The blocks that a text passes through, one after the other; none where they cannot be told."""
    lists = {path: module for path, module in loaded.model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [module for path, module in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    with torch.no_grad(), _watched([block for blocks in outer for block in blocks], _end):
        try:
            body_pass(loaded, trial(loaded))
        except _Reached as reached:
            every = [(blocks, block) for blocks in outer for block in blocks]
            return list(every[reached.number][0])
    return []


def hidden_after(blocks: Sequence[nn.Module], passing: Pass) -> Any:
    """What the last of these blocks gives in a pass, as it gives it; the pass ends there.

    Raises:
        UnsupportedModel: the pass does not come there.
    """
    with _watched(blocks[-1:], _end):
        try:
            passing()
        except _Reached as reached:
            return reached.output
    raise UnsupportedModel(type(blocks[-1]).__name__, "takes no part in a pass", "use another model")


def untouched(blocks: Sequence[nn.Module], parameters: Iterable[nn.Parameter], passing: Pass) -> int:
    """How many of the first blocks give what depends on none of these parameters."""

    def look(number: int, output: Any) -> None:
        if any(isinstance(part, Tensor) and part.requires_grad for part in _parts(output)):
            raise _Reached(number, output)

    changed = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _watched(blocks, look):
            passing()
    except _Reached as reached:
        return reached.number
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)
    return len(blocks)


def state_of(output: Any) -> Tensor | None:
    """The hidden state in what a block gives; None where that is more than it, or something else."""
    first, *rest = _parts(output)
    return first if isinstance(first, Tensor) and first.ndim == 3 and not any(r is not None for r in rest) else None


@contextmanager
def resumed(blocks: Sequence[nn.Module], hidden: Tensor, *, in_tuple: int = 0) -> Iterator[None]:
    """Passes within it take `hidden` for what these blocks, the first ones of the model, give, and leave them out.

    `in_tuple` is the length of the tuple in which they give it; 0: in none.
    """
    output = (hidden, *[None] * (in_tuple - 1)) if in_tuple else hidden
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_forward(block, lambda *_, **__: output))
        yield


@contextmanager
def narrowed(layers: Sequence[nn.Module], positions: Tensor) -> Iterator[None]:
    """Linear layers compute these positions alone, int64 (sequences, positions), within it; 0 elsewhere."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_forward(layer, partial(_at, layer.forward, positions)))
        yield


def number_of(layer: Layer, count: int) -> int:
    """The block that `--from-layer` names, of `count`: its number, or a share of the blocks below it, rounded.

    Raises:
        MaskError: there is no such block.
    """
    by_number = isinstance(layer, int)
    number = int(layer if by_number else min(layer, 1) * count + 0.5) if layer >= 0 else -1  # of NaN, too
    if not int(not by_number) <= number < count:
        remedy = f"the model has {count} blocks: give 0 to {count - 1}, or a share between 0 and 1, such as 0.5"
        raise MaskError("from-layer", f"{layer} is no block", remedy)
    return number


def _at(forward: Callable[[Tensor], Tensor], positions: Tensor, hidden: Tensor) -> Tensor:
    index = positions[:, :, None]
    found = forward(hidden.gather(1, index.expand(-1, -1, hidden.shape[-1])))
    whole = found.new_zeros(*hidden.shape[:2], found.shape[-1])
    return whole.scatter_(1, index.expand(-1, -1, found.shape[-1]), found)


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _end(number: int, output: Any) -> None:
    raise _Reached(number, output)


@contextmanager
def _watched(blocks: Sequence[nn.Module], look: Callable[[int, Any], None]) -> Iterator[None]:
    """`look` is told, within it, the number of each of the blocks that is done, and what it gives."""
    handles = [
        block.register_forward_hook(lambda _, __, output, number=number: look(number, output))
        for number, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)
