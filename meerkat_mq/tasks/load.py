"""Built-in tasks and tasks from a TOML file. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meerkat_mq.config import check_config, read_toml
from meerkat_mq.config.load import SEE
from meerkat_mq.errors import ConfigError, TaskError, cut, shown
from meerkat_mq.wire.descriptor import Task

MOST_BYTES = 32 * 1024  # of a task, half of what a control message may have

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_NAME = re.compile(r"\{([^{}\";\n]*)\}")
_DOUBLED = re.compile(r"\{\{[^{}]*\}\}")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            fields=("sentence",),
            template="Review: {sentence}\nIn one word, the film is",
            label_words=(" terrible", " great"),
            text="{sentence}",
            descriptions=("a terrible film", "a great film"),
            max_tokens=128,
        ),
        Task(
            name="agnews",
            fields=("text",),
            template="{text}\nThe topic of this news item is",
            label_words=(" world", " sports", " business", " technology"),
            text="{text}",
            descriptions=(
                "international news and politics",
                "sports news",
                "business and financial news",
                "science and technology news",
            ),
            max_tokens=64,
        ),
        Task(
            name="yelp",
            fields=("text",),
            template="{text}\nIn one word, the place is",
            label_words=(" terrible", " great"),
            text="{text}",
            descriptions=("a terrible place", "a great place"),
        ),
        Task(
            name="boolq",
            fields=("passage", "question"),
            template="{passage}\nQuestion: {question}?\nAnswer yes or no:",
            label_words=(" no", " yes"),
            text="{question}? {passage}",
            descriptions=("the answer is no", "the answer is yes"),
            max_tokens=384,
        ),
        Task(
            name="rte",
            fields=("premise", "hypothesis"),
            template="{premise}\nDoes it follow that: {hypothesis}\nAnswer yes or no:",
            label_words=(" yes", " no"),
            text="{hypothesis} {premise}",
            descriptions=("the first statement follows", "the first statement does not follow"),
        ),
        Task(
            name="wsc",
            fields=("text", "span1_text", "span2_text"),
            template='{text}\nDoes "{span2_text}" stand for "{span1_text}" here?\nAnswer yes or no:',
            label_words=(" no", " yes"),
            text='"{span2_text}" is "{span1_text}": {text}',
            descriptions=("two different things", "one and the same thing"),
        ),
        Task(
            name="wic",
            fields=("word", "sentence1", "sentence2"),
            template='{sentence1}\n{sentence2}\nDoes "{word}" mean the same in both sentences?\nAnswer yes or no:',
            label_words=(" no", " yes"),
            text="{word}: {sentence1} {sentence2}",
            descriptions=("two different meanings", "the same meaning"),
            max_tokens=128,
        ),
    )
}


def load_task(source: str | Path) -> Task:
    """A built-in task by its name, or a task from a TOML file.

    A file needs only `template` and `label_words`: `name` is then the file's, `fields` are the template's, `text` is
    the fields one after the other, `descriptions` are the label words.

    Raises:
        TaskError: unknown name, unreadable file, or a wrong key; names the file and the key.
    """
    name = str(source)
    if name in TASKS:
        return TASKS[name]
    path = Path(source)
    if path.suffix != ".toml":
        raise TaskError(
            name, "is no built-in task", f"use one of {', '.join(sorted(TASKS))}, or a path ending in .toml"
        )
    try:
        task = check_config(_with_defaults(read_toml(path), path.stem), Task, where=name)
    except ConfigError as error:
        remedy = "see docs/tasks.md" if error.remedy == SEE else error.remedy
        raise TaskError(error.where, error.problem, remedy) from error
    _check(task, name)
    return task


def _with_defaults(table: dict[str, Any], stem: str) -> dict[str, Any]:
    template, words = table.get("template"), table.get("label_words")
    defaults: dict[str, Any] = {"name": stem}
    if isinstance(template, str):
        defaults["fields"] = list(dict.fromkeys(_named(template)))
    fields = table.get("fields", defaults.get("fields"))
    if isinstance(fields, list):
        defaults["text"] = " ".join(f"{{{field}}}" for field in fields)
    if isinstance(words, list):
        defaults["descriptions"] = [word.strip() if isinstance(word, str) else word for word in words]
    return defaults | table


def _check(task: Task, where: str) -> None:
    """What a schema cannot say.

    Raises:
        TaskError: names the key.
    """
    for number, field in enumerate(task.fields):
        if not field or _named(f"{{{field}}}") != [field]:
            problem = f"{shown(field)} cannot stand between braces in one line"
            raise TaskError(f"{where}: fields.{number}", problem, "rename it in the data")
    for key, template in (("template", task.template), ("text", task.text)):
        _check_placeholders(task, f"{where}: {key}", template)
    for number, word in enumerate(task.label_words):
        if not word or word in task.label_words[:number]:
            found = f"{shown(word)} comes twice" if word else "is empty"
            raise TaskError(f"{where}: label_words.{number}", found, "give each class a word of its own")
    if task.label_field in task.fields:
        problem = f"{shown(task.label_field)} is one of the fields too"
        raise TaskError(f"{where}: label_field", problem, "a field is text, and a label is an integer: give it its key")
    size = len(task.encode())
    if size > MOST_BYTES:
        problem = f"takes {size:,} bytes, more than {MOST_BYTES:,}"
        raise TaskError(where, problem, "shorten its label words and descriptions: it is sent to every node")


def _check_placeholders(task: Task, where: str, template: str) -> None:
    used, use = set(_named(template)), f"use {{field}} of {', '.join(map(cut, task.fields))}"
    if (doubled := _DOUBLED.search(template)) is not None:
        problem = f"has {cut(doubled[0])}"
        raise TaskError(where, problem, "a field stands between single braces, and any other brace for itself")
    if "" in used:
        raise TaskError(where, "uses braces without a name", use)
    if not used & set(task.fields):
        raise TaskError(where, f"uses {', '.join(map(cut, sorted(used))) or 'no field at all'}", use)
    if unknown := sorted(used - set(task.fields)):
        raise TaskError(where, f"uses {', '.join(map(cut, unknown))}", use)


def _named(template: str) -> list[str]:
    """What stands between braces as a name does: in one line, without quotes or semicolons."""
    return _NAME.findall(template)


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Put a row's fields into a template; braces around anything else stay as they are: a task's are checked before."""
    return _PLACEHOLDER.sub(lambda match: str(row[match[1]]) if match[1] in row else match[0], template)
