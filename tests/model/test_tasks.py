"""Tasks: the built-in ones fit their data; files say which key is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat_mq.errors import TaskError
from meerkat_mq.model.data import read_rows
from meerkat_mq.model.tasks import TASKS, fill, load_task

TOML = """
template = "{subject}: {body}\\nThis is about"
label_words = [" billing", " delivery", " returns"]
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.toml"
    path.write_text(TOML)
    return path


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
    task = load_task(toml)
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
    task = load_task(str(toml))
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
    code = "import meerkat_mq.model.tasks, meerkat_mq.model.data, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
