"""A frozen prefix: blocks that no masked weight reaches are computed once a row, and not in each pass.

The mask alone says which these are: all before the first block whose output depends on a masked weight, as autograd
finds it (`blocks.untouched`). Of a row that is seen for the first time, both sides of a step share the state before
that block; afterwards `engines.prefix` has it. A pass then goes on from there, and is the model's own in all else.
In a causal language model, linear layers of the last block whose other positions nothing needs (queries, outputs and
the MLP, not keys and values) compute only those whose logits are wanted.

What is the same: states that are made for a batch are made in the shapes of a plain pass, so the first passes over a
batch give the same bits. A state that was kept may differ from that in its last bits, as it does in a plain pass with
other rows beside it: float32 kernels round by shape. tests/engines/test_prefix.py bounds what becomes of it.

A model is tried before it is believed: a pass that goes on must give what a plain one gives, after the model has seen
other rows. If it does not, every pass computes all blocks, and the log says so once.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import structlog
import torch
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from meerkat_mq.engines.prefix import HiddenStates, Keep
from meerkat_mq.engines.torch.blocks import (
    blocks_of,
    body_pass,
    hidden_after,
    narrowed,
    resumed,
    state_of,
    trial,
    untouched,
)
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.engines.torch.scoring import Inputs
from meerkat_mq.errors import UnsupportedModel, reason

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of a dtype's size: NumPy has each
_CLOSE = 1e-5  # of the largest number, between two passes of the same shapes
_FEW = 2  # positions × this ≤ length, where computing some alone is worth its copies


class FrozenPrefix:
    """Passes of a model that go on from the block above its frozen ones.

    Attributes:
        count: blocks that are left out, of `blocks`.
    """

    def __init__(self, loaded: LoadedModel, blocks: Sequence[nn.Module], count: int, keep: Keep) -> None:
        """Try it; UnsupportedModel, or whatever the model raises, where it does not work."""
        self.blocks, self.count = blocks, count
        self._loaded = loaded
        self._below = blocks[:count]
        self._held: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()  # by a pass's ids, for as long as they live
        inputs = trial(loaded)
        with torch.no_grad():
            output = hidden_after(self._below, lambda: body_pass(loaded, inputs))
            state = _state(output, self._below[-1])
            self._in_tuple = len(output) if isinstance(output, tuple) else 0
            self._dtype = state.dtype
            self._check(inputs, state)
            causal = loaded.kind == "causal" and count < len(blocks)
            self._narrow = self._position_wise(inputs) if causal else []
        bits = np.dtype(f"i{state.element_size()}")
        self._states = HiddenStates(keep, _context(loaded, count, state.dtype), bits, state.shape[-1])

    @contextmanager
    def around(self, ids: Tensor, lengths: Tensor, wanted: Tensor | None = None) -> Iterator[None]:
        """Within it, passes of the model over `ids` leave the frozen blocks out.

        Args:
            ids: int64 (sequences, length), padded on the right.
            lengths: int64 (sequences,), without the padding.
            wanted: int64 (sequences, positions) whose logits are needed; None: all.
        """
        state = self._held.get(ids)
        if state is None:
            self._held[ids] = state = self._states_of(ids, lengths)
        few: AbstractContextManager[None] = nullcontext()
        if wanted is not None and _FEW * wanted.shape[1] <= ids.shape[1] and not torch.is_grad_enabled():
            few = narrowed(self._narrow, wanted)
        with resumed(self._below, state, in_tuple=self._in_tuple), few:
            yield

    def _states_of(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(sequences, length, width), 0 or anything beyond their lengths."""
        sizes = lengths.tolist()
        texts = [row[:size] for row, size in zip(ids.cpu().numpy(), sizes, strict=True)]
        found = [self._states.find(text) for text in texts]
        missing = [number for number, bits in enumerate(found) if bits is None]
        with torch.inference_mode(False), torch.no_grad():
            made = self._computed(ids, lengths, missing) if missing else None
            for number, state in zip(missing, () if made is None else made, strict=True):
                self._states.keep(texts[number], _bits(state[: sizes[number]]))
            if made is not None and len(missing) == len(texts):
                return made
            return self._together(ids, found, dict(zip(missing, () if made is None else made, strict=True)))

    def _computed(self, ids: Tensor, lengths: Tensor, missing: list[int]) -> Tensor:
        """The states of some rows, in one pass up to the last frozen block."""
        if len(missing) < len(ids):
            ids, lengths = ids[missing, : int(lengths[missing].max())], lengths[missing]
        inputs = {"input_ids": ids}
        if self._loaded.kind == "encoder":
            inputs["attention_mask"] = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        return _state(hidden_after(self._below, lambda: body_pass(self._loaded, inputs)), self._below[-1])

    def _together(self, ids: Tensor, found: Sequence[Any], made: dict[int, Tensor]) -> Tensor:
        """States that were kept, and those that were made for want of them."""
        width = next(state.shape[-1] for state in (*found, *made.values()) if state is not None)
        whole = torch.zeros(*ids.shape, width, dtype=self._dtype, device=ids.device)
        for number, bits in enumerate(found):
            state = made[number] if bits is None else torch.from_numpy(bits).view(self._dtype)
            whole[number, : len(state)] = state
        return whole

    def _check(self, inputs: Inputs, state: Tensor) -> None:
        """Compare a pass that goes on with a plain one, with another in between that leaves no trace."""
        plain = body_pass(self._loaded, inputs)
        body_pass(self._loaded, {name: tensor.flip(0) for name, tensor in inputs.items()})
        with resumed(self._below, state, in_tuple=self._in_tuple):
            found = body_pass(self._loaded, inputs)
        if not torch.allclose(found, plain, rtol=0, atol=_CLOSE * float(plain.abs().max())):
            problem = f"passes that go on from block {self.count} differ from whole ones"
            raise UnsupportedModel(type(self._loaded.model).__name__, problem)

    def _position_wise(self, inputs: Inputs) -> list[nn.Module]:
        """Linear layers of the last block whose output at other positions changes nothing at those that are wanted.

        NaN says which: put there, it is at the last position wherever a path leads to it, also through weights of 0.
        """
        output = hidden_after(self.blocks[:-1], lambda: body_pass(self._loaded, inputs))
        state, shape = _state(output, self.blocks[-2]), inputs["input_ids"].shape
        calls = list[nn.Module]()

        def spoil(layer: nn.Module, _: object, output: Tensor) -> Tensor:
            calls.append(layer)
            if output.shape[:2] != shape:
                return output * torch.nan
            return torch.cat([output[:, :-1] * torch.nan, output[:, -1:]], dim=1)

        def is_narrow(layer: nn.Module) -> bool:
            calls.clear()
            handle = layer.register_forward_hook(spoil)
            try:
                last = body_pass(self._loaded, inputs)[:, -1]
            finally:
                handle.remove()
            return len(calls) == 1 and bool(last.isfinite().all())

        with resumed(self.blocks[:-1], state, in_tuple=self._in_tuple):
            linear = [module for module in self.blocks[-1].modules() if isinstance(module, nn.Linear | Conv1D)]
            return [layer for layer in linear if is_narrow(layer)]


def frozen_prefix(loaded: LoadedModel, parameters: Sequence[nn.Parameter], keep: Keep | None) -> FrozenPrefix | None:
    """The frozen prefix under these masked parameters; None where there is none, or it cannot be used."""
    if keep is None:
        return None
    try:
        blocks = blocks_of(loaded)
        count = untouched(blocks, parameters, lambda: body_pass(loaded, trial(loaded))) if blocks else 0
        return FrozenPrefix(loaded, blocks, count, keep) if count else None
    except Exception as error:  # a model's own code raises all kinds; it computes whole passes without fail
        name, event = type(loaded.model).__name__, "no frozen prefix: each pass computes all blocks"
        structlog.get_logger().warning(event, model=name, problem=reason(error))
        return None


def _state(output: Any, block: nn.Module) -> Tensor:
    state = state_of(output)
    if state is None:
        raise UnsupportedModel(type(block).__name__, "gives more than a hidden state")
    return state


def _bits(state: Tensor) -> Any:
    return state.contiguous().view(_BITS[state.element_size()]).cpu().numpy()


def _context(loaded: LoadedModel, count: int, dtype: torch.dtype) -> bytes:
    """All that decides a state but the tokens: weights as stored, configuration, block, dtype, and what computes it."""
    config = loaded.model.config
    parts = (
        loaded.fingerprint.hex(), config.to_json_string(use_diff=False), config._attn_implementation,
        count, dtype, loaded.model.dtype, torch.__version__, transformers.__version__,
    )  # fmt: skip
    return "\n".join(map(str, parts)).encode()
