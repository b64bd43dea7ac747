"""One look at a model before it is used: what `load_model` checks, and what a mask and a task add, in words."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meerkat_mq.engines.prompts import candidate_ids
from meerkat_mq.engines.torch.calibration import calibration_batches, reached
from meerkat_mq.engines.torch.load import STEPS, LoadedModel, linear_layers, load_model
from meerkat_mq.engines.torch.names import check_writable
from meerkat_mq.engines.torch.scoring import scorer_for
from meerkat_mq.errors import MeerkatError, printable, within
from meerkat_mq.tasks.task import Task

_TEXTS = (
    "The pump in the cellar was broken when the farmer came back on Monday, and nobody knew how long it had been so.",
    "A ship that leaves the harbour in the morning is seen from the hill until noon, if the weather is clear enough.",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one step of the look found, or what is wrong, with its place; `good` is None where an earlier one failed."""

    step: str
    good: bool | None
    text: str
    remedy: str = ""


def inspect_model(
    source: str | Path, *, dtype: str, device: str, task: Task | None, show: Callable[[Finding], None]
) -> bool:
    """Look at a model step by step, up to the first that fails, and `show` each; whether none did.

    Source, dtype and device are as `load_model` takes them; the task is what the model is to be used for.
    """
    left = [*STEPS, "mask", *(["task"] if task else [])]

    def say(step: str, text: str) -> None:
        left.remove(step)
        show(Finding(step, good=True, text=printable(text)))

    try:
        loaded = load_model(source, dtype=dtype, device=device, say=say)
        say("mask", _mask(loaded))
        if task:
            say("task", _task(loaded, task))
    except MeerkatError as error:
        show(Finding(left[0], good=False, text=f"{error.where}: {error.problem}", remedy=error.remedy))
        for step in left[1:]:
            show(Finding(step, good=None, text="not looked at"))
        return False
    return True


def _mask(loaded: LoadedModel) -> str:
    """What a mask could choose from: the linear matrices that the loss depends on, and can be written back."""
    with within(str(loaded.folder)):
        weights = {name: layer.weight for name, layer in linear_layers(loaded.model).items()}
    check_writable(loaded.names, weights, loaded.folder)
    batch = calibration_batches(loaded, _TEXTS, seed=0, sequences=2, length=8, batch_size=2)[0]
    found = reached(loaded, batch, weights)
    size = sum(weights[name].numel() for name in found)
    outside = f"; {len(weights) - len(found)} get no gradient from text and are left out" * (len(found) < len(weights))
    return f"{size:,} weights in {len(found)} linear matrices{outside}"


def _task(loaded: LoadedModel, task: Task) -> str:
    scorer_for(loaded, task)
    limit = min(task.max_tokens, loaded.max_tokens)
    if loaded.kind == "encoder" or task.continuation:
        return f"{task.name}: texts up to {limit} tokens"
    counts = [len(ids) for ids in candidate_ids(loaded.tokenizer, task)] if task.candidates else []
    words = f", {task.candidates_key.replace('_', ' ')} of {', '.join(map(str, counts))} tokens" if counts else ""
    return f"{task.name}: prompts up to {limit} tokens{words}"
