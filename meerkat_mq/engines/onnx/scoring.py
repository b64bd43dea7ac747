"""Scores of passes, as the torch engine's: log-probabilities of candidates, or cosines of an encoder. NumPy.

The graph gives hidden states only. The output head has as many rows as there are tokens, so it is read in pieces, and
only where it is needed: where all candidates have the same tokens but for the last, the sum over the vocabulary is the
same for all of them, and drops out of the losses.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.engines.onnx.layout import Rows
from meerkat_mq.engines.onnx.manifest import Bundle, Table
from meerkat_mq.engines.onnx.session import Session
from meerkat_mq.engines.prompts import Candidates, CausalPass, CausalPrompts, EncoderPrompts, Prompt, padded
from meerkat_mq.tasks.task import Example, Task

_HEAD_ROWS: Final = 4096  # of the head at a time

Ids = npt.NDArray[np.int64]
Pass = CausalPass | list[list[int]]


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

    def __init__(self, bundle: Bundle, session: Session, task: Task) -> None:
        manifest = bundle.manifest
        assert manifest.head is not None
        self._session = session
        self._prompts = CausalPrompts(bundle, task)
        self._embeddings, self._head = _rows(bundle, manifest.embedding), _rows(bundle, manifest.head)
        self._scale, self._cap = np.float32(manifest.embed_scale), manifest.head_cap
        self._cancels = self._prompts.shared is not None and _same_but_the_last(self._prompts.shared)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Prompts, cut from the left to the task's limit."""
        return self._prompts.tokens(examples)

    def collate(self, prompts: Sequence[Prompt]) -> CausalPass:
        """One sequence for each prompt and stem."""
        return self._prompts.collate(prompts)

    def scores(self, passes: Sequence[Pass], *, only_compared: bool = False) -> Float32Array:
        """As `Scorer`; candidates that a row lacks, and another has, score minus infinity."""
        found = [self._scores(one, only_compared) for one in passes if isinstance(one, CausalPass)]
        most = max(part.shape[1] for part in found)
        wide = [np.pad(part, ((0, 0), (0, most - part.shape[1])), constant_values=-np.inf) for part in found]
        return np.concatenate(wide)

    def _scores(self, inputs: CausalPass, only_compared: bool) -> Float32Array:
        count, length = inputs.ids.shape
        places = np.broadcast_to(np.arange(length), (count, length))
        hidden = self._session.run({
            "embedded": self._embeddings.at(inputs.ids) * self._scale,
            "position_ids": np.ascontiguousarray(places),
            "wanted": (np.arange(count)[:, None] * length + inputs.positions).reshape(-1),
        })  # fmt: skip
        state = inputs.sequence * len(inputs.slot) + inputs.slot
        state, token = np.broadcast_arrays(state, inputs.token)
        logits = self._capped(np.einsum("...h,...h->...", hidden[state], self._head.at(token)))
        if not (only_compared and self._cancels):
            logits = logits - self._normaliser(hidden)[state]
        scores: Float32Array = (logits * inputs.weight).sum(axis=-1, dtype=np.float32)
        lacking = inputs.weight.sum(axis=-1) == 0
        return scores if inputs.token.ndim == 2 else np.where(lacking, np.float32(-np.inf), scores)

    def _capped(self, logits: Float32Array) -> Float32Array:
        if self._cap is None:
            return logits
        cap = np.float32(self._cap)
        capped: Float32Array = cap * np.tanh(logits / cap)
        return capped

    def _normaliser(self, hidden: Float32Array) -> Float32Array:
        """The logarithm of the sum over the vocabulary, float32 (states,), of hidden states (states, hidden)."""
        top, total = np.full(len(hidden), -np.inf), np.zeros(len(hidden))
        for first in range(0, self._head.shape[0], _HEAD_ROWS):
            rows = self._head.part(first, min(_HEAD_ROWS, self._head.shape[0] - first))
            logits = self._capped(hidden @ rows.T).astype(np.float64)
            higher = np.maximum(top, logits.max(axis=1))
            total = total * np.exp(top - higher) + np.exp(logits - higher[:, None]).sum(axis=1)
            top = higher
        normaliser: Float32Array = (top + np.log(total)).astype(np.float32)
        return normaliser


def _same_but_the_last(candidates: Candidates) -> bool:
    """Whether there are several, all as long, that differ in their last token only."""
    return len(candidates.token) > 1 and len(candidates.stems) == 1 and bool((candidates.weight > 0).all())


class EncoderScorer:
    """Score of a class: cosine between the text's and the description's mean state, times the task's scale.

    The descriptions pass through the same weights as the texts, once for all of them.
    """

    def __init__(self, bundle: Bundle, session: Session, task: Task) -> None:
        self._session, self._pad = session, bundle.manifest.pad
        self._scale = np.float32(task.scale)
        self._prompts = EncoderPrompts(bundle, task)
        self._embeddings = _rows(bundle, bundle.manifest.embedding)

    def tokens(self, examples: Sequence[Example]) -> list[Prompt]:
        """Texts, cut from the right to the task's limit; an empty one becomes one token."""
        return self._prompts.tokens(examples)

    def collate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Their ids."""
        return [prompt.ids for prompt in prompts]

    def scores(self, passes: Sequence[Pass], *, only_compared: bool = False) -> Float32Array:
        """As `Scorer`."""
        texts = np.concatenate([self._embed(one) for one in passes if isinstance(one, list)])
        scores: Float32Array = self._scale * texts @ self._embed(self._prompts.descriptions).T
        return scores

    def _embed(self, texts: Sequence[Sequence[int]]) -> Float32Array:
        """Mean over the tokens, scaled to length 1: float32 (texts, hidden)."""
        ids, there = padded(texts, self._pad), padded([[1] * len(text) for text in texts])
        count, length = ids.shape
        seen = np.broadcast_to(there.astype(bool)[:, None, None, :], (count, 1, length, length))
        hidden = self._session.run({"embedded": self._embeddings.at(ids), "seen": np.ascontiguousarray(seen)})
        total = np.einsum("sl,slh->sh", there.astype(np.float32), hidden)
        unit: Float32Array = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.float32(1e-12))
        return unit


def _rows(bundle: Bundle, table: Table) -> Rows:
    return Rows(bundle.weights, table.name, table.shape, bundle.manifest.weights)
