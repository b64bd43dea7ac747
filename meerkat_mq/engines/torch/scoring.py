"""From examples to scores: candidates of a causal LM, descriptions of candidates for an encoder.

A scorer makes prompts of examples, one pass of some prompts, and of passes scores, whose softmax is the model's belief.
Gradients flow where the caller allows them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meerkat_mq.engines.prompts import CausalPrompts, EncoderPrompts, Prompt, encoded, padded
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.errors import UnsupportedModel
from meerkat_mq.tasks.task import Example, Task

Inputs = dict[str, Tensor]

_HEAD_ROWS = 16384  # vocabulary rows cast to float32 at a time


def losses_of(scores: Tensor, answers: Tensor) -> Tensor:
    """Float32 (rows,): the cross-entropy over the candidates, or minus the score of a single one."""
    return -scores[:, 0] if scores.shape[1] == 1 else functional.cross_entropy(scores, answers, reduction="none")


def mean_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """Their mean."""
    return -scores.mean() if scores.shape[1] == 1 else functional.cross_entropy(scores, answers)


@dataclass(frozen=True, slots=True)
class CausalInputs:
    """A `prompts.CausalPass` on the model's device."""

    ids: Tensor
    positions: Tensor
    sequence: Tensor
    slot: Tensor
    token: Tensor
    weight: Tensor


class CausalScorer:
    """Score of a candidate: mean log-probability of its tokens after the prompt."""

    def __init__(self, loaded: LoadedModel, task: Task) -> None:
        self._model = loaded.model
        self._task = task
        if not isinstance(loaded.model.get_output_embeddings(), nn.Linear):
            problem = "its output head is not linear"
            raise UnsupportedModel(type(loaded.model).__name__, problem, "use another causal LM")
        self._prompts = CausalPrompts(loaded, task)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Prompts, cut from the left to the task's limit."""
        return self._prompts.tokens(examples)

    def collate(self, prompts: Sequence[Prompt]) -> CausalInputs:
        """One sequence for each prompt and stem."""
        made = self._prompts.collate(prompts)
        arrays = made.ids, made.positions, made.sequence, made.slot, made.token, made.weight
        return CausalInputs(*(torch.from_numpy(array).to(self._model.device) for array in arrays))

    def scores(self, passes: Sequence[CausalInputs]) -> Tensor:
        """Float32 (rows of all passes, candidates); those that a row lacks, and another has, score minus infinity."""
        found = [self._scores(inputs) for inputs in passes]
        most = max(part.shape[1] for part in found)
        return torch.cat([functional.pad(part, (0, most - part.shape[1]), value=-torch.inf) for part in found])

    def _scores(self, inputs: CausalInputs) -> Tensor:
        with _head_at(self._model, inputs.positions):
            logits = self._model(input_ids=inputs.ids, use_cache=False).logits
        log_probabilities = logits.float().log_softmax(dim=-1)
        found: Tensor = log_probabilities[inputs.sequence, inputs.slot, inputs.token]
        scores = (found * inputs.weight).sum(dim=-1)
        if inputs.token.ndim == 2:
            return scores
        return scores.masked_fill(inputs.weight.sum(dim=-1) == 0, -torch.inf)


@contextmanager
def _head_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Let the output head see only these positions, and compute in float32, in the model's own forward pass.

    So whatever the model does to logits after its head (soft caps, scales) stays in.
    """
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        index = positions[:, :, None].expand(-1, -1, hidden.shape[-1])
        return _float32_linear(hidden.gather(1, index), head)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _float32_linear(hidden: Tensor, layer: nn.Linear) -> Tensor:
    """hidden (…, in) to float32 (…, out); bfloat16 logits would be coarser than what a perturbation changes."""
    hidden = hidden.float()
    if layer.weight.dtype == torch.float32:
        return functional.linear(hidden, layer.weight, layer.bias)
    parts = [functional.linear(hidden, rows.float()) for rows in torch.split(layer.weight, _HEAD_ROWS)]
    logits = torch.cat(parts, dim=-1)
    return logits if layer.bias is None else logits + layer.bias.float()


class EncoderScorer:
    """Score of a class: cosine between the text's and the label description's embedding, times the task's scale.

    The descriptions pass through the same weights as the texts, once for all of them.
    """

    def __init__(self, loaded: LoadedModel, task: Task) -> None:
        self._loaded = loaded
        self._task = task
        self._prompts = EncoderPrompts(loaded, task)
        self._descriptions = _padded(loaded, self._prompts.descriptions)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Texts, cut from the right to the task's limit; an empty one becomes one token."""
        return self._prompts.tokens(examples)

    def collate(self, prompts: Sequence[Prompt]) -> Inputs:
        """Padded ids and their mask."""
        return _padded(self._loaded, [prompt.ids for prompt in prompts])

    def scores(self, passes: Sequence[Inputs]) -> Tensor:
        """Float32 (rows of all passes, classes)."""
        texts = torch.cat([embed(self._loaded.model, inputs) for inputs in passes])
        classes = embed(self._loaded.model, self._descriptions)
        return self._task.scale * texts @ classes.T


Scorer = CausalScorer | EncoderScorer


def scorer_for(loaded: LoadedModel, task: Task) -> Scorer:
    """The scorer that fits the kind of model, or `TaskError` where the model cannot do the task."""
    return CausalScorer(loaded, task) if loaded.kind == "causal" else EncoderScorer(loaded, task)


def tokenise(loaded: LoadedModel, texts: list[str], max_tokens: int) -> Inputs:
    """Padded inputs of an encoder, int64 (texts, length) each, on the model's device."""
    return _padded(loaded, encoded(loaded, texts, min(max_tokens, loaded.max_tokens)))


def _padded(loaded: LoadedModel, ids: Sequence[list[int]]) -> Inputs:
    filled = {
        "input_ids": padded(ids, loaded.tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(text) for text in ids]),
    }
    return {key: torch.from_numpy(array).to(loaded.model.device) for key, array in filled.items()}


def embed(model: Any, inputs: Inputs) -> Tensor:
    """Mean over the tokens, scaled to length 1: float32 (texts, hidden)."""
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].float()
    total = (mask[:, None, :] @ hidden).squeeze(1)  # the mean's denominator falls out of the scaling
    return functional.normalize(total, dim=-1)
