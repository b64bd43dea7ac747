"""Labels of rows: a number that counts from 0, or one of the words that a task's `labels` lists."""

from typing import Annotated

from pydantic import AfterValidator, Field

from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError, shown, shown_names
from meerkat_mq.tasks.sources import FileRow


def _different(words: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(words)) < len(words):
        raise ValueError("a word comes twice")
    return words


Word = Annotated[str, Field(min_length=1, max_length=256)]
Labels = Annotated[tuple[Word, ...], Field(min_length=2, max_length=256), AfterValidator(_different)]


def number_of(row: Row, field: str, labels: tuple[str, ...] | None) -> int:
    """The number of a checked row's label."""
    return int(row[field]) if labels is None else labels.index(row[field])


def check_label(row: FileRow, field: str, labels: tuple[str, ...] | None, count: int, of: str) -> None:
    """Make sure that a row's label is one of the first `count`; `of` says in an error whose labels these are.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    label = row.get(field)
    if labels is None:
        good, known = type(label) is int and 0 <= label < count, f"0 to {count - 1}"
    else:
        good, known = label in labels[:count] and isinstance(label, str), shown_names(labels[:count], "none")
    if not good:
        absent = field not in row
        found = "is missing" if absent else f"is {shown(label)}"
        names = f"; the line has {shown_names(list(row), 'no fields')}" if absent else ""
        raise DataError(row.where, f"{field!r} {found}", f"{of} has labels {known}{names}")
