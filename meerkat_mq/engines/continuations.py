"""Texts to be learned: what a causal LM reads of them, and which tokens it is to predict.

A prompt and what follows it are tokenised apart, as they are when a model answers: it reads the prompt's tokens, and
then says tokens of its own. In a chat, the tokenizer's own template stands around both. It is rendered once, around
two words that stand for the messages; what is found before, between and after these is put around every row. So a
row's text is never read as a template, and a template that depends on the date is the same for the whole run.

What stands around the texts decides what is learned, and the tokenizer's fingerprint says nothing of it: two models
with one vocabulary may have different chat templates, or end tokens. So a run has a fingerprint of that too.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from meerkat_mq.core.step import Row
from meerkat_mq.engines.prompts import CausalPrompts, Prompt, Reader, candidates_of, cut_left, prompt_ids
from meerkat_mq.engines.torch.chat_template import render
from meerkat_mq.errors import DataError, ModelMismatch, TaskError, reason
from meerkat_mq.tasks.data import problem_of
from meerkat_mq.tasks.task import Continuation, Example, Task

_USER, _ASSISTANT = "MEERKATSAYS", "MEERKATHEARS"
SYSTEM = "MEERKATRULES"  # for a system message that is not known yet
_DATE = "26 Jul 2024"  # what templates of Llama 3 say where they are given none and know no clock


@dataclass(frozen=True, slots=True)
class Chat:
    """The text of a chat around a user's message and the assistant's."""

    before: str
    between: str
    after: str


class Continuations:
    """Token ids of prompts, and of what follows them, within a task's limit.

    Raises:
        TaskError: the tokenizer has no chat template that can be used, or the limit leaves no room in it.
    """

    def __init__(self, reader: Reader, task: Task) -> None:
        assert task.continuation is not None
        self._reader = reader
        self._limit = min(task.max_tokens, reader.max_tokens)
        self._chat = _chat(reader.tokenizer, task.continuation, task.name) if task.continuation.chat else None
        self._before, self._after = list[int](), list[int]()  # of a chat, around the prompt
        end = reader.tokenizer.eos_token_id
        self._end = [end] if task.continuation.ends and end is not None else []
        if self._chat is not None:
            self._before, self._after = self._bare(self._chat.before), self._bare(self._chat.between)
            self._end = self._bare(self._chat.after) or self._end
            fixed = len(self._before) + len(self._after)
            if self._limit < fixed + 2:
                problem = f"{self._limit} tokens are too few: the chat template takes {fixed} of each row"
                raise TaskError(f"task {task.name}: max_tokens", problem, f"set it to {fixed + 2} at least")

    def ids(self, example: Example) -> tuple[list[int], list[int]]:
        """The prompt's ids, and those to be predicted; at least one of each.

        Of both together that are longer than the limit, the prompt loses its beginning, but a quarter of the limit
        stays for it (in a chat, also its frame); then what follows loses its end. A text without a prompt begins with
        what the tokenizer puts before every text, or else its first token is read, and not predicted.

        Raises:
            DataError: there is nothing to be predicted.
        """
        text = example.candidates[0] if self._chat is None else example.candidates[0].strip()
        followed = [*self._bare(text), *self._end]
        prompt = self._prompt(example.prompt)
        if not prompt:
            prompt, followed = followed[:1], followed[1:]
        if not followed:
            raise DataError("a row", "has a single token, which nothing follows", "remove it")
        fixed = len(self._before) + len(self._after)
        least = min(len(prompt), max(self._limit // 4, fixed + 1 if fixed else 1))
        followed = followed[: self._limit - least]
        return self._shortened(prompt, example.prompt, self._limit - len(followed)), followed

    def _prompt(self, text: str) -> list[int]:
        if self._chat is not None:
            return self._bare(self._chat.before + text.strip() + self._chat.between)
        return prompt_ids(self._reader, [text])[0] if text else list(self._reader.start)

    def _shortened(self, prompt: list[int], text: str, most: int) -> list[int]:
        if len(prompt) <= most:
            return prompt
        if self._chat is None:
            return cut_left(prompt, most, self._reader.start)
        message = self._bare(text.strip())
        room = most - len(self._before) - len(self._after)
        return [*self._before, *message[len(message) - room :], *self._after]

    def _bare(self, text: str) -> list[int]:
        return list(self._reader.tokenizer(text, add_special_tokens=False)["input_ids"])


class TextPrompts(CausalPrompts):
    """Prompts and passes of a task whose rows are texts to be learned; raises as `Continuations`."""

    def __init__(self, reader: Reader, task: Task) -> None:
        super().__init__(reader, task)
        self._continuations = Continuations(reader, task)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """What is read, and as the only candidate what is predicted."""
        each = [self._continuations.ids(example) for example in examples]
        return [Prompt(ids, candidates_of([tuple(followed)], len(ids), own=True)) for ids, followed in each]


def causal_prompts(reader: Reader, task: Task) -> CausalPrompts:
    """Those of a task's kind."""
    return CausalPrompts(reader, task) if task.continuation is None else TextPrompts(reader, task)


def windows(task: Task, reader: Reader, rows: Sequence[Row]) -> list[Row]:
    """The rows, those that are too long in windows; one whose text cannot be tokenised stays as it is."""

    def of(row: Row) -> Sequence[Row]:
        try:
            return task.windows(row, partial(pieces, reader, task.max_tokens))
        except BaseException as error:
            problem_of(error)
            return [row]

    return [part for row in rows for part in of(row)]


def pieces(reader: Reader, max_tokens: int, text: str) -> list[str]:
    """A text in parts of so many tokens, with the start tokens before each; put together, they are the text.

    A tokenizer that cannot say where its tokens stand gives the text whole: the end of a long one is then not learned.
    """
    if not reader.tokenizer.is_fast:
        return [text]
    found: dict[str, Any] = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    size = max(1, min(max_tokens, reader.max_tokens) - len(reader.start))
    return list(_parts(text, found["offset_mapping"], size))


def _parts(text: str, offsets: Sequence[tuple[int, int]], size: int) -> Iterator[str]:
    """Parted after every `size` tokens, which stand at these offsets, or before: between characters."""
    whole = [at for at in range(1, len(offsets)) if offsets[at - 1][1] <= offsets[at][0]]  # where it may be parted
    begin, first, last = 0, 0, 0  # of the part in the text and among the tokens; where it may end
    for at in [*whole, len(offsets)]:
        if at - first > size and last > first:
            yield text[begin : offsets[last - 1][1]]
            begin, first = offsets[last - 1][1], last
        last = at
    yield text[begin:]


def _chat(tokenizer: Any, wanted: Continuation, name: str) -> Chat:
    """The tokenizer's template, around two words."""
    where = f"task {name}: chat"
    if not tokenizer.chat_template:
        problem = "the model's tokenizer has no chat template"
        raise TaskError(where, problem, "set chat = false, or use a model that was tuned for chats")
    try:
        asked, whole = rendered(tokenizer, wanted.system)
    except Exception as error:  # the template is a program of its own: it raises all kinds
        problem = f"the tokenizer's chat template cannot be used ({reason(error)})"
        raise TaskError(where, problem, "leave system out, or set chat = false") from error
    if asked.count(_USER) != 1 or whole.count(_ASSISTANT) != 1:
        problem = "the tokenizer's chat template does not say each message once"
        raise TaskError(where, problem, "set chat = false, and write the template yourself")
    before, _, between = asked.partition(_USER)
    return Chat(before, between, whole.partition(_ASSISTANT)[2].rstrip())


def completion_fingerprint(tokenizer: Any, task: Task) -> bytes | None:
    """32 bytes: SHA-256 of what stands around the texts of a completion; None of another kind of task.

    That is JSON: [the chat's texts before, between and after the two messages, or null; the end token's id, or null
    where the chat has an end of its own].

    Raises:
        TaskError: the tokenizer has no chat template that can be used.
    """
    wanted = task.continuation
    if wanted is None or not wanted.ends:
        return None
    chat = _chat(tokenizer, wanted, task.name) if wanted.chat else None
    texts = None if chat is None else [chat.before, chat.between, chat.after]
    end = None if chat is not None and chat.after else tokenizer.eos_token_id
    return hashlib.sha256(json.dumps([texts, end]).encode()).digest()


def check_completion(folder: Path, tokenizer: Any, task: Task, wanted: bytes | None) -> None:
    """Make sure that completions are read as the run reads them; None: the run does not say how.

    Raises:
        ModelMismatch: chat template or end token differ.
    """
    found = None if wanted is None else completion_fingerprint(tokenizer, task)
    if found != wanted and wanted is not None:
        what = "chat template" if task.continuation is not None and task.continuation.chat else "end token"
        problem = f"another {what}: fingerprint {(found or b'').hex()[:16]}…, not {wanted.hex()[:16]}…"
        remedy = "give the tokenizer files of the model that the server names, or a bundle that was made with them"
        raise ModelMismatch(str(folder), problem, remedy)


def rendered(tokenizer: Any, system: str) -> tuple[str, str]:
    """A chat up to where the assistant is to answer, and with the answer; "": no system message.

    The template is a program of its own: it raises all kinds of errors. That of a bundle's tokenizer is text.
    """
    messages = [{"role": "user", "content": _USER}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    answered = [*messages, {"role": "assistant", "content": _ASSISTANT}]
    chats: list[dict[str, Any]] = [
        {"messages": said, "add_generation_prompt": said is messages, "date_string": _DATE}
        for said in (messages, answered)
    ]
    if hasattr(tokenizer, "get_chat_template"):
        asked, whole = render(tokenizer, chats)
    else:
        asked, whole = (tokenizer.apply_chat_template(chat.pop("messages"), tokenize=False, **chat) for chat in chats)
    return asked, whole
