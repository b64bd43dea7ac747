"""Attack H22: names of nodes, models, tasks and classes are anybody's; wherever they are shown, they are text."""

import io
import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import structlog

from meerkat_mq.chaos import verdict
from meerkat_mq.observe import page
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.observe.markup import document, section, table, tag
from meerkat_mq.sweep.results import table as results_table
from tests.support.command import Meerkat

SCRIPT = "<script>alert(1)</script>"
STEERING = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\x7f", "\r", "\x00"]
MARKUP = [SCRIPT, '"><img src=x onerror=alert(1)>', "[red]x[/red]", "[x](javascript:alert(1))", "![x](//evil/x.png)",
          "`x`", "|", "a\nb", "<!--", "&lt;", "[link=http://evil]x[/link]", ":skull:", *STEERING]  # fmt: skip


# --- results.md ---


def row(**changes: Any) -> dict[str, Any]:
    cell: dict[str, Any] = dict.fromkeys(
        ("method", "task", "split", "local_steps", "lr", "evaluated_on", "budget", "model", "mask"), "same"
    )
    return cell | {"key": "k", "setting": "s", "seed": 1, "accuracy": 0.5} | changes


@pytest.mark.parametrize("name", MARKUP)
@pytest.mark.parametrize("place", ["method", "task", "split", "budget", "failed"])
def test_names_in_a_table_of_results(name: str, place: str) -> None:
    text = results_table([row(**{place: name}), row(task="other")])
    assert not re.search(r"<|(?<!\\)[`\[\]!]|(?<!\\)\*", text)
    assert all(line.isprintable() for line in text.split("\n"))
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_plain_names_stay_as_they_are() -> None:
    assert "| meerkat-vp_2 (0.5) " in results_table([row(method="meerkat-vp_2 (0.5)"), row(method="x")])


# --- pages ---


class Seen(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags = set[str]()
        self.policy = self.style = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_style = tag == "style"
        found = dict(attrs)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        assert not {name for name in found if name.startswith("on") or name in ("src", "href", "style")}

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data


@pytest.mark.parametrize("name", MARKUP)
def test_names_on_a_page(name: str) -> None:
    html = document(
        name, section(name, table([name], [[name]]), note=name), tag("p", name, class_=name, data_label=name)
    )
    seen = Seen(html)
    assert not seen.tags & {"script", "img", "a", "iframe", "link", "object"}
    assert all(char.isprintable() or char == "\n" for char in html)


def test_the_policy_of_pages() -> None:
    """No script, nothing loaded, and the one style sheet by its hash: a browser would not apply another."""
    seen = Seen(document("a page"))
    allowed = f"'sha256-{b64encode(sha256(seen.style.encode()).digest()).decode()}'"
    assert seen.policy == f"default-src 'none'; style-src {allowed}; base-uri 'none'; form-action 'none'"
    assert vars(page)["document"] is vars(verdict)["document"] is document  # reports and drills


# --- logs ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("name", STEERING)
def test_names_in_a_log(name: str, as_json: bool) -> None:
    file = Terminal()
    configure_logs(as_json=as_json, file=file)
    log = structlog.get_logger().bind(run=name)
    log.warning("said", node=name, **{f"key{name}": 1}, several=[name], words=f"two {name}\n")
    try:
        raise ValueError(name)
    except ValueError:
        log.exception("failed")
    text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()) if not as_json else file.getvalue()
    assert name not in text.replace("\n", "")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert not as_json or [json.loads(line)["run"] for line in text.splitlines()] == [name] * 2


# --- tables and lines of commands ---


def test_labels_of_a_data_file_are_no_markup(tmp_path: Path, meerkat: Meerkat) -> None:
    out = tmp_path / "[red]shards"
    (tmp_path / "rows.jsonl").write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}\n' * 4)
    done = meerkat("partition", tmp_path / "rows.jsonl", "--task", "sst2", "--nodes", 2, "--out", out)
    assert done.code == 0, done
    assert "[red]shards/node-0.jsonl" in done.out
