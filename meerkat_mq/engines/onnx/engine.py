"""The engine of ONNX Runtime: a bundle, theta in, losses out. NumPy does what comes before and after the graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.engines.continuations import check_completion, completion_fingerprint, windows
from meerkat_mq.engines.onnx.body import Body
from meerkat_mq.engines.onnx.manifest import Bundle, open_bundle
from meerkat_mq.engines.onnx.scoring import CausalScorer, EncoderScorer, Pass
from meerkat_mq.engines.prefix import IN_MEMORY, Keep
from meerkat_mq.engines.prompts import Places, Preparing, in_passes
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.errors import ConfigError, ModelMismatch, TaskError
from meerkat_mq.tasks.data import usable_rows
from meerkat_mq.tasks.task import Scored, Task

_PASS_TOKENS: Final = 768  # as of the other engine's passes
_ANOTHER: Final = "give a bundle of the run's base, made with the run's mask"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch, ready for passes of rows of like length, which spares padding.

    Attributes:
        passes: what the scorer made of the rows.
        place: where each row's scores are found among those of the passes.
        answers: int64 (rows,).
    """

    passes: list[Pass]
    place: Places
    answers: npt.NDArray[np.int64]


class OnnxEngine(Preparing[Prepared]):
    """Implements `core.step.Engine` and, of what `engines.protocol` adds, check, kinds, usable, scores and scored.

    Raises:
        ModelMismatch: the mask has weights that the bundle cannot train.
        ModelError: ONNX Runtime does not take the bundle's graph.
        TaskError: the tokenizer cannot tell the label words apart, the graph takes no input as long as the task's, or
            the model cannot do the task.
    """

    def __init__(
        self, bundle: Bundle, mask: Mask, task: Task, threads: int | None = None, keep: Keep = IN_MEMORY
    ) -> None:
        _check_matrices(bundle, mask)
        limit, positions = min(task.max_tokens, bundle.max_tokens), bundle.manifest.positions
        if limit > positions:
            problem = f"{limit} tokens are more than the {positions} of this bundle's graph"
            raise TaskError(f"task {task.name}: max_tokens", problem, "lower it, or use a node with PyTorch")
        self._bundle = bundle
        self._task = task
        self._body = Body(bundle, mask, threads, keep)
        make = CausalScorer if bundle.manifest.kind == "causal" else EncoderScorer
        self._scorer = make(bundle, self._body, task)

    def write(self, theta: Float32Array) -> None:
        """Let passes from now on be at theta, float32 (n,)."""
        self._body.write(theta)

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that can be prepared, a long text in windows, or `DataError` without any; the log names others."""
        return usable_rows(windows(self._task, self._bundle, rows), self._prepared)

    def _prepared(self, rows: Sequence[Row]) -> Prepared:
        examples = [self._task.example(row) for row in rows]
        parts, place = in_passes(self._scorer.tokens(examples), _PASS_TOKENS)
        return Prepared(
            passes=[self._scorer.collate(part) for part in parts],
            place=place,
            answers=np.array([example.answer for example in examples], np.int64),
        )

    def scores(self, batch: Prepared) -> tuple[Float32Array, npt.NDArray[np.int64]]:
        """Float32 (rows, candidates), and the right ones, int64 (rows,)."""
        return _by_row(self._scorer.scores(batch.passes), batch.place), batch.answers

    def scored(self, batch: Prepared) -> Scored:
        """What the model makes of a batch: of texts to be learned, with their tokens."""
        if self._task.continuation is None or not isinstance(self._scorer, CausalScorer):
            return Scored(*self.scores(batch))
        (scores, tokens, first), place = self._scorer.counted(batch.passes), batch.place.line
        return Scored(scores[place], batch.answers, tokens[place], first[place])

    def losses(self, batch: Prepared) -> Float32Array:
        """The cross-entropy over the candidates, or minus the score of a single one: float32 (rows,)."""
        scores = _by_row(self._scorer.scores(batch.passes, only_compared=True), batch.place).astype(np.float64)
        if scores.shape[1] == 1:
            return -scores[:, 0].astype(np.float32)
        top = scores.max(axis=1)
        total = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        losses: Float32Array = (total - scores[np.arange(len(scores)), batch.answers]).astype(np.float32)
        return losses

    def check(self, mask: Mask) -> None:
        """Make sure that this is a bundle of the model that the mask was made for.

        Raises:
            ModelMismatch: tokenizer, checkpoint or masked weights differ.
        """
        manifest, folder = self._bundle.manifest, str(self._bundle.folder)
        for what, found, wanted in (
            ("tokenizer", manifest.tokenizer_fingerprint, mask.tokenizer_fingerprint.hex()),
            ("checkpoint", manifest.fingerprint, mask.fingerprint.hex()),
        ):
            if found != wanted:
                problem = f"is of another {what}: fingerprint {found[:16]}…, not {wanted[:16]}…"
                raise ModelMismatch(folder, problem, _ANOTHER)
        for matrix in mask.matrices:
            shape = manifest.matrices[matrix.name]
            found_values = self._bundle.weights.values(matrix.name, shape, matrix.indices.astype(np.int64))
            if differing := int((found_values != matrix.theta_0).sum()):
                problem = f"{differing} of {matrix.indices.size} masked weights of {matrix.name} differ from theta_0"
                raise ModelMismatch(folder, problem, _ANOTHER)

    def kinds(self, mask: Mask) -> dict[str, str]:
        """Linear weights, which are all that a bundle can train, with the name of the first matrix."""
        return {"linear": mask.matrices[0].name}


def _by_row(scores: Float32Array, place: Places) -> Float32Array:
    """Float32 (rows, candidates); minus infinity where a row lacks one."""
    if place.column is None:
        return scores[place.line]
    return np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf)[place.line, place.column]


def _check_matrices(bundle: Bundle, mask: Mask) -> None:
    for matrix in mask.matrices:
        shape = bundle.manifest.matrices.get(matrix.name)
        if shape != matrix.shape:
            found = "does not train it" if shape is None else f"has {shape}"
            problem = f"the mask's {matrix.name} has shape {matrix.shape}, and the bundle {found}"
            raise ModelMismatch(str(bundle.folder), problem, _ANOTHER)


def make(setup: Setup) -> OnnxEngine:
    """Open the bundle that `model` names, and make the engine of a run; raises as `open_bundle` and `OnnxEngine`."""
    assert setup.model is not None
    assert setup.task is not None
    if setup.device != "cpu":
        raise ConfigError("device", f"{setup.device!r}: the onnx engine computes on the CPU", 'set device = "cpu"')
    if setup.adapter is not None:
        problem = "is given, and a bundle holds its adapter already"
        raise ConfigError("adapter", problem, "make the bundle with `meerkat bundle --adapter`, and remove this key")
    bundle = open_bundle(Path(setup.model))
    check_completion(bundle.folder, bundle.tokenizer, setup.task, setup.completion)
    if frozen := bundle.manifest.frozen:
        structlog.get_logger().info("frozen prefix: computed once a row", blocks=frozen)
    return OnnxEngine(bundle, setup.mask, setup.task, setup.threads, setup.keep)


def completion(model: str, task: Task) -> bytes | None:
    """What the run descriptor says of completions, by a bundle; raises as `open_bundle`."""
    return completion_fingerprint(open_bundle(Path(model)).tokenizer, task)
