"""HTML and SVG by construction: whatever is not Markup is escaped."""

from collections.abc import Iterable
from html import escape

from meerkat_mq.errors import printable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; in attribute names, a trailing _ is dropped and the others become hyphens."""
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other."""
    return Markup("".join(part if isinstance(part, Markup) else _text(part) for part in parts))


def _text(value: str | float) -> str:
    lines = value.split("\n") if isinstance(value, str) else [f"{value:.6g}"]
    return escape("\n".join(map(printable, lines)))
