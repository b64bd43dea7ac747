"""Text: plain language modelling. A row is a text; a long one makes several rows, in windows of the task's length."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError
from meerkat_mq.tasks.sources import FileRow, place_of
from meerkat_mq.tasks.table import MaxTokens, Name, OwnCandidates
from meerkat_mq.tasks.task import Continuation, Cut, Evaluation, Example, Scored, continued
from meerkat_mq.tasks.template import check_fields


class Text(OwnCandidates):
    """Which field of a row is learned, token by token. Implements `tasks.task.Task`.

    Attributes:
        field: row key of the text.
        max_tokens: of a window.
    """

    kind: ClassVar[str] = "text"
    candidates_key: ClassVar[str] = "field"
    ending: ClassVar[str] = ""
    integers: ClassVar[str | None] = None

    name: Name
    field: Annotated[str, Field(min_length=1)] = "text"
    max_tokens: MaxTokens = 256

    @property
    def columns(self) -> tuple[str, ...]:
        """The field."""
        return (self.field,)

    @property
    def continuation(self) -> Continuation:
        """A window may end anywhere."""
        return Continuation(ends=False)

    def windows(self, row: Row, cut: Cut) -> Sequence[Row]:
        """A row of the same place for each part that says anything."""
        parts = [part for part in cut(row[self.field]) if part.strip()]
        return [FileRow({**row, self.field: part}, place_of(row)) for part in parts] if len(parts) > 1 else [row]

    def checked(self, row: FileRow) -> FileRow:
        """The row, if it has a text.

        Raises:
            DataError: names the file, the line and what is wrong with it.
        """
        check_fields(row, self.columns)
        if not row[self.field].strip():
            raise DataError(row.where, f"field {self.field!r} is empty", "fill or remove the row")
        return row

    def as_text(self, row: Row) -> str:
        """The text."""
        return str(row[self.field])

    @property
    def text_settings(self) -> dict[str, Any]:
        """What decides `as_text`."""
        return self.model_dump(mode="json", include={"field"})

    def row_of(self, text: str, number: int) -> Row:
        """A row of this text."""
        return {self.field: text}

    def example(self, row: Row) -> Example:
        """The text alone: what it goes on from is nothing."""
        return Example("", (row[self.field],), 0, row[self.field])

    def evaluation(self, found: Scored) -> Evaluation:
        """What `continued` says; a window is no answer that could be exact."""
        return continued(found, whole=False)
