"""Choice: each row brings its own options, of which one is right, such as in ARC, COPA or HellaSwag."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field

from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError, TaskError, shown
from meerkat_mq.tasks.data import MOST_CHARACTERS
from meerkat_mq.tasks.labels import Labels, check_label, number_of
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.tasks.table import MaxTokens, Name, OwnCandidates
from meerkat_mq.tasks.task import Evaluation, Example, Scored, classified
from meerkat_mq.tasks.template import Fields, Template, check_fields, check_templates, ending, fill, named

MOST_OPTIONS = 64
OPTION = "option"  # what stands for an option in its template


class Choice(OwnCandidates):
    """How a row becomes a prompt and options that may follow. Implements `tasks.task.Task`.

    Attributes:
        fields: row keys that the template uses.
        template: prompt, e.g. "Question: {question}\\nAnswer:".
        options: one row key whose value is a list of texts, or several keys with one text each.
        option: what follows the prompt, with its leading space; {option} is one of the options.
        label_field: row key of the right option: its number, from 0, or one of `labels`.
        labels: the labels of rows, in the order of the options, where they are words; None: they are numbers.
        max_tokens: longer prompts lose their beginning.
    """

    kind: ClassVar[str] = "choice"
    candidates_key: ClassVar[str] = "options"

    name: Name
    fields: Fields
    template: Template
    options: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, max_length=MOST_OPTIONS)]
    option: Template = f" {{{OPTION}}}"
    label_field: str = "label"
    labels: Labels | None = None
    max_tokens: MaxTokens = 256

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields, the options, and the label."""
        return (*self.fields, *self.options, self.label_field)

    @property
    def integers(self) -> str | None:
        """The label, unless it is a word."""
        return self.label_field if self.labels is None else None

    @property
    def ending(self) -> str:
        """What the template ends with, after its last field."""
        return ending(self.template)

    def checked(self, row: FileRow) -> FileRow:
        """The row, if its fields and options are text, and its label is one of the options.

        Raises:
            DataError: names the file, the line and what is wrong with it.
        """
        check_fields(row, self.fields)
        if len(self.options) > 1:
            check_fields(row, self.options)
        else:
            self._check_list(row, self.options[0])
        options = self._options(row)
        if sum(map(len, options)) > MOST_CHARACTERS:
            problem = f"its options have more than {MOST_CHARACTERS:,} characters"
            raise DataError(row.where, problem, "shorten them: no step reads that much")
        check_label(row, self.label_field, self.labels, len(options), "the row")
        return row

    def _check_list(self, row: FileRow, key: str) -> None:
        found = row.get(key)
        if not isinstance(found, list) or not 2 <= len(found) <= MOST_OPTIONS:
            said = "is missing" if key not in row else f"is {shown(found)}"
            remedy = f"give a list of 2 to {MOST_OPTIONS} texts, or name a key for each option in the task's options"
            raise DataError(row.where, f"field {key!r} {said}", remedy)
        for option in found:
            check_fields(FileRow({key: option}, row.where), (key,))

    def _options(self, row: Row) -> Sequence[str]:
        """The options of a checked row."""
        if len(self.options) > 1:
            return [row[key] for key in self.options]
        found: list[str] = row[self.options[0]]
        return found

    def as_text(self, row: Row) -> str:
        """The prompt, and the right option after it."""
        example = self.example(row)
        return example.prompt + example.candidates[example.answer]

    @property
    def text_settings(self) -> dict[str, Any]:
        """What decides `as_text`."""
        return self.model_dump(mode="json", exclude={"name", "max_tokens"})

    def row_of(self, text: str, number: int) -> Row:
        """A row whose fields are all this text."""
        count = max(2, len(self.options))
        options: list[str] = [f"{number} of {count}" for number in range(count)]
        own = dict(zip(self.options, options, strict=True)) if len(self.options) > 1 else {self.options[0]: options}
        number %= min(count, len(self.labels or options))
        label = {self.label_field: self.labels[number] if self.labels else number}
        return dict.fromkeys(self.fields, text) | own | label

    def example(self, row: Row) -> Example:
        """The template, filled; the options; the label."""
        prompt = fill(self.template, row)
        options = tuple(fill(self.option, {OPTION: option}) for option in self._options(row))
        return Example(prompt, options, number_of(row, self.label_field, self.labels), prompt)

    def evaluation(self, found: Scored) -> Evaluation:
        """What `classified` says of the options' places; rows have no classes."""
        return replace(classified(found.scores, found.truth), recalls=())

    @classmethod
    def defaults(cls, table: dict[str, Any]) -> dict[str, Any]:
        """A file needs only `template` and `options`, which may be a single key."""
        return {"fields": named(table.get("template"))}

    @classmethod
    def from_table(cls, table: dict[str, Any], stem: str, where: str) -> "Choice":
        """As the other kinds; a single key of options need not be a list."""
        options = table.get("options")
        return super().from_table(table | ({"options": [options]} if isinstance(options, str) else {}), stem, where)

    def check(self, where: str) -> None:
        """Templates use the fields; no key means two things."""
        check_templates(where, self.fields, template=self.template)
        check_templates(where, (OPTION,), option=self.option)
        keys = [*self.fields, *self.options, self.label_field]
        for key, names in (("options", self.options), ("label_field", (self.label_field,))):
            for name in names:
                if keys.count(name) > 1:
                    problem = f"{shown(name)} is named twice by the task"
                    raise TaskError(f"{where}: {key}", problem, "a row has a key of its own for each thing")
