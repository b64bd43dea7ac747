"""HTML and SVG by construction, and what pages are made of; whatever is not Markup is escaped."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Final

from meerkat_mq.errors import printable_lines

STYLE: Final = Path(__file__).with_name("page.css")


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
    return escape(printable_lines(value) if isinstance(value, str) else f"{value:.6g}")


def policy(style: str) -> str:
    """A content security policy: a page with this one style sheet, and nothing else that a browser would run or load.

    All text is escaped already; where one place were forgotten, this keeps a browser from running what is in it.
    """
    hashed = b64encode(sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"


def document(title: str, *content: str) -> str:
    """A whole page as HTML."""
    style = STYLE.read_text(encoding="utf-8")
    head = tag(
        "head",
        Markup(f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy(style)}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *content)), lang='en')}\n"


def section(title: str, *content: str, note: str = "", style: str = "card") -> Markup:
    """A card with its heading."""
    explained = tag("p", note, class_="note") if note else ""
    return tag("section", tag("h2", title), explained, *content, class_=style)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table that scrolls; on a phone, each row is a list of its cells, and each cell says its column's head."""
    first = tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads)))
    others = (
        tag("tr", *(tag("td", cell, data_label=head) for head, cell in zip(heads, row, strict=True))) for row in rows
    )
    return tag("div", tag("table", first, tag("tbody", *others)), class_="scroll")


def pairs(entries: Iterable[tuple[str, str]], style: str) -> Markup:
    """Labels and what they say."""
    return tag("dl", *(tag("div", tag("dt", label), tag("dd", value)) for label, value in entries), class_=style)
