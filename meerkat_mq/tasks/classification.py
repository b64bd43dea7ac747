"""Classification: each class has a word that a causal language model may say, and a description for an encoder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meerkat_mq.config import check_config, read_toml
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError, TaskError, cut, shown, shown_names
from meerkat_mq.tasks.data import MOST_CHARACTERS, text_of
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.tasks.task import Evaluation, Example, classified
from meerkat_mq.wire.descriptor import TaskDescription

MOST_BYTES = 32 * 1024  # of a task, half of what a control message may have

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_NAME = re.compile(r"\{([^{}\";\n]*)\}")
_DOUBLED = re.compile(r"\{\{[^{}]*\}\}")


class Classification(BaseModel):
    """How a data row becomes text, and what its classes are called. Implements `tasks.task.Task`.

    Attributes:
        fields: row keys that the templates use.
        template: prompt for a causal LM, e.g. "{sentence} It was".
        label_words: one continuation a class, with its leading space, e.g. (" terrible", " great").
        text: template for an encoder.
        descriptions: one label description a class, for an encoder.
        label_field: row key of the class, an integer.
        scale: logits of an encoder are cosine × scale.
        max_tokens: longer inputs are cut from the left (causal LM) or the right (encoder).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: ClassVar[str] = "classification"
    candidates_key: ClassVar[str] = "label_words"

    name: Annotated[str, Field(min_length=1, max_length=64)]
    fields: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]
    template: Annotated[str, Field(min_length=1, max_length=4096)]
    label_words: Annotated[tuple[str, ...], Field(min_length=2, max_length=256)]
    text: Annotated[str, Field(min_length=1, max_length=4096)]
    descriptions: Annotated[tuple[str, ...], Field(min_length=2, max_length=256)]
    label_field: str = "label"
    scale: Annotated[float, Field(gt=0)] = 20.0
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = 256

    @model_validator(mode="after")
    def _same_classes(self) -> Self:
        if len(self.label_words) != len(self.descriptions):
            raise ValueError(f"{len(self.label_words)} label_words but {len(self.descriptions)} descriptions")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields and the label."""
        return (*self.fields, self.label_field)

    @property
    def integers(self) -> str:
        """The label."""
        return self.label_field

    @property
    def classes(self) -> tuple[str, ...]:
        """The label words, for people."""
        return tuple(word.strip() for word in self.label_words)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The label words."""
        return self.label_words

    @property
    def ending(self) -> str:
        """What the template ends with, after its last field."""
        return self.template.rpartition("}")[2]

    def checked(self, row: FileRow) -> FileRow:
        """The row, if its fields are text and its label is one of the classes.

        Raises:
            DataError: names the file, the line and what is wrong with it.
        """
        for field in self.fields:
            length = len(text_of(row, field))
            if length > MOST_CHARACTERS:
                problem = f"field {field!r} has {length:,} characters, more than {MOST_CHARACTERS:,}"
                raise DataError(row.where, problem, "shorten it: no step reads that much")
        label, classes = row.get(self.label_field), len(self.label_words)
        if type(label) is not int or not 0 <= label < classes:
            absent = self.label_field not in row
            found = "is missing" if absent else f"is {shown(label)}"
            remedy = f"task {self.name} has labels 0 to {classes - 1}"
            names = f"; the line has {shown_names(list(row), 'no fields')}" if absent else ""
            raise DataError(row.where, f"{self.label_field!r} {found}", remedy + names)
        return row

    def class_of(self, row: Row) -> int:
        """Its label."""
        return int(row[self.label_field])

    def as_text(self, row: Row) -> str:
        """What an encoder reads."""
        return fill(self.text, row)

    @property
    def text_settings(self) -> dict[str, Any]:
        """What decides `as_text`."""
        return self.model_dump(mode="json", include={"text", "fields"})

    def with_limit(self, max_tokens: int) -> Self:
        """The same task with other `max_tokens`."""
        return self.model_copy(update={"max_tokens": max_tokens})

    def row_of(self, text: str, number: int) -> Row:
        """A row whose fields are all this text."""
        return dict.fromkeys(self.fields, text) | {self.label_field: number % len(self.label_words)}

    def example(self, row: Row) -> Example:
        """The template, filled; the label words; the label."""
        return Example(fill(self.template, row), self.label_words, row[self.label_field], fill(self.text, row))

    def evaluation(self, scores: Float32Array, truth: npt.NDArray[np.int64]) -> Evaluation:
        """Loss, accuracy, and the majority's share."""
        return classified(scores, truth)

    @classmethod
    def from_table(cls, table: dict[str, Any], stem: str, where: str) -> Self:
        """A task from a file's table.

        A file needs only `template` and `label_words`: `name` is then the file's, `fields` are the template's, `text`
        is the fields one after the other, `descriptions` are the label words.

        Raises:
            ConfigError, TaskError: a key is wrong; names it.
        """
        task = check_config(_with_defaults(table, stem), cls, where=where)
        _check(task, where)
        return task

    def describe(self) -> TaskDescription:
        """The task as it travels in the run descriptor, without a kind: older nodes read it too."""
        return TaskDescription.model_validate(self.model_dump(mode="json"))


def _with_defaults(table: dict[str, Any], stem: str) -> dict[str, Any]:
    template, words = table.get("template"), table.get("label_words")
    defaults: dict[str, Any] = {"name": stem}
    if isinstance(template, str):
        defaults["fields"] = list(dict.fromkeys(_named(template)))
    fields = table.get("fields", defaults.get("fields"))
    if isinstance(fields, list):
        defaults["text"] = " ".join(f"{{{field}}}" for field in fields)
    if isinstance(words, list):
        defaults["descriptions"] = [word.strip() if isinstance(word, str) else word for word in words]
    return defaults | table


def _check(task: Classification, where: str) -> None:
    """What a schema cannot say."""
    for number, field in enumerate(task.fields):
        if not field or _named(f"{{{field}}}") != [field]:
            problem = f"{shown(field)} cannot stand between braces in one line"
            raise TaskError(f"{where}: fields.{number}", problem, "rename it in the data")
    for key, template in (("template", task.template), ("text", task.text)):
        _check_placeholders(task, f"{where}: {key}", template)
    for number, word in enumerate(task.label_words):
        if not word or word in task.label_words[:number]:
            found = f"{shown(word)} comes twice" if word else "is empty"
            raise TaskError(f"{where}: label_words.{number}", found, "give each class a word of its own")
    if task.label_field in task.fields:
        problem = f"{shown(task.label_field)} is one of the fields too"
        raise TaskError(f"{where}: label_field", problem, "a field is text, and a label is an integer: give it its key")
    size = len(task.describe().encode())
    if size > MOST_BYTES:
        problem = f"takes {size:,} bytes, more than {MOST_BYTES:,}"
        raise TaskError(where, problem, "shorten its label words and descriptions: it is sent to every node")


def _check_placeholders(task: Classification, where: str, template: str) -> None:
    used, use = set(_named(template)), f"use {{field}} of {', '.join(map(cut, task.fields))}"
    if (doubled := _DOUBLED.search(template)) is not None:
        problem = f"has {cut(doubled[0])}"
        raise TaskError(where, problem, "a field stands between single braces, and any other brace for itself")
    if "" in used:
        raise TaskError(where, "uses braces without a name", use)
    unknown = sorted(used - set(task.fields))
    if unknown or not used:
        raise TaskError(where, f"uses {', '.join(map(cut, unknown)) or 'no field at all'}", use)


def _named(template: str) -> list[str]:
    """What stands between braces as a name does: in one line, without quotes or semicolons."""
    return _NAME.findall(template)


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Put a row's fields into a template; braces around anything else stay as they are: a task's are checked before."""
    return _PLACEHOLDER.sub(lambda match: str(row[match[1]]) if match[1] in row else match[0], template)


TASKS = {
    name: Classification.from_table(table, name, name)
    for name, table in read_toml(Path(__file__).with_name("built_in.toml")).items()
}
