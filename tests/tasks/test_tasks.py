"""Tasks: the built-in ones fit their data; files say which key is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat_mq.errors import TaskError
from meerkat_mq.tasks.classification import TASKS, Classification
from meerkat_mq.tasks.data import read_rows
from meerkat_mq.tasks.load import load_task
from meerkat_mq.tasks.template import fill

TOML = """
template = "{subject}: {body}\\nThis is about"
label_words = [" billing", " delivery", " returns"]
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.toml"
    path.write_text(TOML)
    return path


def loaded(source: Path | str) -> Classification:
    task = load_task(source)
    assert isinstance(task, Classification)
    return task


def test_built_in_names() -> None:
    assert sorted(TASKS) == ["agnews", "boolq", "rte", "sst2", "wic", "wsc", "yelp"]
    assert all(load_task(name) is TASKS[name] for name in TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_built_in_templates_use_all_their_fields(task: object) -> None:
    task = TASKS[task.name]  # type: ignore[attr-defined]
    row = {field: f"<{field}>" for field in task.fields}
    for template in (task.template, task.text):
        filled = fill(template, row)
        assert all(f"<{field}>" in filled for field in task.fields)
        assert "{" not in filled
    assert all(word.startswith(" ") for word in task.label_words)
    assert not task.template.endswith(" ")


def test_built_in_tasks_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    documented = {row[0].strip("`"): row for row in rows if len(row) == 4}
    assert documented.keys() == TASKS.keys()
    for name, (_, fields, labels, words) in documented.items():
        assert set(re.findall(r"`(\w+)`", fields)) == set(TASKS[name].fields)
        assert len(labels.split(",")) == len(TASKS[name].label_words)
        assert [f" {word.strip()}" for word in words.split(",")] == list(TASKS[name].label_words)


@pytest.mark.real
@pytest.mark.parametrize("name", ["agnews", "boolq", "rte", "sst2", "wic"])
def test_built_in_tasks_fit_the_real_data(shared: Path, name: str) -> None:
    rows = read_rows(shared / "data" / name / "validation.jsonl", TASKS[name])
    assert {row["label"] for row in rows} == set(range(len(TASKS[name].label_words)))


def test_fill_replaces_fields_and_nothing_else() -> None:
    template = "{a} {b.c} {0} {{a}} {} {other}"
    assert fill(template, {"a": "{b}", "b": "x"}) == "{b} {b.c} {0} {{b}} {} {other}"


def test_unknown_name() -> None:
    with pytest.raises(
        TaskError, match=r"^sst-2: is no built-in task; use one of agnews, .*, or a path ending in \.toml"
    ):
        load_task("sst-2")


def test_file_with_defaults(toml: Path) -> None:
    task = loaded(toml)
    assert task.name == "tickets"
    assert task.fields == ("subject", "body")
    assert task.text == "{subject} {body}"
    assert task.descriptions == ("billing", "delivery", "returns")


def test_file_with_everything(toml: Path) -> None:
    toml.write_text(
        TOML
        + 'name = "t"\nfields = ["body", "subject"]\ntext = "{body}"\nlabel_field = "topic"\n'
        + 'scale = 5\nmax_tokens = 9\ndescriptions = ["a", "b", "c"]\n'
    )
    task = loaded(str(toml))
    assert (task.name, task.text, task.label_field, task.scale, task.max_tokens) == ("t", "{body}", "topic", 5.0, 9)
    assert task.fields == ("body", "subject")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template = ", "tickets.toml: is not TOML"),
        ('template = "{x} is"', "tickets.toml: label_words: is missing; add the key"),
        ('label_words = ["a", "b"]', "tickets.toml: fields: is missing"),
        (TOML + "colour = 1", "tickets.toml: colour: is unknown"),
        (TOML + "max_tokens = 0", "tickets.toml: max_tokens: .* not 0"),
        (TOML + "scale = -1.0", "tickets.toml: scale: .* not -1.0"),
        (TOML + 'descriptions = ["a", "b"]', "3 label_words but 2 descriptions"),
        (TOML.replace('" delivery", ', "2, "), r"tickets.toml: label_words\.1: "),
        (TOML + 'text = "{header}"', "tickets.toml: text: uses header; use {field} of subject, body"),
        (TOML + 'text = "plain"', "tickets.toml: text: uses no field at all"),
        (TOML + 'fields = ["body"]', "tickets.toml: template: uses subject"),
    ],
)
def test_wrong_file(toml: Path, text: str, message: str) -> None:
    toml.write_text(text)
    with pytest.raises(TaskError, match=message) as caught:
        load_task(toml)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"absent\.toml: cannot be read \(No such file or directory\)"):
        load_task(tmp_path / "absent.toml")


def test_tasks_and_data_do_not_import_torch() -> None:
    code = "import meerkat_mq.tasks.load, meerkat_mq.tasks.data, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


# --- placeholders, and other leftovers ---


@pytest.mark.parametrize(
    "name", ["Review Text", "review-text", "review.text", "col#1", "Größe (cm)", "author's note", "a/b"]
)
def test_a_field_may_have_any_name(toml: Path, name: str) -> None:
    toml.write_text(f'template = "{{{name}}}: {{body}} It was"\nlabel_words = [" bad", " good"]', encoding="utf-8")
    task = loaded(toml)
    assert task.fields == (name, "body")
    row = {name: "<1>", "body": "<2>", "label": 1}
    assert fill(task.template, row) == "<1>: <2> It was"
    assert fill(task.text, row) == "<1> <2>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} {Review Text} is", "tickets.toml: template: uses Review Text; use {field} of text"),
        ("{text} {review-text} is", "tickets.toml: template: uses review-text; use {field} of text"),
        ("{ text } is", "tickets.toml: template: uses  text ; use {field} of text"),
        ("{text!r} is", "tickets.toml: template: uses text!r; use"),
        ("{text} {} is", "tickets.toml: template: uses braces without a name; use"),
        ("{text} {0} is", "tickets.toml: template: uses 0; use"),
        ("{{text}} is", "tickets.toml: template: has {{text}}; a field stands between single braces"),
        ("{text} {{literal}} is", "tickets.toml: template: has {{literal}}; a field stands"),
        ("{text} {{ text }} is", "tickets.toml: template: has {{ text }}"),
    ],
)
def test_no_placeholder_stays_in_a_prompt(toml: Path, template: str, message: str) -> None:
    toml.write_text(f'template = "{template}"\nlabel_words = [" a", " b"]\nfields = ["text"]')
    with pytest.raises(TaskError, match=re.escape(message)):
        load_task(toml)


def test_other_braces_stand_for_themselves(toml: Path) -> None:
    toml.write_text("template = '''{text}\n{\"answer\": \"'''\nlabel_words = ['yes', 'no']")
    task = loaded(toml)
    assert task.fields == ("text",)
    assert fill(task.template, {"text": "{a}"}) == '{a}\n{"answer": "'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('label_words = [" one"]', "label_words: must have at least 2 items, not [' one']; see docs/tasks.md"),
        ("label_words = []", "label_words: must have at least 2 items"),
        ('label_words = [" a", ""]', "label_words.1: is empty; give each class a word of its own"),
        ('label_words = [" a", " b", " a"]', "label_words.2: ' a' comes twice; give each class"),
        ('label_words = " yes"', "label_words: must be an array, not ' yes'; see docs/tasks.md"),
        ('label_words = [" a", " b"]\nlabel_field = "x"', "label_field: 'x' is one of the fields too"),
        ('label_words = [" a", " b"]\ndescriptions = ["%s", "b"]' % ("x" * 40_000), "takes 40,1"),
        (
            'label_words = [" a", " b"]\nfields = ["x", "a{b"]',
            "fields.1: 'a{b' cannot stand between braces",
        ),
        ('label_words = [" a", " b"]\nname = ""', "name: must have at least one character, not ''"),
        ('label_words = [" a", " b"]\nmax_tokens = %s' % ("9" * 5000), "tickets.toml: is not TOML ("),
        ('label_words = {}" a"{}'.format("[" * 5000, "]" * 5000), "tickets.toml: is not TOML ("),
        ('label_words = [" a", " b"]\nscale = "%s"' % ("x" * 500), "scale: "),
        ('label_words = [" a", " b"]\n"new\\nline" = 1', "tickets.toml: new\N{REPLACEMENT CHARACTER}line: is unknown"),
    ],
)
def test_a_file_is_refused_in_one_short_line(toml: Path, changes: str, message: str) -> None:
    toml.write_text('template = "{x} is"\n' + changes)
    with pytest.raises(TaskError, match=re.escape(message)) as caught:
        load_task(toml)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert caught.value.remedy


def test_a_byte_order_mark_is_none_of_the_task(toml: Path) -> None:
    toml.write_text("\ufeff" + TOML, encoding="utf-8")
    assert loaded(toml).fields == ("subject", "body")
    toml.write_text(TOML, encoding="utf-16")
    with pytest.raises(TaskError, match=r"tickets\.toml: is not TOML \(.*utf-8.*\); see docs/tasks.md"):
        load_task(toml)
