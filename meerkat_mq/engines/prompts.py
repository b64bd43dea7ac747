"""From examples to token sequences and back to scores: what all engines of language models share. NumPy only.

A causal language model scores a candidate by the mean log-probability of its tokens after the prompt; an encoder by
the cosine between a text and a description. What is read, where it is cut, which positions are needed, and how rows
are put into passes must not differ between engines, or nodes of one run would measure different losses.

Passes are bounded in tokens, whatever a task's words and a row's options are: they may come from anybody. A row whose
candidates need more than a few passes' worth is read in parts, a part a group of candidates.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.step import Row
from meerkat_mq.errors import TaskError, shown
from meerkat_mq.tasks.data import problem_of, usable_rows
from meerkat_mq.tasks.task import Example, Task

Int64Array = npt.NDArray[np.int64]
Batch = TypeVar("Batch")

WORTH: Final = 4  # passes, by their tokens, that one row is still read in at once
SHORT: Final = 16  # tokens of candidates that all rows share; longer ones count where passes are filled
TOGETHER: Final = 4096  # tokens of descriptions in a pass, padded


class Reader(Protocol):
    """A model's tokenizer, and what is known of its inputs.

    Attributes:
        tokenizer: called with texts, `add_special_tokens` and, to cut them, `truncation` and `max_length`; returns a
            table with "input_ids". `pad_token_id`: its padding. For texts to be learned (`continuations`) it has more
            of what tokenizers of transformers have: `eos_token_id`, `is_fast`, `return_offsets_mapping`,
            `chat_template` and `apply_chat_template`.
        max_tokens: longest input in tokens.
        start: the ids that stand before every text that a causal LM goes on from.
    """

    @property
    def tokenizer(self) -> Any:
        """As above."""

    @property
    def max_tokens(self) -> int:
        """As above."""

    @property
    def start(self) -> tuple[int, ...]:
        """As above."""


def prompt_ids(reader: Reader, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that a causal LM is to continue: `start` before each, nothing after its last token of text.

    An end token that the tokenizer would append tells the model that nothing follows. A start token that the text
    itself begins with is not put before it a second time.
    """
    bare = reader.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*reader.start, *dropwhile(lambda token: token in reader.start[-1:], ids)] for ids in bare]


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """How rows may go on.

    Attributes:
        stems: token sequences to be read. A candidate's last token is predicted, never read, so candidates that differ
            only there share a stem, whose number `stem_of` gives, int64 (candidates,).
        token: int64 (candidates, slots), weight: float32 likewise: 1 ÷ the candidate's tokens, 0 beyond them.
        limit: tokens of a prompt that they leave room for.
        own: whether they count where passes are filled: those of a row do, and long ones.
    """

    stems: list[tuple[int, ...]]
    stem_of: Int64Array
    token: Int64Array
    weight: Float32Array
    limit: int
    own: bool

    @property
    def slots(self) -> int:
        """Tokens of the longest."""
        return len(self.token[0])

    def some(self, first: int, last: int) -> tuple["Candidates", Int64Array]:
        """Those of the stems from `first` on, before `last`; and which these are, int64 (candidates,)."""
        here = np.flatnonzero((first <= self.stem_of) & (self.stem_of < last))
        slots = int((self.weight[here] > 0).sum(axis=1).max())
        token, weight = self.token[here, :slots], self.weight[here, :slots]
        return Candidates(self.stems[first:last], self.stem_of[here] - first, token, weight, self.limit, True), here


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

    def parts(self, limit: int) -> Iterator[tuple["Prompt", Int64Array | None]]:
        """Itself, or, where passes of `limit` tokens are too small for it, once for each group of its candidates.

        Each with the candidates that it has, int64 (candidates,); None: all.
        """
        found = self.candidates
        longest = len(self.ids) + (len(found.stems[0]) if found else 0)
        if found is None or longest * self.sequences <= WORTH * limit:
            yield self, None
            return
        each = max(1, limit // longest)
        for first in range(0, self.sequences, each):
            part, here = found.some(first, first + each)
            yield Prompt(self.ids, part), here


@dataclass(frozen=True, slots=True, eq=False)
class CausalPass:
    """Token sequences, and where the candidates' log-probabilities are found in them.

    Attributes:
        ids: int64 (sequences, length), padded on the right: no later token is seen, so no attention mask is needed.
        positions: int64 (sequences, slots), the positions whose logits are needed.
        sequence: int64 (rows, candidates, 1); slot: int64 (slots,); token: int64, and weight: float32, both
            (candidates, slots), or (rows, candidates, slots) where rows differ: the log-probabilities of every
            candidate's tokens, by broadcasting.
    """

    ids: Int64Array
    positions: Int64Array
    sequence: Int64Array
    slot: Int64Array
    token: Int64Array
    weight: Float32Array


class CausalPrompts:
    """Prompts and passes of a task for a causal language model.

    Raises:
        TaskError: the tokenizer cannot tell candidates apart, or they leave no room for a row.
    """

    def __init__(self, reader: Reader, task: Task) -> None:
        self._reader = reader
        self._task = task
        self.shared = self._candidates(task.candidates, own=False) if task.candidates else None

    def _candidates(self, words: Sequence[str], *, own: bool) -> Candidates:
        found = candidate_ids(self._reader.tokenizer, self._task, words)
        return candidates_of(found, _room(self._reader, self._task, max(map(len, found)) - 1), own=own)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Prompts, cut from the left to the task's limit."""
        assert self._task.continuation is None, "continuations.causal_prompts makes those of texts to be learned"
        prompts = prompt_ids(self._reader, [example.prompt for example in examples])
        each = [self.shared or self._candidates(example.candidates, own=True) for example in examples]
        return [
            Prompt(cut_left(prompt, found.limit, self._reader.start), found)
            for prompt, found in zip(prompts, each, strict=True)
        ]

    def collate(self, prompts: Sequence[Prompt]) -> CausalPass:
        """One sequence for each prompt and stem."""
        each = [prompt.candidates for prompt in prompts if prompt.candidates]
        pairs = [(prompt.ids, stem) for prompt, found in zip(prompts, each, strict=True) for stem in found.stems]
        last = np.array([[len(ids) - 1] for ids, _ in pairs])
        ends = np.array([[len(ids) + len(stem) - 1] for ids, stem in pairs])
        slot = np.arange(max(found.slots for found in each))
        first = np.cumsum([0, *(prompt.sequences for prompt in prompts[:-1])])[:, None]
        stem_of, token, weight = _together(each, len(slot), self.shared)
        return CausalPass(
            ids=padded([[*ids, *stem] for ids, stem in pairs]),
            positions=np.minimum(last + slot, ends),
            sequence=(first + stem_of)[:, :, None],
            slot=slot,
            token=token,
            weight=weight,
        )


def candidates_of(found: Sequence[tuple[int, ...]], limit: int, *, own: bool) -> Candidates:
    """Candidates with these token ids; limit and own as there."""
    read = sorted({ids[:-1] for ids in found}, key=len, reverse=True)
    stems = [stem for i, stem in enumerate(read) if not any(o[: len(stem)] == stem for o in read[:i])]
    stem_of = [next(i for i, s in enumerate(stems) if s[: len(c) - 1] == c[:-1]) for c in found]
    slots = max(map(len, found))
    lengths = np.array([[len(ids)] for ids in found], np.float32)
    return Candidates(
        stems=stems,
        stem_of=np.array(stem_of, np.int64),
        token=padded(found),
        weight=np.where(np.arange(slots) < lengths, 1 / lengths, np.float32(0)),
        limit=limit,
        own=own or slots > SHORT,
    )


def _together(
    each: Sequence[Candidates], slots: int, shared: Candidates | None
) -> tuple[Int64Array, Int64Array, Float32Array]:
    """stem_of, token and weight of a pass: those that all rows share, or each row's, padded."""
    if shared is not None and all(found is shared for found in each):
        return shared.stem_of[None], shared.token, shared.weight
    most = max(len(found.stem_of) for found in each)

    def stacked(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.stack([np.pad(a, ((0, most - a.shape[0]), (0, slots - a.shape[1]))) for a in arrays])

    stem_of = padded([list(found.stem_of) for found in each])
    return stem_of, stacked([found.token for found in each]), stacked([found.weight for found in each])


def _room(reader: Reader, task: Task, words: int) -> int:
    """Tokens of a prompt: what the limit leaves, for a row and the template's end, beside `words` of candidates."""
    limit = min(task.max_tokens, reader.max_tokens)
    fixed = len(prompt_ids(reader, [task.ending])[0])
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


def cut_left(ids: list[int], limit: int, start: tuple[int, ...]) -> list[int]:
    """The last `limit` tokens, with the start tokens before them; an empty prompt becomes one token."""
    if len(ids) <= limit:
        return ids or [0]
    first = ids[: len(start)] if ids[: len(start)] == list(start) else []
    return [*first, *ids[len(ids) - max(limit - len(first), 0) :]][:limit]


class EncoderPrompts:
    """Texts of a task for an encoder, and the descriptions that they are compared with.

    Attributes:
        descriptions: token ids of each, in passes of a bounded size.

    Raises:
        TaskError: the task has no descriptions, one would be cut, or the model cannot tell two apart.
    """

    def __init__(self, reader: Reader, task: Task) -> None:
        if not task.descriptions:
            problem = f"a {task.kind} task says nothing that an encoder can compare"
            raise TaskError(f"task {task.name}", problem, "give a causal language model")
        self._reader = reader
        self._limit = min(task.max_tokens, reader.max_tokens)
        _check_descriptions(reader, task, self._limit)
        self.descriptions = _in_order(encoded(reader, list(task.descriptions), self._limit))

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Texts, cut from the right to the task's limit; an empty one becomes one token."""
        return [Prompt(ids) for ids in encoded(self._reader, [example.text for example in examples], self._limit)]


def _in_order(texts: Sequence[list[int]]) -> list[list[list[int]]]:
    """The texts in passes, one after the other."""
    parts: list[list[list[int]]] = [[]]
    for text in texts:
        if parts[-1] and not fit([*parts[-1], text]):
            parts.append([])
        parts[-1].append(text)
    return parts


def fit(texts: Sequence[Sized]) -> bool:
    """Whether so many texts, padded, are read in one pass with descriptions."""
    return len(texts) * max(map(len, texts)) <= TOGETHER


def _check_descriptions(reader: Reader, task: Task, limit: int) -> None:
    """Refuse those that would be cut, and those that a model cannot tell apart."""
    where = f"task {task.name}: descriptions"
    found: list[list[int]] = reader.tokenizer(list(task.descriptions))["input_ids"]
    for number, (text, ids) in enumerate(zip(task.descriptions, found, strict=True)):
        if len(ids) > limit:
            problem = f"{shown(text)} has {len(ids)} tokens, more than {limit}"
            raise TaskError(where, problem, "shorten it, or raise max_tokens as far as the model allows")
        if not ids or ids in found[:number]:
            problem = f"{shown(text)} has {'the tokens of another one' if ids else 'no tokens'}"
            raise TaskError(where, problem, "describe each class in words of its own")


def encoded(reader: Reader, texts: list[str], limit: int) -> list[list[int]]:
    """Ids as an encoder reads them, cut from the right to `limit` tokens; no text is empty."""
    found = reader.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    return [ids or [reader.tokenizer.pad_token_id or 0] for ids in found]


def padded(rows: Sequence[Sequence[int]], filler: int = 0) -> Int64Array:
    """Int64 (rows, longest), padded on the right."""
    whole = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
    return whole


class Preparing(ABC, Generic[Batch]):
    """How engines of language models prepare rows."""

    @abstractmethod
    def _prepared(self, rows: Sequence[Row]) -> Batch:
        """Make a batch; raises whatever a row's text makes of a tokenizer."""

    def prepare(self, rows: Sequence[Row]) -> Batch:
        """Tokenise and collate, once for all passes over these rows; those that fail are left out and logged."""
        try:
            return self._prepared(rows)
        except BaseException as error:
            problem_of(error)
            return self._prepared(usable_rows(rows, self._prepared))

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that can be prepared, or `DataError` where there are none; the log names the others."""
        return usable_rows(rows, self._prepared)


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the scores of rows are found among those of their passes.

    Attributes:
        line: int64 (rows,), the line of each row; (rows, candidates) where some rows are read in parts.
        column: int64 (rows, candidates), where in its line; -1: the row has no such candidate. None: as in the line.
    """

    line: Int64Array
    column: Int64Array | None = None


def in_passes(prompts: Sequence[Prompt], limit: int) -> tuple[list[list[Prompt]], Places]:
    """Passes of rows of like length, and where the scores of each row are found among those of the passes."""
    parts = [(row, part, here) for row, prompt in enumerate(prompts) for part, here in prompt.parts(limit)]
    order = sorted(range(len(parts)), key=lambda number: parts[number][1].size)
    passes, line = list(passes_of([parts[number][1] for number in order], limit)), np.argsort(np.array(order))
    if len(parts) == len(prompts):
        return passes, Places(line)
    most = max(len(prompt.candidates.stem_of) for prompt in prompts if prompt.candidates)
    lines, columns = np.zeros((len(prompts), most), np.int64), np.full((len(prompts), most), -1, np.int64)
    for number, (row, part, here) in enumerate(parts):
        count = len(part.candidates.stem_of) if part.candidates else 0
        found = np.arange(count) if here is None else here
        lines[row, found], columns[row, found] = line[number], np.arange(count)
    return passes, Places(lines, columns)


def passes_of(prompts: Sequence[Prompt], limit: int) -> Iterator[list[Prompt]]:
    """Cut prompts, shortest first, into parts that padded hold no more than `limit` tokens, or one prompt."""
    part: list[Prompt] = []
    sequences = 0
    for prompt in prompts:
        sequences = max(sequences, prompt.sequences)
        if part and (len(part) + 1) * prompt.size * sequences > limit:
            yield part
            part, sequences = [], prompt.sequences
        part.append(prompt)
    yield part
