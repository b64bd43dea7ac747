"""Templates: text in which {field} stands for a field of the row."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from meerkat_mq.errors import DataError, TaskError, cut, shown
from meerkat_mq.tasks.data import MOST_CHARACTERS, text_of
from meerkat_mq.tasks.sources import FileRow, place_of

MOST_FILLED = 4 * MOST_CHARACTERS  # a template may use a long field many times

Template = Annotated[str, Field(min_length=1, max_length=4096)]
Fields = Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_NAME = re.compile(r"\{([^{}\";\n]*)\}")
_DOUBLED = re.compile(r"\{\{[^{}]*\}\}")


def named(*templates: object) -> list[str]:
    """What stands between braces as a name does, once each: in one line, without quotes or semicolons."""
    return list(dict.fromkeys(name for one in templates if isinstance(one, str) for name in _NAME.findall(one)))


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Put a row's fields into a template; braces around anything else stay as they are: a task's are checked before.

    Raises:
        DataError: what comes of it is longer than any model reads.
    """
    places = _PLACEHOLDER.findall(template)
    values = {name: str(row[name]) for name in places if name in row}
    size = len(template) + sum(len(values.get(name, "")) for name in places)
    if size > MOST_FILLED:
        problem = f"fills its task's template with {size:,} characters, more than {MOST_FILLED:,}"
        raise DataError(place_of(row), problem, "shorten its fields")
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def ending(template: str) -> str:
    """What a template ends with, after its last field."""
    return template.rpartition("}")[2]


def check_fields(row: FileRow, fields: Sequence[str]) -> None:
    """Refuse, by `DataError`, a row whose fields are no text, or too long; it names file, line and field."""
    for field in fields:
        length = len(text_of(row, field))
        if length > MOST_CHARACTERS:
            problem = f"field {field!r} has {length:,} characters, more than {MOST_CHARACTERS:,}"
            raise DataError(row.where, problem, "shorten it: no step reads that much")


def check_templates(where: str, fields: Sequence[str], **templates: str) -> None:
    """Refuse, by `TaskError`, names of fields that no template can have, and templates that use others."""
    for number, field in enumerate(fields):
        if not field or named(f"{{{field}}}") != [field]:
            problem = f"{shown(field)} cannot stand between braces in one line"
            raise TaskError(f"{where}: fields.{number}", problem, "rename it in the data")
    for key, template in templates.items():
        _check_placeholders(f"{where}: {key}", template, fields)


def _check_placeholders(where: str, template: str, fields: Sequence[str]) -> None:
    used, use = set(named(template)), f"use {{field}} of {', '.join(map(cut, fields))}"
    if (doubled := _DOUBLED.search(template)) is not None:
        problem = f"has {cut(doubled[0])}"
        raise TaskError(where, problem, "a field stands between single braces, and any other brace for itself")
    if "" in used:
        raise TaskError(where, "uses braces without a name", use)
    unknown = sorted(used - set(fields))
    if unknown or not used:
        raise TaskError(where, f"uses {', '.join(map(cut, unknown)) or 'no field at all'}", use)
