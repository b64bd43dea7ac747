"""Completion: a prompt, and the text that is to follow it, such as in instruction tuning."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.tasks.table import MaxTokens, Name, OwnCandidates
from meerkat_mq.tasks.task import Continuation, Evaluation, Example, Scored, continued
from meerkat_mq.tasks.template import Fields, Template, check_fields, check_templates, fill, named


class Completion(OwnCandidates):
    """How a row becomes a prompt and its completion, whose tokens alone are learned. Implements `tasks.task.Task`.

    Attributes:
        fields: row keys that the templates use.
        template: prompt, e.g. "{instruction}\\nCommand:"; with `chat`, what the user says.
        completion: what follows, with its leading space, e.g. " {command}"; with `chat`, what the assistant says.
        chat: whether the model's own chat template stands around both.
        system: with `chat`, the system message; "": none.
        max_tokens: of longer rows, the prompt loses its beginning, but a quarter of the tokens stays for it; then the
            completion loses its end.
    """

    kind: ClassVar[str] = "completion"
    candidates_key: ClassVar[str] = "completion"
    ending: ClassVar[str] = ""
    integers: ClassVar[str | None] = None

    name: Name
    fields: Fields
    template: Template
    completion: Template
    chat: bool = False
    system: Annotated[str, Field(max_length=4096)] = ""
    max_tokens: MaxTokens = 256

    @model_validator(mode="after")
    def _system_of_a_chat(self) -> Self:
        if self.system and not self.chat:
            raise ValueError("system needs chat = true")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields."""
        return self.fields

    @property
    def continuation(self) -> Continuation:
        """Ends with the model's end token."""
        return Continuation(ends=True, chat=self.chat, system=self.system)

    def checked(self, row: FileRow) -> FileRow:
        """The row, if its fields are text, and there is something to complete with.

        Raises:
            DataError: names the file, the line and what is wrong with it.
        """
        check_fields(row, self.fields)
        if not fill(self.completion, row).strip():
            raise DataError(row.where, "has an empty completion", "fill or remove the row")
        return row

    def as_text(self, row: Row) -> str:
        """The prompt, and the completion after it."""
        example = self.example(row)
        return example.prompt + example.candidates[0]

    @property
    def text_settings(self) -> dict[str, Any]:
        """What decides `as_text`."""
        return self.model_dump(mode="json", include={"fields", "template", "completion"})

    def row_of(self, text: str, number: int) -> Row:
        """A row whose fields are all this text."""
        return dict.fromkeys(self.fields, text)

    def example(self, row: Row) -> Example:
        """The templates, filled."""
        prompt = fill(self.template, row)
        return Example(prompt, (fill(self.completion, row),), 0, prompt)

    def evaluation(self, found: Scored) -> Evaluation:
        """What `continued` says."""
        return continued(found, whole=True)

    @classmethod
    def defaults(cls, table: dict[str, Any]) -> dict[str, Any]:
        """A file needs only `template` and `completion`: `fields` are then theirs."""
        return {"fields": named(table.get("template"), table.get("completion"))}

    def check(self, where: str) -> None:
        """Templates use the fields."""
        check_templates(where, self.fields, template=self.template, completion=self.completion)
