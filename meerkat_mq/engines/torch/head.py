"""The output head of a causal LM, at the positions that are needed, in float32, in the model's own forward pass.

So whatever the model does to logits after its head (soft caps, scales) stays in. Logits of a whole window would
outweigh the model's layers: those of many positions exist a slice at a time, also on the way back. The model's body
then runs once, and each slice passes through the model's forward, whose body gives what it gave before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meerkat_mq.engines.torch.widen import float32_linear
from meerkat_mq.errors import UnsupportedModel

SLICE = 64  # positions of a sequence whose logits exist at a time


def check_head(model: Any) -> None:
    """Refuse a model whose output head is not linear."""
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UnsupportedModel(type(model).__name__, "its output head is not linear", "use another causal LM")


def with_logits(model: Any, ids: Tensor, positions: Tensor, use: Callable[[slice, Tensor], Tensor]) -> list[Tensor]:
    """What `use` makes of logits, float32 (sequences, positions of a slice, vocabulary), slice by slice.

    Args:
        model: causal LM.
        ids: int64 (sequences, length).
        positions: int64 (sequences, positions), whose logits are needed.
        use: is given the slice of the positions, and their logits.
    """
    whole = positions.shape[1]
    if whole <= SLICE:
        return [use(slice(0, whole), _logits(model, ids, _at(model, positions)))]
    outputs = body_of(model)(input_ids=ids, use_cache=False)

    def part(start: int) -> Tensor:
        chosen = slice(start, min(start + SLICE, whole))
        return use(chosen, logits_of(model, ids, outputs, _at(model, positions[:, chosen])))

    return in_slices(part, whole, SLICE)


def body_of(model: Any) -> Any:
    """The model without its head.

    Raises:
        UnsupportedModel: the two cannot be told apart.
    """
    body = model.base_model
    if body is model or not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UnsupportedModel(type(model).__name__, "is no body with a linear head", "use another causal LM")
    return body


def in_slices(part: Callable[[int], Tensor], whole: int, size: int) -> list[Tensor]:
    """A part for the start of each slice; where gradients are wanted, it runs a second time on the way back."""
    if not torch.is_grad_enabled():
        return [part(start) for start in range(0, whole, size)]
    return [checkpoint(part, at, use_reentrant=False, preserve_rng_state=False) for at in range(0, whole, size)]


def logits_of(model: Any, ids: Tensor, outputs: Any, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Float32 logits of a pass whose body's outputs are known; `head` makes them of hidden states."""
    body = model.base_model
    body.forward = lambda *_, **__: outputs
    try:
        return _logits(model, ids, head)
    finally:
        del body.forward


def _logits(model: Any, ids: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    layer = model.get_output_embeddings()
    layer.forward = head
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()
    finally:
        del layer.forward


def _at(model: Any, positions: Tensor) -> Callable[[Tensor], Tensor]:
    """A head that sees only these positions, int64 (sequences, positions)."""
    layer = model.get_output_embeddings()

    def head(hidden: Tensor) -> Tensor:
        index = positions[:, :, None].expand(-1, -1, hidden.shape[-1])
        return float32_linear(layer, hidden.gather(1, index))

    return head
