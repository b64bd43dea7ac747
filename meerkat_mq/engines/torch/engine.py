"""The engine of torch and transformers: theta in, losses and gradients out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor, nn
from torch.nn import functional

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.engines.continuations import check_completion, completion_fingerprint, windows
from meerkat_mq.engines.prefix import IN_MEMORY, Keep
from meerkat_mq.engines.prompts import Preparing, in_passes
from meerkat_mq.engines.protocol import Setup, Survival
from meerkat_mq.engines.torch.adapter import with_adapter
from meerkat_mq.engines.torch.folder import find_folder
from meerkat_mq.engines.torch.load import LoadedModel, load_model, set_threads, weight_kinds
from meerkat_mq.engines.torch.merge import base_folder
from meerkat_mq.engines.torch.prefix import frozen_prefix
from meerkat_mq.engines.torch.scoring import CausalScorer, Scorer, losses_of, mean_loss, scorer_for, whole
from meerkat_mq.engines.torch.tokens import read_tokenizer
from meerkat_mq.engines.torch.widen import Exact, holders
from meerkat_mq.errors import ModelMismatch
from meerkat_mq.tasks.data import usable_rows
from meerkat_mq.tasks.task import Scored, Task

_ITS_BASE = "give the base model that the run's mask was made on"
_PASS_TOKENS = {"cpu": 768, "cuda": 16384}  # larger passes only cost memory


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch, ready for passes of rows of like length, which spares padding.

    Attributes:
        passes: what the scorer made of the rows.
        line, column: where each row's scores are found among those of the passes, as `prompts.Places` says.
        labels: int64 (rows,).
    """

    passes: list[Any]
    line: Tensor
    column: Tensor | None
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """Where a part of theta goes: into the `indices`, int64 (k,), or all, of `flat`, a view of the model's tensor.

    Of single weights of a tensor in half precision, `exact` has what theta says, for passes, which are float32; where
    it lies for these: `holders`, as of `widen`.
    """

    parameter: nn.Parameter
    flat: Tensor
    indices: Tensor | None
    part: slice
    exact: Exact | None
    holders: list[tuple[dict[str, Exact], str]]

    @property
    def leaf(self) -> Tensor:
        """What passes depend on."""
        return self.parameter if self.exact is None else self.exact.values

    def write(self, values: Tensor) -> None:
        """Put a part of theta there, cast to the tensor's dtype."""
        if self.indices is None:
            self.flat.copy_(values)
            return
        self.flat.index_copy_(0, self.indices, values.to(self.flat.dtype))
        if self.exact is not None:
            self.exact.values.copy_(values)
            for exact, name in self.holders:
                exact[name] = self.exact

    def gradient(self, found: Tensor) -> Tensor:
        """Of the gradient in `leaf`, what belongs to theta: (k,)."""
        return found if self.exact is not None else self.values(found)

    def values(self, whole: Tensor) -> Tensor:
        """What theta stands for of a tensor with the parameter's shape: (k,)."""
        return whole.flatten() if self.indices is None else whole.flatten()[self.indices]


class TransformersEngine(Preparing[Prepared]):
    """Implements `core.step.Engine`, and all that `engines.protocol` adds, for a loaded model, a mask and a task.

    The model's masked weights are overwritten by each `write`, those of an adapter in a copy that shares all else.
    Blocks that no masked weight reaches are computed once a row (`prefix`), whose states `keep` says where to keep;
    None: in each pass.

    Raises:
        ModelMismatch: the model has no such matrices.
        ModelError: the mask is of an adapter, and peft is not installed.
        TaskError: the tokenizer cannot tell the label words apart.
        UnsupportedModel: a causal LM without a linear head.
    """

    def __init__(self, loaded: LoadedModel, mask: Mask, task: Task, keep: Keep | None = IN_MEMORY) -> None:
        self.loaded = with_adapter(loaded, mask)
        self._task = task
        self.targets = _targets(self.loaded, mask)
        self.prefix = frozen_prefix(self.loaded, [target.parameter for target in self.targets], keep)
        self.scorer: Scorer = scorer_for(self.loaded, task, self.prefix.around if self.prefix else whole)
        self._size = mask.size

    def write(self, theta: Float32Array) -> None:
        """Put theta, float32 (n,), into the model's tensors, cast to their dtype."""
        if theta.shape != (self._size,) or theta.dtype != np.float32:
            raise ValueError(f"theta is {theta.dtype} {theta.shape}, not float32 ({self._size},)")
        values = torch.from_numpy(theta if theta.flags.writeable else theta.copy()).to(self.loaded.model.device)
        with torch.inference_mode():
            for target in self.targets:
                target.write(values[target.part])

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that can be prepared, a long text in windows, or `DataError` without any; the log names others."""
        return usable_rows(windows(self._task, self.loaded, rows), self._prepared)

    def _prepared(self, rows: Sequence[Row]) -> Prepared:
        examples = [self._task.example(row) for row in rows]
        device = self.loaded.model.device
        parts, place = in_passes(self.scorer.tokens(examples), _PASS_TOKENS[device.type])
        return Prepared(
            passes=[self.scorer.collate(part) for part in parts],
            line=torch.from_numpy(place.line).to(device),
            column=None if place.column is None else torch.from_numpy(place.column).to(device),
            labels=torch.tensor([example.answer for example in examples], device=device),
        )

    def class_scores(self, batch: Prepared) -> Tensor:
        """Float32 (rows, classes); gradients flow where the caller allows them."""
        scores = self.scorer.scores(batch.passes)
        if batch.column is None:
            return scores[batch.line]
        return functional.pad(scores, (0, 1), value=-torch.inf)[batch.line, batch.column]

    def scores(self, batch: Prepared) -> tuple[Float32Array, npt.NDArray[np.int64]]:
        """Float32 (rows, classes), and the right ones, int64 (rows,)."""
        with torch.inference_mode():
            return to_numpy(self.class_scores(batch)), batch.labels.cpu().numpy()

    def scored(self, batch: Prepared) -> Scored:
        """What the model makes of a batch: of texts to be learned, with their tokens."""
        if self._task.continuation is None or not isinstance(self.scorer, CausalScorer):
            return Scored(*self.scores(batch))
        with torch.inference_mode():
            scores, tokens, first = (found[batch.line] for found in self.scorer.counted(batch.passes))
            labels = batch.labels.cpu().numpy()
            return Scored(to_numpy(scores), labels, tokens.cpu().numpy(), first.cpu().numpy())

    def losses(self, batch: Prepared) -> Float32Array:
        """Cross-entropy over the classes, float32 (rows,)."""
        with torch.inference_mode():
            return to_numpy(losses_of(self.class_scores(batch), batch.labels))

    def gradient(self, batch: Prepared) -> tuple[Float32Array, float]:
        """The gradient of the mean cross-entropy in theta, float32 (n,), and that loss."""
        leaves = [target.leaf.requires_grad_(True) for target in self.targets]
        try:
            loss = mean_loss(self.class_scores(batch), batch.labels)
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        parts = [target.gradient(whole).float() for target, whole in zip(self.targets, found, strict=True)]
        return to_numpy(torch.cat(parts)), loss.item()

    def check(self, mask: Mask) -> None:
        """Make sure that this is the model that the mask was made for; call it before the first write.

        Raises:
            ModelMismatch: tokenizer, checkpoint or masked weights differ.
        """
        for what, found, wanted in (
            ("tokenizer", self.loaded.tokenizer_fingerprint, mask.tokenizer_fingerprint),
            ("checkpoint", self.loaded.fingerprint, mask.fingerprint),
        ):
            if found != wanted:
                problem = f"another {what}: fingerprint {found.hex()[:16]}…, not {wanted.hex()[:16]}…"
                raise ModelMismatch(str(self.loaded.folder), problem, _ITS_BASE)
        for target, matrix in zip(self.targets, mask.matrices, strict=True):
            expected = torch.tensor(matrix.theta_0).to(target.flat.device, target.flat.dtype)
            differing = int((target.values(target.flat) != expected).sum())
            if differing:
                problem = f"{differing} of {len(expected)} masked weights of {matrix.name} differ from theta_0"
                raise ModelMismatch(str(self.loaded.folder), problem, _ITS_BASE)

    def kinds(self, mask: Mask) -> dict[str, str]:
        """Kinds of weights in the mask, each with the name of its first matrix."""
        known, found = weight_kinds(self.loaded.model), dict[str, str]()
        for matrix in mask.matrices:
            found.setdefault(known[matrix.name], matrix.name)
        return found

    def surviving_share(self, theta: Float32Array, z: Float32Array, eps: float) -> Survival:
        """What the model's dtype leaves of theta ± eps·z: all, but for a matrix that is trained whole."""
        shift = z * np.float32(eps)
        ends = (torch.tensor(theta + shift), torch.tensor(theta - shift))
        dtypes = [target.leaf.dtype for target in self.targets]
        casts = [
            [end[target.part].to(dtype).double() for target, dtype in zip(self.targets, dtypes, strict=True)]
            for end in ends
        ]
        got = (torch.cat(casts[0]) - torch.cat(casts[1])).numpy()
        wanted = 2 * eps * z.astype(np.float64)
        size = float(wanted @ wanted)
        return Survival(
            kept=float(got @ wanted) / size,
            moved=float(np.count_nonzero(got)) / got.size,
            error=float(np.linalg.norm(got - wanted)) / size**0.5,
        )


def make(setup: Setup) -> TransformersEngine:
    """Load the base model, and make the engine of a run; raises as `load_model` and `TransformersEngine`."""
    assert setup.model is not None
    assert setup.task is not None
    if setup.threads is not None:
        set_threads(setup.threads)
    log = structlog.get_logger()
    base = base_folder(setup.model, setup.adapter, lambda text: log.info("adapter merged", base=text))
    loaded = load_model(base, dtype=setup.dtype, device=setup.device)
    for note in loaded.notes:
        log.warning("about the model", note=note)
    check_completion(loaded.folder, loaded.tokenizer, setup.task, setup.completion)
    engine = TransformersEngine(loaded, setup.mask, setup.task, setup.keep)
    if engine.prefix is not None:
        log.info("frozen prefix: computed once a row", blocks=engine.prefix.count, of=len(engine.prefix.blocks))
    return engine


def completion(model: str, task: Task) -> bytes | None:
    """What the run descriptor says of completions, by the tokenizer of a folder or hub id; raises as `load_model`."""
    return completion_fingerprint(read_tokenizer(find_folder(model)), task)


def _targets(loaded: LoadedModel, mask: Mask) -> list[Target]:
    parameters, places = dict(loaded.model.named_parameters()), holders(loaded.model)
    targets = []
    for matrix, part in mask.slices():
        parameter = parameters.get(matrix.name)
        if parameter is None or tuple(parameter.shape) != matrix.shape:
            found = "no matrix of this name" if parameter is None else f"shape {tuple(parameter.shape)}"
            problem = f"the mask's {matrix.name} has shape {matrix.shape}, the model has {found}"
            raise ModelMismatch(str(loaded.folder), problem, _ITS_BASE)
        whole = matrix.indices.size == parameter.numel()
        indices = None if whole else torch.from_numpy(matrix.indices.astype(np.int64)).to(parameter.device)
        flat, own, exact = parameter.data.view(-1), places.get(id(parameter), []), None
        if own and indices is not None:
            exact = Exact(indices, flat[indices].float())
        targets.append(Target(parameter, flat, indices, part, exact, own))
    return targets


def to_numpy(values: Tensor) -> Float32Array:
    """The values as float32, whatever they are and wherever they lie."""
    return np.asarray(values.float().cpu().numpy(), dtype=np.float32)
