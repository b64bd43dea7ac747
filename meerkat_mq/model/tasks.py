"""Built-in tasks and tasks from a TOML file. No torch."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meerkat_mq.config import check_config
from meerkat_mq.errors import ConfigError, TaskError
from meerkat_mq.wire.descriptor import Task

_PLACEHOLDER = re.compile(r"\{(\w+)\}")

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
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(name, f"cannot be read ({error.strerror})", "give the path of a task's TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(name, f"is not TOML ({error})", "see docs/tasks.md") from error
    try:
        task = check_config(_with_defaults(table, path.stem), Task, where=name)
    except ConfigError as error:
        raise TaskError(error.where, error.problem, error.remedy) from error
    _check_placeholders(task, name)
    return task


def _with_defaults(table: dict[str, Any], stem: str) -> dict[str, Any]:
    template, words = table.get("template"), table.get("label_words")
    defaults: dict[str, Any] = {"name": stem}
    if isinstance(template, str):
        defaults["fields"] = list(dict.fromkeys(_PLACEHOLDER.findall(template)))
    fields = table.get("fields", defaults.get("fields"))
    if isinstance(fields, list):
        defaults["text"] = " ".join(f"{{{field}}}" for field in fields)
    if isinstance(words, list):
        defaults["descriptions"] = [word.strip() if isinstance(word, str) else word for word in words]
    return defaults | table


def _check_placeholders(task: Task, where: str) -> None:
    for key, template in (("template", task.template), ("text", task.text)):
        used = set(_PLACEHOLDER.findall(template))
        if not used or not used <= set(task.fields):
            unknown = ", ".join(sorted(used - set(task.fields))) or "no field at all"
            raise TaskError(f"{where}: {key}", f"uses {unknown}", f"use {{field}} of {', '.join(task.fields)}")


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Put a row's fields into a template; braces around anything else stay as they are."""
    return _PLACEHOLDER.sub(lambda match: str(row[match[1]]) if match[1] in row else match[0], template)
