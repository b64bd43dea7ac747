"""From the tokens of texts to hidden states: what a bundle's graphs need beside weights and theta.

A bundle of a mask that holds nothing below block k has two graphs: one of the blocks below, and one of those above. The
first is run once for each text, and `engines.prefix` keeps what it gives; the second goes on from there. A text that
there is no room for is computed again in each batch, once for all passes over that batch. Linear layers see the tokens
of all texts one after the other, without padding, so states are put together by putting one after the other.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.onnx.layout import AGAIN, Rows
from meerkat_mq.engines.onnx.manifest import GRAPH, PREFIX, WEIGHTS, Bundle, Table
from meerkat_mq.engines.onnx.runtime import VERSION, product_of
from meerkat_mq.engines.onnx.session import Session
from meerkat_mq.engines.prefix import HiddenStates, Keep
from meerkat_mq.errors import ModelError

Ids = npt.NDArray[np.int64]
Inputs = dict[str, npt.NDArray[Any]]


@dataclass(slots=True, eq=False)
class Lines:
    """Texts of a pass.

    Attributes:
        ids: int64 (texts, length), padded on the right.
        lengths: int64 (texts,), of what is read of each.
        states: float32 (tokens, width), what the frozen blocks make of their tokens; None before they are made.
    """

    ids: Ids
    lengths: Ids
    states: Float32Array | None = None

    @property
    def texts(self) -> list[Ids]:
        """Without the padding."""
        return [row[:size] for row, size in zip(self.ids, self.lengths.tolist(), strict=True)]


class Body:
    """A bundle's graphs at a theta; raises as `Session`.

    Attributes:
        product: makes a @ b.T on so many threads.
    """

    def __init__(self, bundle: Bundle, mask: Mask, threads: int | None, keep: Keep) -> None:
        manifest = bundle.manifest
        self._embeddings, self._scale = rows_of(bundle, manifest.embedding), np.float32(manifest.embed_scale)
        self._above = Session(bundle, GRAPH, bundle.graph, mask, threads)
        self.write = self._above.write
        self.product = product_of(threads)
        self._below: Session | None = None
        if bundle.below is not None:
            self._below = Session(bundle, PREFIX, bundle.below, None, threads)
            self._kept = HiddenStates(keep, _context(bundle, bundle.below), np.int32, manifest.embedding.shape[1])

    def hidden(self, *passes: Lines, wanted: Ids | None = None) -> Float32Array:
        """Hidden states of all tokens, or of those that are wanted by their number: float32 (…, width)."""
        lengths = np.concatenate([lines.lengths for lines in passes])
        inputs = _inputs(self._above, lengths) | ({} if wanted is None else {"wanted": wanted})
        return self._above.run({"embedded": np.concatenate([self._start(lines) for lines in passes]), **inputs})

    def _start(self, lines: Lines) -> Float32Array:
        """What the graph goes on from: (tokens, width)."""
        if self._below is None:
            return self._embedded(lines.texts)
        if lines.states is None:
            lines.states = self._states(self._below, lines)
        return lines.states

    def _embedded(self, texts: Sequence[Ids]) -> Float32Array:
        return self._embeddings.at(np.concatenate(texts)) * self._scale

    def _states(self, below: Session, lines: Lines) -> Float32Array:
        texts = lines.texts
        found = [self._kept.find(text) for text in texts]
        if missing := [number for number, state in enumerate(found) if state is None]:
            lengths, few = lines.lengths[missing], [texts[number] for number in missing]
            made = below.run({"embedded": self._embedded(few), **_inputs(below, lengths)})
            if made.shape != (lengths.sum(), self._embeddings.shape[1]):
                raise ModelError(PREFIX, f"gives {made.shape} for {lengths.sum()} tokens", AGAIN)
            parts = np.split(made.view(np.int32), np.cumsum(lengths)[:-1])
            for number, text, state in zip(missing, few, parts, strict=True):
                self._kept.keep(text, state)
                found[number] = state
        return np.concatenate([state for state in found if state is not None]).view(np.float32)


def rows_of(bundle: Bundle, table: Table) -> Rows:
    """A table of the weights file."""
    return Rows(bundle.weights, table.name, table.shape, bundle.manifest.weights)


def _inputs(session: Session, lengths: Ids) -> Inputs:
    """Where the tokens of texts of these lengths stand, as far as a graph asks.

    "kept": int64 (tokens,), where each stands in lines of one length, counted through. "spread": int64 (texts, length),
    what stands in the lines: the number of a token; 0 where there is none.
    """
    count, length = len(lengths), int(lengths.max())
    there = np.arange(length) < lengths[:, None]
    kept = np.flatnonzero(there)

    def spread() -> Ids:
        found = np.zeros(count * length, np.int64)
        found[kept] = np.arange(len(kept))
        return found.reshape(count, length)

    made: dict[str, Callable[[], npt.NDArray[Any]]] = {
        "kept": lambda: kept,
        "spread": spread,
        "position_ids": lambda: np.ascontiguousarray(np.broadcast_to(np.arange(length), (count, length))),
        "places": lambda: kept % length,
        "seen": lambda: np.ascontiguousarray(np.broadcast_to(there[:, None, None], (count, 1, length, length))),
    }
    return {name: make() for name, make in made.items() if name in session.made}


def _context(bundle: Bundle, graph: bytes) -> bytes:
    """All that decides a state but the tokens: the weights, the graph, and what computes it."""
    hashes = bundle.manifest.files[WEIGHTS].sha256, hashlib.sha256(graph).hexdigest()
    return "\n".join(("onnx", *hashes, VERSION)).encode()
