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
from torch.nn.utils.rnn import pad_sequence

from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.errors import TaskError, UnsupportedModel, shown
from meerkat_mq.tasks.task import Example, Task

Inputs = dict[str, Tensor]

_HEAD_ROWS = 16384  # vocabulary rows cast to float32 at a time


def losses_of(scores: Tensor, answers: Tensor) -> Tensor:
    """Float32 (rows,): the cross-entropy over the candidates, or minus the score of a single one."""
    return -scores[:, 0] if scores.shape[1] == 1 else functional.cross_entropy(scores, answers, reduction="none")


def mean_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """Their mean."""
    return -scores.mean() if scores.shape[1] == 1 else functional.cross_entropy(scores, answers)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """How rows may go on.

    Attributes:
        stems: token sequences to be read. A candidate's last token is predicted, never read, so candidates that differ
            only there share a stem, whose number `stem_of` gives, int64 (candidates,).
        token: int64 (candidates, slots), weight: float32 likewise: 1 ÷ the candidate's tokens, 0 beyond them.
        limit: tokens of a prompt that they leave room for.
        own: whether they are the row's own, and count where passes are filled.
    """

    stems: list[tuple[int, ...]]
    stem_of: Tensor
    token: Tensor
    weight: Tensor
    limit: int
    own: bool

    @property
    def slots(self) -> int:
        """Tokens of the longest."""
        return self.token.shape[1]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row's token ids, and, for a causal LM, how it may go on."""

    ids: list[int]
    candidates: Candidates | None = None

    @property
    def size(self) -> int:
        """Tokens of a sequence, without those of candidates that all rows share: these are short."""
        return len(self.ids) + (self.candidates.slots - 1 if self.candidates and self.candidates.own else 0)

    @property
    def sequences(self) -> int:
        """Token sequences that it needs."""
        return len(self.candidates.stems) if self.candidates else 1


@dataclass(frozen=True, slots=True)
class CausalInputs:
    """Token sequences, and where the candidates' log-probabilities are found in them.

    Attributes:
        ids: int64 (sequences, length), padded on the right: no later token is seen, so no attention mask is needed.
        positions: int64 (sequences, slots), the positions whose logits are needed.
        sequence: int64 (rows, candidates, 1); slot: int64 (slots,); token: int64, and weight: float32, both
            (candidates, slots), or (rows, candidates, slots) where rows differ: the log-probabilities of every
            candidate's tokens, by broadcasting.
    """

    ids: Tensor
    positions: Tensor
    sequence: Tensor
    slot: Tensor
    token: Tensor
    weight: Tensor


class CausalScorer:
    """Score of a candidate: mean log-probability of its tokens after the prompt."""

    def __init__(self, loaded: LoadedModel, task: Task) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._task = task
        self._device = loaded.model.device
        if not isinstance(loaded.model.get_output_embeddings(), nn.Linear):
            problem = "its output head is not linear"
            raise UnsupportedModel(type(loaded.model).__name__, problem, "use another causal LM")
        self._shared = self._candidates(task.candidates, own=False) if task.candidates else None

    def _candidates(self, words: Sequence[str], *, own: bool) -> Candidates:
        found = candidate_ids(self._loaded.tokenizer, self._task, words)
        read = sorted({ids[:-1] for ids in found}, key=len, reverse=True)
        stems = [stem for i, stem in enumerate(read) if not any(o[: len(stem)] == stem for o in read[:i])]
        stem_of = [next(i for i, s in enumerate(stems) if s[: len(c) - 1] == c[:-1]) for c in found]
        slots = max(map(len, found))
        lengths = torch.tensor([[len(ids)] for ids in found])
        return Candidates(
            stems=stems,
            stem_of=torch.tensor(stem_of),
            token=pad_sequence([torch.tensor(ids) for ids in found], batch_first=True).to(self._device),
            weight=((torch.arange(slots) < lengths) / lengths).to(self._device, torch.float32),
            limit=_room(self._loaded, self._task, slots - 1),
            own=own,
        )

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Prompts, cut from the left to the task's limit."""
        prompts = self._loaded.prompts([example.prompt for example in examples])
        each = [self._shared or self._candidates(example.candidates, own=True) for example in examples]
        return [
            Prompt(_cut(prompt, found.limit, self._loaded.start), found)
            for prompt, found in zip(prompts, each, strict=True)
        ]

    def collate(self, prompts: Sequence[Prompt]) -> CausalInputs:
        """One sequence for each prompt and stem."""
        each = [prompt.candidates for prompt in prompts if prompt.candidates]
        pairs = [(prompt.ids, stem) for prompt, found in zip(prompts, each, strict=True) for stem in found.stems]
        sequences = [torch.tensor([*ids, *stem]) for ids, stem in pairs]
        last = torch.tensor([[len(ids) - 1] for ids, _ in pairs])
        ends = torch.tensor([[len(sequence) - 1] for sequence in sequences])
        slot = torch.arange(max(found.slots for found in each))
        first = torch.tensor([0, *(prompt.sequences for prompt in prompts[:-1])]).cumsum(0)[:, None]
        stem_of, token, weight = _together(each, len(slot), self._shared)
        return CausalInputs(
            ids=pad_sequence(sequences, batch_first=True).to(self._device),
            positions=torch.minimum(last + slot, ends).to(self._device),
            sequence=(first + stem_of)[:, :, None].to(self._device),
            slot=slot.to(self._device),
            token=token,
            weight=weight,
        )

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


def _together(each: Sequence[Candidates], slots: int, shared: Candidates | None) -> tuple[Tensor, Tensor, Tensor]:
    """stem_of, token and weight of a pass: those that all rows share, or each row's, padded."""
    if shared is not None:
        return shared.stem_of[None], shared.token, shared.weight
    most = max(len(found.stem_of) for found in each)

    def padded(found: Tensor) -> Tensor:
        return functional.pad(found, (0, slots - found.shape[1], 0, most - found.shape[0]))

    stem_of = pad_sequence([found.stem_of for found in each], batch_first=True)
    token = torch.stack([padded(found.token) for found in each])
    return stem_of, token, torch.stack([padded(found.weight) for found in each])


def _room(loaded: LoadedModel, task: Task, words: int) -> int:
    """Tokens of a prompt: what the limit leaves, for a row and the template's end, beside `words` of candidates."""
    limit = min(task.max_tokens, loaded.max_tokens)
    fixed = len(loaded.prompts([task.ending])[0])
    if limit < words + fixed + 1:
        words_are = task.candidates_key.replace("_", " ")
        key = "max_tokens" if limit == task.max_tokens else task.candidates_key
        problem = f"{limit} tokens leave none for a row: {words_are} take {words}, the end of the template {fixed}"
        least = f"set max_tokens to {words + fixed + 1} at least, or " if key == "max_tokens" else ""
        raise TaskError(f"task {task.name}: {key}", problem, f"{least}shorten the {words_are} or the template's end")
    return limit - words


def candidate_ids(tokenizer: Any, task: Task, own: Sequence[str] = ()) -> list[tuple[int, ...]]:
    """Token ids of each candidate as it continues a prompt: of a row's own, or of those that all rows share.

    Raises:
        TaskError: a candidate has no tokens of its own there, or two have the same.
    """
    words, anchor = own or task.candidates, task.ending or "."
    start = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    whole = tokenizer([anchor + word for word in words], add_special_tokens=False)["input_ids"]
    candidates = [tuple(ids[len(start) :]) for ids in whole]
    word_is = task.candidates_key.replace("_", " ").removesuffix("s")
    for word, ids, candidate in zip(words, whole, candidates, strict=True):
        problem = None
        if list(ids[: len(start)]) != list(start) or not candidate:
            problem, remedy = "melts into the end of the template", f"put the space at the start of the {word_is}"
        elif candidates.count(candidate) > 1:
            problem, remedy = f"has the tokens of another {word_is}", "give each class a word of its own"
        if problem:
            raise TaskError(f"task {task.name}: {task.candidates_key}", f"{word!r} {problem}", remedy)
    return candidates


def _cut(ids: list[int], limit: int, start: tuple[int, ...]) -> list[int]:
    """The last `limit` tokens, with the start tokens before them; an empty prompt becomes one token."""
    if len(ids) <= limit:
        return ids or [0]
    first = ids[: len(start)] if ids[: len(start)] == list(start) else []
    return [*first, *ids[len(ids) - max(limit - len(first), 0) :]][:limit]


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
        if not task.descriptions:
            problem = f"a {task.kind} task says nothing that an encoder can compare"
            raise TaskError(f"task {task.name}", problem, "give a causal language model")
        self._loaded = loaded
        self._task = task
        self._limit = min(task.max_tokens, loaded.max_tokens)
        _check_descriptions(loaded, task, self._limit)
        self._descriptions = tokenise(loaded, list(task.descriptions), self._limit)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Texts, cut from the right to the task's limit; an empty one becomes one token."""
        return [Prompt(ids) for ids in _encoded(self._loaded, [example.text for example in examples], self._limit)]

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
    return _padded(loaded, _encoded(loaded, texts, min(max_tokens, loaded.max_tokens)))


def _encoded(loaded: LoadedModel, texts: list[str], limit: int) -> list[list[int]]:
    found = loaded.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    return [ids or [loaded.tokenizer.pad_token_id or 0] for ids in found]


def _padded(loaded: LoadedModel, ids: Sequence[list[int]]) -> Inputs:
    texts = [torch.tensor(text) for text in ids]
    padded = pad_sequence(texts, batch_first=True, padding_value=loaded.tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": padded.to(loaded.model.device), "attention_mask": mask.to(loaded.model.device)}


def embed(model: Any, inputs: Inputs) -> Tensor:
    """Mean over the tokens, scaled to length 1: float32 (texts, hidden)."""
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].float()
    total = (mask[:, None, :] @ hidden).squeeze(1)  # the mean's denominator falls out of the scaling
    return functional.normalize(total, dim=-1)
