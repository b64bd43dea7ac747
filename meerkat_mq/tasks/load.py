"""Tasks by name, from a TOML file, and from a run descriptor. No torch."""

import json
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from meerkat_mq.config import read_toml
from meerkat_mq.config.load import SEE
from meerkat_mq.errors import BadValue, ConfigError, TaskError, shown
from meerkat_mq.tasks.choice import Choice
from meerkat_mq.tasks.classification import TASKS, Classification
from meerkat_mq.tasks.completion import Completion
from meerkat_mq.tasks.task import Task
from meerkat_mq.tasks.text import Text
from meerkat_mq.wire.descriptor import TaskDescription

KINDS: Final[dict[str, Any]] = {kind.kind: kind for kind in (Classification, Choice, Completion, Text)}


def load_task(source: str | Path) -> Task:
    """A built-in task by its name, or a task from a TOML file, whose key `kind` says of which kind it is.

    Raises:
        TaskError: unknown name, unreadable file, or a wrong key; names the file and the key.
    """
    name = str(source)
    if name in TASKS:
        return TASKS[name]
    path = Path(source)
    if path.suffix != ".toml":
        remedy = f"use one of {', '.join(sorted(TASKS))}, or a path ending in .toml"
        raise TaskError(name, "is no built-in task", remedy)
    try:
        table = read_toml(path)
        kind = table.pop("kind", Classification.kind)
        if kind not in list(KINDS):
            raise TaskError(f"{name}: kind", f"{shown(kind)} is unknown", f"use one of {', '.join(KINDS)}")
        task: Task = KINDS[kind].from_table(table, path.stem, name)
    except ConfigError as error:
        remedy = "see docs/tasks.md" if error.remedy == SEE else error.remedy
        raise TaskError(error.where, error.problem, remedy) from error
    return task


def task_of(description: TaskDescription) -> Task:
    """The task that a run descriptor carries.

    Raises:
        BadValue: it is of a kind that this version does not have, or its keys are wrong; names the first.
    """
    table = description.model_dump(mode="json")
    kind = table.pop("kind", Classification.kind)
    if kind not in list(KINDS):
        raise BadValue("RunDescriptor.task.kind", f"{shown(kind)} is none that this version has")
    try:
        task: Task = KINDS[kind].model_validate_json(json.dumps(table).encode(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("RunDescriptor.task", *first["loc"]))[:100]
        raise BadValue(ascii(place)[1:-1], first["msg"]) from error
    return task
