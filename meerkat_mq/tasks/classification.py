"""Classification: each class has a word that a causal language model may say, and a description for an encoder."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from meerkat_mq.config import read_toml
from meerkat_mq.core.step import Row
from meerkat_mq.errors import TaskError, shown
from meerkat_mq.tasks.labels import Labels, check_label, number_of
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.tasks.table import MaxTokens, Name, TaskTable
from meerkat_mq.tasks.task import Evaluation, Example, Scored, classified
from meerkat_mq.tasks.template import Fields, Template, check_fields, check_templates, ending, fill, named
from meerkat_mq.wire.descriptor import TaskDescription


class Classification(TaskTable):
    """How a data row becomes text, and what its classes are called. Implements `tasks.task.Task`.

    Attributes:
        fields: row keys that the templates use.
        template: prompt for a causal LM, e.g. "{sentence} It was".
        label_words: one continuation a class, with its leading space, e.g. (" terrible", " great").
        text: template for an encoder.
        descriptions: one label description a class, for an encoder.
        label_field: row key of the class: an integer, or one of `labels`.
        scale: logits of an encoder are cosine × scale.
        max_tokens: longer inputs are cut from the left (causal LM) or the right (encoder).
        labels: the labels of rows, in the order of the classes, where they are words; None: they are numbers.
    """

    kind: ClassVar[str] = "classification"
    candidates_key: ClassVar[str] = "label_words"

    name: Name
    fields: Fields
    template: Template
    label_words: Annotated[tuple[str, ...], Field(min_length=2, max_length=256)]
    text: Template
    descriptions: Annotated[tuple[str, ...], Field(min_length=2, max_length=256)]
    label_field: str = "label"
    scale: Annotated[float, Field(gt=0)] = 20.0
    max_tokens: MaxTokens = 256
    labels: Labels | None = None

    @model_validator(mode="after")
    def _same_classes(self) -> Self:
        for key, found in (("descriptions", self.descriptions), ("labels", self.labels or self.label_words)):
            if len(self.label_words) != len(found):
                raise ValueError(f"{len(self.label_words)} label_words but {len(found)} {key}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields and the label."""
        return (*self.fields, self.label_field)

    @property
    def integers(self) -> str | None:
        """The label, unless it is a word."""
        return self.label_field if self.labels is None else None

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
        return ending(self.template)

    def checked(self, row: FileRow) -> FileRow:
        """The row, if its fields are text and its label is one of the classes.

        Raises:
            DataError: names the file, the line and what is wrong with it.
        """
        check_fields(row, self.fields)
        check_label(row, self.label_field, self.labels, len(self.label_words), f"task {self.name}")
        return row

    def class_of(self, row: Row) -> int:
        """The number of its label."""
        return number_of(row, self.label_field, self.labels)

    def as_text(self, row: Row) -> str:
        """What an encoder reads."""
        return fill(self.text, row)

    @property
    def text_settings(self) -> dict[str, Any]:
        """What decides `as_text`."""
        return self.model_dump(mode="json", include={"text", "fields"})

    def row_of(self, text: str, number: int) -> Row:
        """A row whose fields are all this text."""
        number %= len(self.label_words)
        return dict.fromkeys(self.fields, text) | {self.label_field: self.labels[number] if self.labels else number}

    def example(self, row: Row) -> Example:
        """The template, filled; the label words; the label."""
        return Example(fill(self.template, row), self.label_words, self.class_of(row), fill(self.text, row))

    def evaluation(self, found: Scored) -> Evaluation:
        """What `classified` says."""
        return classified(found.scores, found.truth)

    @classmethod
    def defaults(cls, table: dict[str, Any]) -> dict[str, Any]:
        """A file needs only `template` and `label_words`.

        `fields` are then the template's, `text` is the fields one after the other, `descriptions` are the label words.
        """
        template, words, defaults = table.get("template"), table.get("label_words"), dict[str, Any]()
        if isinstance(template, str):
            defaults["fields"] = named(template)
        fields = table.get("fields", defaults.get("fields"))
        if isinstance(fields, list):
            defaults["text"] = " ".join(f"{{{field}}}" for field in fields)
        if isinstance(words, list):
            defaults["descriptions"] = [word.strip() if isinstance(word, str) else word for word in words]
        return defaults

    def check(self, where: str) -> None:
        """Templates use the fields; each class has a word of its own; the label is no field."""
        check_templates(where, self.fields, template=self.template, text=self.text)
        for number, word in enumerate(self.label_words):
            if not word or word in self.label_words[:number]:
                found = f"{shown(word)} comes twice" if word else "is empty"
                raise TaskError(f"{where}: label_words.{number}", found, "give each class a word of its own")
        if self.label_field in self.fields:
            problem, remedy = f"{shown(self.label_field)} is one of the fields too", "give the label a key of its own"
            raise TaskError(f"{where}: label_field", problem, remedy)

    def describe(self) -> TaskDescription:
        """The task as it travels in the run descriptor, without a kind: older nodes read it too."""
        return TaskDescription.model_validate(self.model_dump(mode="json"))


TASKS = {
    name: Classification.from_table(table, name, name)
    for name, table in read_toml(Path(__file__).with_name("built_in.toml")).items()
}
