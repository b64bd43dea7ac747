"""What an engine is: theta goes in, the losses of a batch come out.

theta, float32 (n,) in mask order, is the truth, and the model is a view of it. A local step writes theta + eps·z and
theta − eps·z, and asks at both points for the losses of one batch. So an engine needs three methods (`core.step`):
`write`, `prepare` and `losses`. Whatever it computes with, activations and losses are float32: half precision would
round the difference of two losses away. Whoever looks at the model writes theta first.

What more an engine can do is a method more, which others look for (docs/engines.md says what is lost without it):

- `check(mask)`, once before the first write: raises `ModelMismatch` unless its base model is the mask's.
- `kinds(mask)`: kind of weights ("linear", "embedding" or "other") to the name of the mask's first matrix of it, which
  a node's policy judges.
- `usable(rows)`: the rows that can be prepared, or `DataError` if none can; the log names the others. A row that is too
  long may become several, each a `FileRow` of the same place (`Task.windows`).
- `scores(batch)`: float32 (rows, candidates), whose softmax is the model's belief, and the right ones, int64 (rows,).
- `scored(batch)`: instead, a `tasks.task.Scored`, for tasks that learn texts: with the tokens of each row.
- `gradient(batch)`: as `core.first_order.FirstOrderEngine` says.
- `surviving_share(theta, z, eps)`: a `Survival`, what its dtype leaves of theta ± eps·z; both float32 (n,).
"""

from dataclasses import dataclass
from typing import Literal

from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.prefix import IN_MEMORY, Keep
from meerkat_mq.tasks.task import Task

Method = Literal["sensitivity", "magnitude-activation", "magnitude", "random", "dense", "lora"]  # of making a mask


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
        adapter: folder of a LoRA adapter that is merged into the base model before all else; None: none.
        keep: where an engine may keep what stays the same for a row, and how much of it.
        completion: fingerprint of what the run puts around the texts of a completion; None: it does not say.
    """

    mask: Mask
    task: Task | None = None
    model: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    adapter: str | None = None
    keep: Keep = IN_MEMORY
    completion: bytes | None = None


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
