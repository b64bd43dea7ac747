"""From rows to class scores: candidates of a causal LM, label descriptions of an encoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from meerkat_mq.core.step import Row
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.errors import TaskError, UnsupportedModel, shown
from meerkat_mq.tasks.load import fill
from meerkat_mq.wire.descriptor import Task

Inputs = dict[str, Tensor]

_HEAD_ROWS = 16384  # vocabulary rows cast to float32 at a time


class Scorer(Protocol):
    """Rows to scores; gradients flow where the caller allows them.

    Attributes:
        sequences: how many token sequences each row needs.
    """

    sequences: int

    def tokens(self, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of each row, cut to the limit."""

    def collate(self, tokens: Sequence[list[int]]) -> Any:
        """The inputs of one pass."""

    def scores(self, passes: Sequence[Any]) -> Tensor:
        """Float32 (rows of all passes, classes): their softmax is the model's belief."""


def scorer_for(loaded: LoadedModel, task: Task) -> Scorer:
    """The scorer that fits the kind of model."""
    return CausalScorer(loaded, task) if loaded.kind == "causal" else EncoderScorer(loaded, task)


@dataclass(frozen=True, slots=True)
class CausalInputs:
    """Token sequences, and where the candidates' log-probabilities are found in them.

    Attributes:
        ids: int64 (sequences, length), padded on the right: no later token is seen, so no attention mask is needed.
        positions: int64 (sequences, slots), the positions whose logits are needed.
        sequence: int64 (rows, classes, 1), slot: int64 (slots,), token: int64 (classes, slots): the log-probabilities
            of every candidate's tokens, by broadcasting.
    """

    ids: Tensor
    positions: Tensor
    sequence: Tensor


class CausalScorer:
    """Score of a candidate: mean log-probability of its tokens after the prompt.

    A candidate's last token is predicted, never read, so candidates that differ only there share one sequence a row.
    """

    def __init__(self, loaded: LoadedModel, task: Task) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._task = task
        self._device = loaded.model.device
        self._head = _Head(loaded.model)
        candidates = candidate_ids(loaded.tokenizer, task)
        read = sorted({ids[:-1] for ids in candidates}, key=len, reverse=True)
        self._stems = [stem for i, stem in enumerate(read) if not any(o[: len(stem)] == stem for o in read[:i])]
        self.sequences = len(self._stems)
        self._slots = max(map(len, candidates))
        self._limit = _room(loaded, task, self._slots - 1)
        stem_of = [next(i for i, s in enumerate(self._stems) if s[: len(c) - 1] == c[:-1]) for c in candidates]
        self._stem_of = torch.tensor(stem_of)
        lengths = torch.tensor([[len(ids)] for ids in candidates])
        slot = torch.arange(self._slots)
        self._slot = slot.to(self._device)
        self._token = pad_sequence([torch.tensor(ids) for ids in candidates], batch_first=True).to(self._device)
        self._weight = ((slot < lengths) / lengths).to(self._device, torch.float32)

    def tokens(self, rows: Sequence[Row]) -> list[list[int]]:
        """Prompts, cut from the left to the task's limit."""
        prompts = self._loaded.prompts([fill(self._task.template, row) for row in rows])
        return [_cut(prompt, self._limit, self._loaded.start) for prompt in prompts]

    def collate(self, tokens: Sequence[list[int]]) -> CausalInputs:
        """One sequence for each prompt and stem."""
        sequences = [torch.tensor([*prompt, *stem]) for prompt in tokens for stem in self._stems]
        last = torch.tensor([len(prompt) - 1 for prompt in tokens for _ in self._stems])
        ends = torch.tensor([[len(sequence) - 1] for sequence in sequences])
        positions = torch.minimum(last[:, None] + torch.arange(self._slots), ends)
        first = torch.arange(len(tokens))[:, None, None] * len(self._stems)
        return CausalInputs(
            ids=pad_sequence(sequences, batch_first=True).to(self._device),
            positions=positions.to(self._device),
            sequence=(first + self._stem_of[:, None]).to(self._device),
        )

    def scores(self, passes: Sequence[CausalInputs]) -> Tensor:
        """Float32 (rows of all passes, classes)."""
        return torch.cat([self._scores(inputs) for inputs in passes])

    def _scores(self, inputs: CausalInputs) -> Tensor:
        with self._head.at(inputs.positions):
            logits = self._model(input_ids=inputs.ids, use_cache=False).logits
        log_probabilities = logits.float().log_softmax(dim=-1)
        found: Tensor = log_probabilities[inputs.sequence, self._slot, self._token]
        return (found * self._weight).sum(dim=-1)


def _room(loaded: LoadedModel, task: Task, words: int) -> int:
    """Tokens of a prompt: what the limit leaves of the label words' `words`.

    Raises:
        TaskError: it leaves none for a row, beside the template's end.
    """
    limit = min(task.max_tokens, loaded.max_tokens)
    tail = task.template.rpartition("}")[2]
    fixed = len(loaded.prompts([tail])[0])
    if limit < words + fixed + 1:
        key = "max_tokens" if limit == task.max_tokens else "label_words"
        problem = f"{limit} tokens leave none for a row: label words take {words}, the end of the template {fixed}"
        least = f"set max_tokens to {words + fixed + 1} at least, or " if key == "max_tokens" else ""
        raise TaskError(f"task {task.name}: {key}", problem, f"{least}shorten the label words or the template's end")
    return limit - words


def candidate_ids(tokenizer: Any, task: Task) -> list[tuple[int, ...]]:
    """Token ids of each label word as it continues the template.

    Raises:
        TaskError: a label word has no tokens of its own there, or two have the same.
    """
    anchor = task.template.rpartition("}")[2] or "."
    start = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    words = tokenizer([anchor + word for word in task.label_words], add_special_tokens=False)["input_ids"]
    candidates = [tuple(ids[len(start) :]) for ids in words]
    for word, ids, candidate in zip(task.label_words, words, candidates, strict=True):
        if list(ids[: len(start)]) != list(start) or not candidate:
            raise TaskError(
                f"task {task.name}: label_words",
                f"{word!r} melts into the end of the template",
                "put the space at the start of the label word",
            )
        if candidates.count(candidate) > 1:
            raise TaskError(
                f"task {task.name}: label_words",
                f"{word!r} has the tokens of another label word",
                "give each class a word of its own",
            )
    return candidates


def _cut(ids: list[int], limit: int, start: tuple[int, ...]) -> list[int]:
    """The last `limit` tokens, with the start tokens before them; an empty prompt becomes one token."""
    if len(ids) <= limit:
        return ids or [0]
    first = ids[: len(start)] if ids[: len(start)] == list(start) else []
    return [*first, *ids[len(ids) - max(limit - len(first), 0) :]][:limit]


class _Head:
    """Lets the output head see only the positions needed, and compute in float32, in the model's own forward pass.

    So whatever the model does to logits after its head (soft caps, scales) stays in.
    """

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedModel(type(model).__name__, "its output head is not linear", "use another causal LM")
        self._head = head

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        def forward(hidden: Tensor) -> Tensor:
            index = positions[:, :, None].expand(-1, -1, hidden.shape[-1])
            return _float32_linear(hidden.gather(1, index), self._head)

        self._head.forward = forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del self._head.forward


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

    sequences = 1

    def __init__(self, loaded: LoadedModel, task: Task) -> None:
        self._loaded = loaded
        self._task = task
        self._limit = min(task.max_tokens, loaded.max_tokens)
        _check_descriptions(loaded, task, self._limit)
        self._descriptions = tokenise(loaded, list(task.descriptions), self._limit)

    def tokens(self, rows: Sequence[Row]) -> list[list[int]]:
        """Texts, cut from the right to the task's limit; an empty one becomes one token."""
        texts = [fill(self._task.text, row) for row in rows]
        ids: list[list[int]] = self._loaded.tokenizer(texts, truncation=True, max_length=self._limit)["input_ids"]
        return [found or [self._loaded.tokenizer.pad_token_id or 0] for found in ids]

    def collate(self, tokens: Sequence[list[int]]) -> Inputs:
        """Padded ids and their mask."""
        ids = [torch.tensor(text) for text in tokens]
        padded = pad_sequence(ids, batch_first=True, padding_value=self._loaded.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(text) for text in ids], batch_first=True)
        device = self._loaded.model.device
        return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}

    def scores(self, passes: Sequence[Inputs]) -> Tensor:
        """Float32 (rows of all passes, classes)."""
        texts = torch.cat([embed(self._loaded.model, inputs) for inputs in passes])
        classes = embed(self._loaded.model, self._descriptions)
        return self._task.scale * texts @ classes.T


def _check_descriptions(loaded: LoadedModel, task: Task, limit: int) -> None:
    """Refuse those that would be cut, and those that a model cannot tell apart."""
    where = f"task {task.name}: descriptions"
    found: list[list[int]] = loaded.tokenizer(list(task.descriptions))["input_ids"]
    for number, (text, ids) in enumerate(zip(task.descriptions, found, strict=True)):
        if len(ids) > limit:
            problem = f"{shown(text)} has {len(ids)} tokens, more than {limit}"
            raise TaskError(where, problem, "shorten it, or raise max_tokens as far as the model allows")
        if not ids or ids in found[:number]:
            problem = f"{shown(text)} has {'the tokens of another one' if ids else 'no tokens'}"
            raise TaskError(where, problem, "describe each class in words of its own")


def tokenise(loaded: LoadedModel, texts: list[str], max_tokens: int) -> Inputs:
    """Padded inputs of an encoder, int64 (texts, length) each, on the model's device."""
    limit = min(max_tokens, loaded.max_tokens)
    encoded = loaded.tokenizer(
        texts, padding=True, truncation=True, max_length=limit, return_attention_mask=True, return_tensors="pt"
    )
    return {name: tensor.to(loaded.model.device) for name, tensor in encoded.items()}


def embed(model: Any, inputs: Inputs) -> Tensor:
    """Mean over the tokens, scaled to length 1: float32 (texts, hidden)."""
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].float()
    total = (mask[:, None, :] @ hidden).squeeze(1)  # the mean's denominator falls out of the scaling
    return functional.normalize(total, dim=-1)
