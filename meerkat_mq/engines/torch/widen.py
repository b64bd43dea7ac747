"""Weights stored in bfloat16 or float16, computed with in float32, layer by layer.

A step measures the difference of two losses that are nearly equal. Activations in half precision drown it: on a genuine
LLM, a projected gradient measured in bfloat16 has little to do with that in float32 (benchmarks/README.md). So a layer
that stores half-precision weights makes a float32 copy of them for the time of its own forward pass, and gives it back:
memory stays near that of the stored weights, activations and losses are float32, and what is computed is what a
float32 model of the same rounded weights computes.

The trained weights are finer than their stored format: theta is float32, and bfloat16 would swallow a part of eps·z. So
theta is put into the float32 copy too, at its places. Of a matrix that is trained whole (masks `dense`), no such second
copy is kept: it would take more memory than a float32 model. Its theta is rounded to the stored format.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meerkat_mq.errors import UnsupportedModel

HALF = frozenset({torch.bfloat16, torch.float16})
PIECE = 1 << 22  # values of a linear layer's weight that are float32 at a time


@dataclass(frozen=True, slots=True)
class Exact:
    """Values of some weights, finer than a parameter stores them: float32 (k,) at ascending places, int64 (k,)."""

    indices: Tensor
    values: Tensor

    def put(self, flat: Tensor, start: int, whole: int) -> None:
        """Put those that lie in a stretch of a parameter of `whole` values, flat from `start` on, float32, into it."""
        indices, values = self.indices, self.values
        if flat.numel() < whole:
            ends = torch.tensor([start, start + flat.numel()], device=indices.device)
            first, last = torch.searchsorted(indices, ends).tolist()
            indices, values = indices[first:last] - start, values[first:last]
        flat.index_copy_(0, indices, values)


def widen(model: nn.Module) -> None:
    """Let each module of a model that stores half-precision weights compute in float32."""
    kinds: dict[Any, Any] = {}
    for module in model.modules():
        if any(parameter.dtype in HALF for parameter in module.parameters(recurse=False)):
            kind = type(module)
            if kind not in kinds:
                kinds[kind] = _wide(kind)
            module.__class__ = kinds[kind]
            vars(module)["exact"] = {}


def holders(model: nn.Module) -> dict[int, list[tuple[dict[str, Exact], str]]]:
    """Where `Exact` values are put: by the id of a half-precision parameter, for each module that computes with it."""
    found: dict[int, list[tuple[dict[str, Exact], str]]] = {}
    for module in model.modules():
        exact = getattr(module, "exact", None)
        if isinstance(exact, dict):
            for name, own in module.named_parameters(recurse=False):
                if own.dtype in HALF:
                    found.setdefault(id(own), []).append((exact, name))
    return found


def float32_linear(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """What a linear layer makes of hidden states, (…, in), in float32: (…, out)."""
    hidden, weight = hidden.float(), layer.weight
    bias = None if layer.bias is None else layer.bias.float()
    if weight.dtype == torch.float32:
        return functional.linear(hidden, weight, bias)
    rows = max(1, PIECE // weight.shape[1])
    parts = []
    for start in range(0, len(weight), rows):
        own = None if bias is None else bias[start : start + rows]
        parts.append(functional.linear(hidden, _float32(layer, "weight", start, start + rows), own))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _float32(module: Any, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """The rows `start` to `stop` of a parameter, with what is known more exactly."""
    parameter = module._parameters[name]
    rows: Tensor = parameter[start:stop].float() if parameter.ndim else parameter.float()
    exact = getattr(module, "exact", {}).get(name)
    if exact is not None:
        exact.put(rows.view(-1), start * parameter[:1].numel(), parameter.numel())
    return rows


def _wide(kind: Any) -> Any:
    """The class of modules that do what those of this kind do, in float32."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        if any(isinstance(given, Tensor) and given.dtype in HALF for given in (*inputs, *options.values())):
            problem = f"rounds activations to half precision before its {kind.__name__}"
            raise UnsupportedModel("dtype", problem, 'use dtype = "float32" for this model')
        if kind.forward is nn.Linear.forward:
            return float32_linear(self, inputs[0])
        if kind.forward is nn.Embedding.forward and not self.exact:
            return kind.forward(self, *inputs, **options).float()
        stored = dict(self._parameters)
        halves = [name for name, own in stored.items() if own is not None and own.dtype in HALF]
        self._parameters.update({name: _float32(self, name) for name in halves})
        try:
            return kind.forward(self, *inputs, **options)
        finally:
            self._parameters.update(stored)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
