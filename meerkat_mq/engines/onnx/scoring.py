"""Scores of passes, as the torch engine's: log-probabilities of candidates, or cosines of an encoder. NumPy.

The graph gives hidden states only. The output head has as many rows as there are tokens, so it is read in pieces, and
only where it is needed: where all candidates have the same tokens but for the last, the sum over the vocabulary is the
same for all of them, and drops out of the losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.engines.continuations import causal_prompts
from meerkat_mq.engines.onnx.body import Body, Ids, Lines, rows_of
from meerkat_mq.engines.onnx.manifest import Bundle
from meerkat_mq.engines.prompts import Candidates, CausalPass, EncoderPrompts, Prompt, fit, padded
from meerkat_mq.tasks.task import Example, Task

_HEAD_ROWS: Final = 4096  # of the head at a time, and fewer where there are many hidden states:
_LOGITS: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """The texts of some rows; of a causal LM, also what is asked of them."""

    lines: Lines
    causal: CausalPass | None = None


class Scorer(Protocol):
    """What makes scores of examples."""

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Prompts."""

    def collate(self, prompts: Sequence[Prompt]) -> Pass:
        """One pass of some prompts."""

    def scores(self, passes: Sequence[Pass], *, only_compared: bool = False) -> Float32Array:
        """Float32 (rows of all passes, candidates); only compared: up to a number that is the same in a row."""


class CausalScorer:
    """Score of a candidate: mean log-probability of its tokens after the prompt."""

    def __init__(self, bundle: Bundle, body: Body, task: Task) -> None:
        manifest = bundle.manifest
        assert manifest.head is not None
        self._body = body
        self._prompts = causal_prompts(bundle, task)
        self._head, self._cap = rows_of(bundle, manifest.head), manifest.head_cap
        self._cancels = self._prompts.shared is not None and _same_but_the_last(self._prompts.shared)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Prompts, cut from the left to the task's limit."""
        return self._prompts.tokens(examples)

    def collate(self, prompts: Sequence[Prompt]) -> Pass:
        """One sequence for each prompt and stem."""
        made = self._prompts.collate(prompts)
        lengths = made.positions[:, -1] + 1  # the last position that is needed is the last token's
        return Pass(Lines(made.ids, lengths), made)

    def scores(self, passes: Sequence[Pass], *, only_compared: bool = False) -> Float32Array:
        """As `Scorer`; candidates that a row lacks, and another has, score minus infinity."""
        found = [self._scores(*one, only_compared) for one in _causal(passes)]
        most = max(part.shape[1] for part in found)
        wide = [np.pad(part, ((0, 0), (0, most - part.shape[1])), constant_values=-np.inf) for part in found]
        return np.concatenate(wide)

    def counted(self, passes: Sequence[Pass]) -> tuple[Float32Array, Ids, Ids]:
        """Of rows that are texts to be learned: scores as above, (rows, 1); their tokens; how many are put first."""
        scores, tokens, first = list[Float32Array](), list[Ids](), list[Ids]()
        for one, lines in _causal(passes):
            found, highest = self._ranked(one, lines)
            real = one.weight > 0
            scores.append(_summed(one, found))
            tokens.append(real.sum(axis=(1, 2)))
            first.append((real & highest).sum(axis=(1, 2)))
        return np.concatenate(scores), np.concatenate(tokens), np.concatenate(first)

    def _scores(self, inputs: CausalPass, lines: Lines, only_compared: bool) -> Float32Array:
        if not (only_compared and self._cancels):
            return _summed(inputs, self._ranked(inputs, lines)[0])
        hidden, state = self._hidden(inputs, lines)
        logits: Float32Array = np.einsum("...h,...h->...", hidden[state], self._head.at(inputs.token))
        return _summed(inputs, self._capped(logits))

    def _hidden(self, inputs: CausalPass, lines: Lines) -> tuple[Float32Array, Ids]:
        """Hidden states, each once; which of them say what the candidates' tokens are: (rows, candidates, slots)."""
        starts = np.cumsum(lines.lengths) - lines.lengths
        wanted, where = np.unique((starts[:, None] + inputs.positions).reshape(-1), return_inverse=True)
        hidden = self._body.hidden(lines, wanted=wanted)
        return hidden, where.reshape(-1)[inputs.sequence * len(inputs.slot) + inputs.slot]

    def _capped(self, logits: Float32Array) -> Float32Array:
        if self._cap is None:
            return logits
        cap = np.float32(self._cap)
        capped: Float32Array = cap * np.tanh(logits / cap)
        return capped

    def _ranked(self, inputs: CausalPass, lines: Lines) -> tuple[Float32Array, npt.NDArray[np.bool_]]:
        """Of each candidate's tokens, both (rows, candidates, slots): log-probabilities; whether none is above them."""
        hidden, state = self._hidden(inputs, lines)
        state, token = np.broadcast_arrays(state, inputs.token)
        found = np.full(token.shape, np.nan, np.float32)
        top, total = np.full(len(hidden), -np.inf, np.float32), np.zeros(len(hidden))
        step = min(_HEAD_ROWS, max(1, _LOGITS // len(hidden)))
        for first in range(0, self._head.shape[0], step):
            rows = self._head.part(first, min(step, self._head.shape[0] - first))
            logits = self._capped(self._body.product(hidden, rows))
            here = (first <= token) & (token < first + len(rows))
            found[here] = logits[state[here], token[here] - first]
            higher = np.maximum(top, logits.max(axis=1))
            logits -= higher[:, None]
            total = total * np.exp(top - higher) + np.exp(logits, out=logits).sum(axis=1, dtype=np.float64)
            top = higher
        normaliser = (top + np.log(total)).astype(np.float32)
        return found - normaliser[state], found >= top[state]


def _causal(passes: Sequence[Pass]) -> list[tuple[CausalPass, Lines]]:
    return [(one.causal, one.lines) for one in passes if one.causal is not None]


def _summed(inputs: CausalPass, found: Float32Array) -> Float32Array:
    """Scores, (rows, candidates), of their tokens' log-probabilities; minus infinity where a row has fewer."""
    scores: Float32Array = (found * inputs.weight).sum(axis=-1, dtype=np.float32)
    lacking = inputs.weight.sum(axis=-1) == 0
    return scores if inputs.token.ndim == 2 else np.where(lacking, np.float32(-np.inf), scores)


def _same_but_the_last(candidates: Candidates) -> bool:
    """Whether there are several, all as long, that differ in their last token only."""
    return len(candidates.token) > 1 and len(candidates.stems) == 1 and bool((candidates.weight > 0).all())


class EncoderScorer:
    """Score of a class: cosine between the text's and the description's mean state, times the task's scale.

    The descriptions pass through the same weights as the texts, once for all of them.
    """

    def __init__(self, bundle: Bundle, body: Body, task: Task) -> None:
        self._body = body
        self._scale = np.float32(task.scale)
        self._prompts = EncoderPrompts(bundle, task)
        self._descriptions = [_lines(texts) for texts in self._prompts.descriptions]

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Texts, cut from the right to the task's limit; an empty one becomes one token."""
        return self._prompts.tokens(examples)

    def collate(self, prompts: Sequence[Prompt]) -> Pass:
        """Their ids."""
        return Pass(_lines([prompt.ids for prompt in prompts]))

    def scores(self, passes: Sequence[Pass], *, only_compared: bool = False) -> Float32Array:
        """As `Scorer`."""
        # descriptions go with the first texts: another pass would make the values of all weights another time
        *others, last = self._descriptions
        first, *more = [one.lines for one in passes]
        together = [(last, first)] if fit([*last.texts, *first.texts]) else [(last,), (first,)]
        found = [self._embed(*lines) for lines in (*zip(others), *together, *zip(more))]
        classes, rows = np.split(np.concatenate(found), [sum(len(lines.lengths) for lines in self._descriptions)])
        scaled: Float32Array = np.multiply(self._scale, rows, dtype=np.float32)
        return self._body.product(scaled, classes)

    def _embed(self, *passes: Lines) -> Float32Array:
        """Mean over the tokens, scaled to length 1: float32 (texts, hidden)."""
        hidden, lengths = self._body.hidden(*passes), np.concatenate([lines.lengths for lines in passes])
        total = np.add.reduceat(hidden, np.cumsum(lengths) - lengths, axis=0)
        unit: Float32Array = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.float32(1e-12))
        return unit


def _lines(texts: Sequence[list[int]]) -> Lines:
    return Lines(padded(texts), np.array([len(text) for text in texts]))
