"""Markdown of which every name and value may come from others: all of it is shown as it is."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from meerkat_mq.errors import printable


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no link, no image, no code. Names come from plans and folders."""
    return re.sub(r"([\\`*\[\]!~])", r"\\\1", escape(printable(text), quote=False))


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(escaped(cell).replace("|", "¦") for cell in cells) + " |"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [line(heads), line(["---"] * len(heads)), *map(line, rows)]
