"""What a task is: a row becomes an example, and what a model makes of examples becomes figures.

A task is the only one that knows what the fields of a row mean. Of each row it makes an `Example`: text to go on from,
and the candidates that may follow, of which one is right. A causal language model scores a candidate by the mean
log-probability of its tokens; an encoder compares the row's text with a description of each candidate. The loss of an
example with several candidates is the cross-entropy over their scores; with a single one, it is minus its score.

A row may also be a text to be learned: then its one candidate is what follows its prompt, and `Task.continuation` says
how the two are read. Evaluation counts the tokens of such texts, and those that the model would have said itself.

So a new kind of task is one file here: a class with the members of `Task`, and its line in `load.KINDS`. Engines ask
it for examples, evaluations for figures, divisions of data for classes. In the run descriptor a task is JSON with a
name; which kind it is says its key `kind`, absent of a classification, which was the only kind once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.step import Row
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.wire.descriptor import TaskDescription

MOST_EXPONENT = 700.0  # e to a larger one is no float


@dataclass(frozen=True, slots=True)
class Example:
    """What a task makes of a row, for a model of language.

    Attributes:
        prompt, text: what a causal language model goes on from; what an encoder reads.
        candidates: how it may go on, each with its leading space; those of `Task.candidates` where that names any.
        answer: the number of the right one.
    """

    prompt: str
    candidates: tuple[str, ...]
    answer: int
    text: str


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a causal language model reads the one candidate of an example, which is a text to be learned.

    Attributes:
        ends: whether the model's end token follows it, and is learned with it.
        chat: the prompt is a user's message and the candidate the assistant's, in the tokenizer's chat template.
        system: the system message of such a chat; "": none.
    """

    ends: bool
    chat: bool = False
    system: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model makes of rows.

    Attributes:
        scores: float32 (rows, candidates); minus infinity where a row has fewer than another.
        truth: int64 (rows,), the number of the right candidate.
        tokens, first: int64 (rows,), of a text to be learned, its tokens, and how many of them the model puts first,
            given those before; None of other tasks.
    """

    scores: Float32Array
    truth: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64] | None = None
    first: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of some rows.

    Attributes:
        rows: how many; those that cannot be prepared do not count.
        figures: by name, as the task gives them (`classified`, `continued`): always "loss", the mean.
        recalls: by class, the share of its rows that were found; None where it has no rows.
    """

    rows: int
    figures: Mapping[str, float]
    recalls: tuple[float | None, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.figures["loss"]

    @property
    def accuracy(self) -> float:
        """NaN of a task without one."""
        return self.figures.get("accuracy", math.nan)


Cut = Callable[[str], Sequence[str]]


class Task(Protocol):
    """A task.

    Attributes:
        kind: of task, as in the run descriptor.
        candidates_key: the key of the task's file that gives the candidates, for errors.
    """

    kind: ClassVar[str]
    candidates_key: ClassVar[str]

    @property
    def name(self) -> str:
        """For people."""

    @property
    def max_tokens(self) -> int:
        """Longer inputs are cut: prompts lose their beginning, an encoder's texts their end."""

    @property
    def columns(self) -> Sequence[str]:
        """The keys of a row that are read."""

    @property
    def integers(self) -> str | None:
        """The one of them that is an integer, which a table knows only as text."""

    @property
    def classes(self) -> Sequence[str]:
        """What rows are divided by, in words; () where rows have no classes."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The candidates of every example; () where each has its own."""

    @property
    def ending(self) -> str:
        """The text that every prompt ends with; "" where each ends differently."""

    @property
    def descriptions(self) -> Sequence[str]:
        """One of each candidate, for an encoder; () where encoders cannot do the task."""

    @property
    def scale(self) -> float:
        """An encoder's scores are cosine × scale."""

    def checked(self, row: FileRow) -> Row:
        """The row, if it has what the task needs.

        Raises:
            DataError: it has not; names the file, the line and the field.
        """

    def class_of(self, row: Row) -> int:
        """The number of the row's class; 0 where there are none."""

    def as_text(self, row: Row) -> str:
        """The row as text, such as a mask can be scored on."""

    @property
    def text_settings(self) -> Mapping[str, Any]:
        """What decides `as_text`, as JSON: tasks that agree in it share masks."""

    @property
    def continuation(self) -> Continuation | None:
        """How texts to be learned are read; None of a task that chooses among candidates."""

    def windows(self, row: Row, cut: Cut) -> Sequence[Row]:
        """The row itself; or the rows that it makes, where `cut` parts its text into those that fit `max_tokens`."""

    def with_limit(self, max_tokens: int) -> "Task":
        """The same task with other `max_tokens`."""

    def row_of(self, text: str, number: int) -> Row:
        """A row made of a text, for tests of a model; numbers give other classes."""

    def example(self, row: Row) -> Example:
        """What a model of language is asked."""

    def evaluation(self, found: Scored) -> Evaluation:
        """The figures of what a model makes of at least one row."""

    def describe(self) -> TaskDescription:
        """The task as it travels in the run descriptor."""


def classified(scores: Float32Array, truth: npt.NDArray[np.int64]) -> Evaluation:
    """The figures of a classifier, from scores, float32 (rows, classes), and the right classes, int64 (rows,).

    "accuracy": the share of rows whose right class scored highest; "majority": the share of the most frequent class;
    over the classes that have rows, "balanced_accuracy": the mean recall; "macro_f1": the mean of 2·hits ÷ (its rows +
    the rows taken for it), which is the harmonic mean of recall and precision.
    """
    losses, rows, classes = _cross_entropy(scores, truth), len(truth), scores.shape[1]
    best = scores.argmax(axis=1)
    labels, taken = (np.bincount(found, minlength=classes) for found in (truth, best))
    found = np.bincount(truth[best == truth], minlength=classes)
    recalls = tuple(int(hit) / int(count) if count else None for hit, count in zip(found, labels, strict=True))
    known = [recall for recall in recalls if recall is not None]
    return Evaluation(
        rows=rows,
        figures={
            "loss": math.fsum(losses) / rows,
            "accuracy": int(found.sum()) / rows,
            "majority": int(labels.max()) / rows,
            "balanced_accuracy": math.fsum(known) / len(known),
            "macro_f1": math.fsum(2 * found[labels > 0] / (labels + taken)[labels > 0]) / len(known),
        },
        recalls=recalls,
    )


def continued(found: Scored, *, whole: bool) -> Evaluation:
    """The figures of texts to be learned.

    "loss": the mean over rows of the mean loss of a row's tokens, as nodes measure it; "perplexity": e to the mean loss
    over all tokens; "token_accuracy": the share of tokens that the model puts first, given those before. `whole` adds
    "exact_match": the share of rows of which it puts every token first. Greedy decoding says the first token, then the
    first one after it, and so on: so it says exactly these rows, token by token, and need not be run.
    """
    assert found.tokens is not None
    assert found.first is not None
    losses, total = -found.scores[:, 0].astype(np.float64), int(found.tokens.sum())
    mean = math.fsum(losses * found.tokens) / total
    figures = {
        "loss": math.fsum(losses) / len(losses),
        "perplexity": math.exp(min(mean, MOST_EXPONENT)) if mean == mean else math.nan,  # noqa: PLR0124 - NaN
        "token_accuracy": int(found.first.sum()) / total,
    }
    exact = {"exact_match": int((found.first == found.tokens).sum()) / len(losses)} if whole else {}
    return Evaluation(len(losses), figures | exact)


def _cross_entropy(scores: Float32Array, labels: npt.NDArray[np.int64]) -> list[float]:
    wide = scores.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return [float(loss) for loss in log_sum - wide[np.arange(len(labels)), labels]]
