"""What a sweep's plan file may say."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from meerkat_mq.config import DataSource, Device, Dtype, EarlyStoppingConfig, LocalPath, Section
from meerkat_mq.tasks.data import Division

OWN_MODEL = "demo"
EVERY_TASK = "every task"

PASSES_OF_A_SCALAR = 2  # theta + eps·z and theta − eps·z
PASSES_OF_A_GRADIENT = 3  # a backward pass costs about two forward passes


def _several(value: object) -> object:
    return value if isinstance(value, list | tuple) else (value,)


def _by_task(value: object) -> object:
    if isinstance(value, dict):
        return value
    rates = value if isinstance(value, list | tuple) else (value,)
    if not rates or not all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates):
        raise ValueError("must be a number above 0, a list of such, or a table of either by task")
    return {EVERY_TASK: rates}


Rate = Annotated[float, Field(gt=0, strict=True)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(_several), Field(min_length=1)]
Layer = Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(gt=0, lt=1, strict=True)]
Layers = Annotated[tuple[Layer, ...], BeforeValidator(_several), Field(min_length=1)]
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^|\n]+$")]


class SplitPlan(Section):
    """How the training rows are divided among the nodes.

    Attributes:
        how: "extreme": the first `nodes` nodes hold rows of one label each, the others are IID.
        alpha: of "dirichlet".
        nodes: of "extreme".
        exclusive: of "extreme": nobody else has rows of these labels.
        field: of "field": each value of this field of the rows is one node's.
    """

    how: Division | Literal["extreme"]
    alpha: Annotated[float, Field(gt=0, strict=True)] = 0.5
    nodes: Annotated[int, Field(ge=1, le=1000, strict=True)] = 1
    exclusive: Annotated[bool, Field(strict=True)] = False
    field: Label | None = None

    @property
    def shown(self) -> str:
        """For people: "dirichlet 0.5"."""
        extreme = f" {self.nodes}" + " exclusive" * self.exclusive
        more = {"dirichlet": f" {self.alpha:g}", "extreme": extreme, "field": f" {self.field}"}
        return self.how + more.get(self.how, "")

    @model_validator(mode="after")
    def _says_nothing_idle(self) -> Self:
        if self.how == "field" and self.field is None:
            raise ValueError('how = "field" needs field, the name of a field of the rows')
        for key, how in (("alpha", "dirichlet"), ("nodes", "extreme"), ("exclusive", "extreme"), ("field", "field")):
            if key in self.model_fields_set and self.how != how:
                raise ValueError(f'{key} does nothing with how = "{self.how}", only with "{how}"')
        return self


class TaskPlan(Section):
    """A task and its rows.

    Attributes:
        name: in the results, and of the built-in task.
        task: another built-in task's name, or a task's TOML file.
        train: file of rows, or hf:… (docs/tasks.md).
        validation: likewise.
        max_tokens: instead of the plan's.
    """

    name: Label
    train: DataSource
    validation: DataSource
    task: str | None = None
    max_tokens: Annotated[int, Field(ge=8, le=8192, strict=True)] | None = None


class MethodPlan(Section):
    """What is trained, and how.

    Attributes:
        name: in the results.
        optimiser: "zo" (the federation) or "first-order" (AdamW, a bound: all nodes' rows in one place).
        mask: how weights are chosen; "none" trains nothing.
        density: u, of a mask that chooses.
        rank: of "lora".
        from_layer: nothing below this block is masked: its number, or a share of the blocks; one, or several, a further
            axis of the grid. 0: all may be masked.
        lr: one, or several, a further axis of the grid; or a table of these by task name.
        directions: P, lanes of a round.
        perturbations: projected gradients a local step.
        text: calibration text instead of the plan's; "task": the task's own training rows.
    """

    name: Label
    optimiser: Literal["zo", "first-order"] = "zo"
    mask: Literal["sensitivity", "magnitude-activation", "magnitude", "random", "dense", "lora", "none"] = "sensitivity"
    density: Annotated[float, Field(gt=0, le=1, strict=True)] = 1e-3
    rank: Annotated[int, Field(ge=1, le=1024, strict=True)] = 8
    from_layer: Layers = (0,)
    lr: Annotated[dict[str, Rates], BeforeValidator(_by_task)] = Field(default_factory=dict)
    eps: Annotated[float, Field(gt=0, strict=True)] = 1e-3
    directions: Annotated[int, Field(ge=1, le=4096, strict=True)] = 1
    perturbations: Annotated[int, Field(ge=1, le=1000, strict=True)] = 1
    text: Literal["task"] | LocalPath | None = None
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()

    @property
    def federated(self) -> bool:
        """Whether it runs rounds."""
        return self.mask != "none" and self.optimiser == "zo"

    @property
    def idle(self) -> Mapping[str, str]:
        """Settings that decide nothing here, each with what makes it so."""
        mask, idle = f'mask = "{self.mask}"', dict[str, str]()
        if self.mask in ("dense", "lora", "none"):
            idle["density"] = mask
        if self.mask != "lora":
            idle["rank"] = mask
        if not self.federated:
            why = mask if self.mask == "none" else f'optimiser = "{self.optimiser}"'
            idle |= dict.fromkeys(("eps", "directions", "perturbations"), why)
        if self.mask == "none":
            idle |= dict.fromkeys(("optimiser", "text", "from_layer"), mask)
        return idle

    def rates(self, task: str) -> tuple[float, ...]:
        """Learning rates for a task; none where nothing is trained or the table leaves the task out."""
        return self.lr.get(task, self.lr.get(EVERY_TASK, ()))

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.mask == "none") != (not self.lr):
            raise ValueError('needs lr, unless mask = "none"')
        if self.early_stopping.by != "off" and not self.federated:
            raise ValueError("early_stopping needs rounds of the zeroth-order optimiser")
        for key, why in self.idle.items():
            if key in self.model_fields_set:
                raise ValueError(f"{key} does nothing with {why}; remove it")
        return self


class SweepPlan(Section):
    """plan.toml.

    Attributes:
        model: local folder or hub id; "demo": the demo's own small Llama.
        dtype: of the model in training; masks are scored in float32.
        text: calibration text; default with the demo's model: the demo's.
        calibration_sequences: sequences of that text; default: 100, the demo's model 256.
        calibration_tokens: tokens a sequence; default: 512, the demo's model 128.
        nodes: of the federation.
        passes: forward passes of a node, the budget that every method has; or
        rounds: their number, whatever a round costs.
        batch_size: rows a local step.
        max_tokens: instead of the task's.
        eval_rows: a fixed sample of the validation file, or of the rows held out for tuning.
        evaluate_on: "tuning": on `tune_rows` of the training file.
        tune_rows: rows of the training file on which nobody trains.
        evaluate_every: rounds between points of a curve; 0: only the end is evaluated.
        local_steps: T, an axis.
        splits: an axis.
        seeds: an axis: of split, directions, batches, mask.
        watts: of one busy core, where the machine does not measure energy.
        prefix_mib: memory for hidden states of rows below a mask, of all nodes together.
        tasks: an axis; none with the demo's model: the demo's own.
        methods: an axis.
    """

    model: str
    dtype: Dtype = "float32"
    device: Device = "cpu"
    text: LocalPath | None = None
    calibration_sequences: Annotated[int, Field(ge=1, strict=True)] | None = None
    calibration_tokens: Annotated[int, Field(ge=8, strict=True)] | None = None
    nodes: Annotated[int, Field(ge=1, le=1000, strict=True)] = 8
    passes: Annotated[int, Field(ge=1, strict=True)] | None = None
    rounds: Annotated[int, Field(ge=1, strict=True)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16
    max_tokens: Annotated[int, Field(ge=8, le=8192, strict=True)] | None = None
    eval_rows: Annotated[int, Field(ge=1, strict=True)] = 1000
    evaluate_on: Literal["validation", "tuning"] = "validation"
    tune_rows: Annotated[int, Field(ge=0, strict=True)] = 0
    evaluate_every: Annotated[int, Field(ge=0, strict=True)] = 0
    local_steps: Annotated[tuple[Annotated[int, Field(ge=1, le=1000, strict=True)], ...], Field(min_length=1)] = (1,)
    splits: Annotated[tuple[SplitPlan, ...], Field(min_length=1)] = (SplitPlan(how="dirichlet"),)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32, strict=True)], ...], Field(min_length=1)] = (0,)
    watts: Annotated[float, Field(gt=0, strict=True)] = 15.0
    prefix_mib: Annotated[int, Field(ge=0, le=1 << 24, strict=True)] = 1024
    tasks: tuple[TaskPlan, ...] = ()
    methods: Annotated[tuple[MethodPlan, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.passes is None) == (self.rounds is None):
            raise ValueError("needs either passes or rounds")
        if self.evaluate_on == "tuning" and not self.tune_rows:
            raise ValueError('evaluate_on = "tuning" needs tune_rows')
        if self.evaluate_on == "tuning" and "eval_rows" in self.model_fields_set and self.eval_rows > self.tune_rows:
            raise ValueError(f"eval_rows = {self.eval_rows} are more than tune_rows = {self.tune_rows}")
        if not self.tasks and self.model != OWN_MODEL:
            raise ValueError('needs [[tasks]], unless model = "demo"')
        for axis, names in (("methods", self.methods), ("tasks", self.tasks)):
            found = [one.name for one in names]
            if len(set(found)) < len(found):
                raise ValueError(f"{axis} have a name twice")
        return self

    @model_validator(mode="after")
    def _text_to_score_on(self) -> Self:
        for method in self.methods:
            if method.mask != "none" and method.text is None and self.text is None and self.model != OWN_MODEL:
                raise ValueError(f"method {method.name} needs text to score its mask on")
        return self

    @model_validator(mode="after")
    def _rounds_can_be(self) -> Self:
        for method in self.methods:
            if method.optimiser == "first-order" and (self.passes or 0) < PASSES_OF_A_GRADIENT:
                raise ValueError(
                    f"method {method.name} is first-order and has no rounds: "
                    f"it needs passes, {PASSES_OF_A_GRADIENT} at least"
                )
            if method.federated and method.directions > self.nodes:
                raise ValueError(f"method {method.name} has {method.directions} directions for {self.nodes} nodes")
            for split in self.splits:
                if split.how == "extreme" and split.nodes > self.nodes:
                    raise ValueError(f"a split has {split.nodes} extreme nodes of {self.nodes}")
        return self
