"""What an engine is: theta goes in, the losses of a batch come out.

theta, float32 (n,) in mask order, is the truth, and the model is a view of it. A local step writes theta + eps·z and
theta − eps·z, and asks at both points for the losses of one batch. So an engine needs three methods (`core.step`):
`write`, `prepare` and `losses`. Whatever it computes with, activations and losses are float32: half precision would
round the difference of two losses away. Whoever looks at the model writes theta first.

What more an engine can do is a method more, which others look for (the protocols below and `core.first_order`):

| method | who asks | without it |
|---|---|---|
| `check(mask)` | node and server, once, before the first write | whatever fits the mask's size is taken |
| `usable(rows)` | node and server, when rows are read | all are prepared once; those that fail are left out |
| `scores(batch)` | the server's evaluation | an evaluation has a loss, and no accuracy |
| `gradient(batch)` | a values node, the first-order bound | `uplink = "values"` is refused |
| `surviving_share(theta, z, eps)` | a node whose dtype is not float32, for its log | the log says nothing of it |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.tasks.task import Task

Batch = TypeVar("Batch")
Batch_contra = TypeVar("Batch_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is made for: all that its factory is told.

    Attributes:
        mask: which weights theta stands for, where they start (`mask.theta_0`), and the base model's fingerprint.
        task: how a row becomes an example; None where the run has no task, and the engine reads rows itself.
        model: folder or hub id of the base model: `model` of node.toml, `model.source` of federation.toml.
        dtype: "float32", "bfloat16" or "float16": of the model's weights.
        device: "cpu", "cuda" or "cuda:<i>".
        threads: CPU threads; None: as many as the engine likes.
    """

    mask: Mask
    task: Task | None = None
    model: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Survival:
    """What is left of a perturbation when the model's dtype rounds both of its sides.

    With wanted w = 2·eps·z and got d = cast(theta + eps·z) − cast(theta − eps·z):

    Attributes:
        kept: ⟨d, w⟩ ÷ ⟨w, w⟩; 1 in exact arithmetic, 0 where everything is swallowed.
        moved: share of the weights with d ≠ 0.
        error: ‖d − w‖ ÷ ‖w‖; what rounding adds to the direction, swallowed parts included.
    """

    kept: float
    moved: float
    error: float


@runtime_checkable
class Checks(Protocol):
    """An engine that knows its base model."""

    def check(self, mask: Mask) -> None:
        """Make sure that this is the model that the mask was made for.

        Raises:
            ModelMismatch: says what differs.
        """


@runtime_checkable
class Chooses(Protocol):
    """An engine that tells beforehand which rows it takes."""

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that can be prepared; the log names the others.

        Raises:
            DataError: there are none.
        """


@runtime_checkable
class Scores(Protocol[Batch_contra]):
    """An engine that chooses one of several candidates for each row: of a classifier, its classes."""

    def scores(self, batch: Batch_contra) -> tuple[Float32Array, npt.NDArray[np.int64]]:
        """Scores, float32 (rows, candidates), whose softmax is the model's belief; the right ones, int64 (rows,)."""


@runtime_checkable
class Rounds(Protocol):
    """An engine whose weights are not float32."""

    def surviving_share(self, theta: Float32Array, z: Float32Array, eps: float) -> Survival:
        """What the model's dtype leaves of theta ± eps·z; both float32 (n,)."""
