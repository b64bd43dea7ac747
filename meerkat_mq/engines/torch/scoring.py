"""From examples to scores: candidates of a causal LM, descriptions of candidates for an encoder.

A scorer makes prompts of examples, one pass of some prompts, and of passes scores, whose softmax is the model's belief.
Gradients flow where the caller allows them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from meerkat_mq.engines.continuations import causal_prompts
from meerkat_mq.engines.prompts import EncoderPrompts, Prompt, encoded, padded
from meerkat_mq.engines.torch.head import check_head, with_logits
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.tasks.task import Example, Task

Inputs = dict[str, Tensor]
Around = Callable[[Tensor, Tensor, Tensor | None], AbstractContextManager[None]]  # `prefix.FrozenPrefix.around`


def whole(*_: object) -> AbstractContextManager[None]:
    """Passes compute all blocks."""
    return nullcontext()


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

    def __init__(self, loaded: LoadedModel, task: Task, around: Around = whole) -> None:
        self._model = loaded.model
        self._around = around
        self._task = task
        check_head(loaded.model)
        self._prompts = causal_prompts(loaded, task)

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
        found = [self._scores(inputs, self._found(inputs)) for inputs in passes]
        most = max(part.shape[1] for part in found)
        return torch.cat([functional.pad(part, (0, most - part.shape[1]), value=-torch.inf) for part in found])

    def counted(self, passes: Sequence[CausalInputs]) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows that are texts to be learned: scores as above, (rows, 1); their tokens; how many are put first."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for inputs in passes:
            both = self._found(inputs, ranked=True)
            real = inputs.weight > 0
            first = (both[1] > 0) & real
            found.append((self._scores(inputs, both[:1]), real.sum(dim=(1, 2)), first.sum(dim=(1, 2))))
        scores, tokens, first = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scores, tokens, first

    def _scores(self, inputs: CausalInputs, found: Tensor) -> Tensor:
        scores = (found[0] * inputs.weight).sum(dim=-1)
        if inputs.token.ndim == 2:
            return scores
        return scores.masked_fill(inputs.weight.sum(dim=-1) == 0, -torch.inf)

    def _found(self, inputs: CausalInputs, *, ranked: bool = False) -> Tensor:
        """Float32 (1 or 2, rows, candidates, slots): log-probabilities of tokens; `ranked`: and 1 of the first ones."""

        def look(part: slice, logits: Tensor) -> Tensor:
            log_probabilities = logits.log_softmax(dim=-1)
            slot = inputs.slot[part] - part.start
            found: Tensor = log_probabilities[inputs.sequence, slot, inputs.token[..., part]]
            if not ranked:
                return found[None]
            return torch.stack([found, (found >= log_probabilities.amax(dim=-1)[inputs.sequence, slot]).float()])

        with self._around(inputs.ids, inputs.positions[:, -1] + 1, inputs.positions):
            return torch.cat(with_logits(self._model, inputs.ids, inputs.positions, look), dim=-1)


class EncoderScorer:
    """Score of a class: cosine between the text's and the label description's embedding, times the task's scale.

    The descriptions pass through the same weights as the texts, once for all of them.
    """

    def __init__(self, loaded: LoadedModel, task: Task, around: Around = whole) -> None:
        self._loaded = loaded
        self._around = around
        self._task = task
        self._prompts = EncoderPrompts(loaded, task)
        self._descriptions = [_padded(loaded, part) for part in self._prompts.descriptions]

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Texts, cut from the right to the task's limit; an empty one becomes one token."""
        return self._prompts.tokens(examples)

    def collate(self, prompts: Sequence[Prompt]) -> Inputs:
        """Padded ids and their mask."""
        return _padded(self._loaded, [prompt.ids for prompt in prompts])

    def scores(self, passes: Sequence[Inputs]) -> Tensor:
        """Float32 (rows of all passes, classes)."""
        texts = torch.cat([self._embed(inputs) for inputs in passes])
        classes = torch.cat([self._embed(inputs) for inputs in self._descriptions])
        return self._task.scale * texts @ classes.T

    def _embed(self, inputs: Inputs) -> Tensor:
        with self._around(inputs["input_ids"], inputs["attention_mask"].sum(dim=1), None):
            return embed(self._loaded.model, inputs)


Scorer = CausalScorer | EncoderScorer


def scorer_for(loaded: LoadedModel, task: Task, around: Around = whole) -> Scorer:
    """The scorer that fits the kind of model, or `TaskError` where the model cannot do the task.

    Each pass is made within what `around` gives for its ids, their lengths, and the positions that are wanted.
    """
    return (CausalScorer if loaded.kind == "causal" else EncoderScorer)(loaded, task, around)


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
