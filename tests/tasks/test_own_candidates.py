"""Choice, completion and text: their files, rows and figures; and labels that are words."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.demo.corpus import TASK
from meerkat_mq.errors import BadValue, DataError, TaskError
from meerkat_mq.tasks.choice import Choice
from meerkat_mq.tasks.classification import TASKS, Classification
from meerkat_mq.tasks.completion import Completion
from meerkat_mq.tasks.data import class_counts, partition, read_rows
from meerkat_mq.tasks.load import KINDS, load_task, task_of
from meerkat_mq.tasks.task import Evaluation, Scored, classified, continued
from meerkat_mq.tasks.template import MOST_FILLED, fill
from meerkat_mq.tasks.text import Text
from meerkat_mq.wire.descriptor import TaskDescription, decode_control

CHOICE = 'kind = "choice"\ntemplate = "Question: {question}\\nAnswer:"\noptions = "endings"\n'
COPA = 'kind = "choice"\ntemplate = "{premise} So"\noptions = ["choice1", "choice2"]\n'
COMPLETION = 'kind = "completion"\ntemplate = "{instruction}\\nCommand:"\ncompletion = " {command}"\n'
TEXT = 'kind = "text"\n'
WORDS = 'template = "{subject} is"\nlabel_words = [" bad", " good"]\nlabels = ["neg", "pos"]\n'
FILES = [CHOICE, COPA, COMPLETION, COMPLETION + 'chat = true\nsystem = "Be brief."\n', TEXT, WORDS]


def made(folder: Path, toml: str) -> Any:
    (folder / "t.toml").write_text(toml)
    return load_task(folder / "t.toml")


def rows(folder: Path, task: Any, content: str, name: str = "d.jsonl") -> list[Any]:
    (folder / name).write_text(content)
    return read_rows(folder / name, task)


# --- files, descriptors ---


SENT = {  # the first bytes of SHA-256 of what release 1 wrote into run descriptors
    "sst2": "d66c4fb8707a3060",
    "agnews": "143404ded335224e",
    "yelp": "96eb2a9fbc1ad30a",
    "boolq": "cee176fd6156dbe6",
    "rte": "d31fdd7d030eba3c",
    "wsc": "53f15de2e854f99a",
    "wic": "6c0fa993b91265a4",
    "field-triage": "291ba9f09779fe44",
}


def test_what_travelled_before_travels_as_before() -> None:
    tasks = [*TASKS.values(), TASK]
    assert {task.name: hashlib.sha256(task.describe().encode()).hexdigest()[:16] for task in tasks} == SENT


@pytest.mark.parametrize("toml", FILES)
def test_a_task_comes_back_from_a_descriptor(tmp_path: Path, toml: str) -> None:
    task = made(tmp_path, toml)
    sent = task.describe().encode()
    assert b"null" not in sent
    assert task_of(decode_control(sent, TaskDescription)) == task


def test_kinds_by_name() -> None:
    assert {"classification": Classification, "choice": Choice, "completion": Completion, "text": Text} == KINDS


def test_defaults(tmp_path: Path) -> None:
    choice, completion, text = made(tmp_path, CHOICE), made(tmp_path, COMPLETION), made(tmp_path, TEXT)
    assert (choice.name, choice.fields, choice.options, choice.option) == (
        "t",
        ("question",),
        ("endings",),
        " {option}",
    )
    assert (completion.fields, completion.chat) == (("instruction", "command"), False)
    assert (text.field, text.max_tokens) == ("text", 256)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (CHOICE.replace('options = "endings"\n', ""), "t.toml: options: is missing"),
        (CHOICE + 'option = "x"', "t.toml: option: uses no field at all; use {field} of option"),
        (CHOICE + 'option = "{other}"', "t.toml: option: uses other; use {field} of option"),
        (CHOICE + 'label_field = "endings"', "t.toml: options: 'endings' is named twice"),
        (COPA.replace('"choice2"', '"premise"'), "t.toml: options: 'premise' is named twice"),
        (CHOICE + 'labels = ["A", "A"]', "t.toml: labels: a word comes twice"),
        (CHOICE + "max_tokens = 9000", "t.toml: max_tokens: "),
        (COMPLETION + 'system = "x"', "t.toml: file: system needs chat = true"),
        (COMPLETION + 'label_words = ["x"]', "t.toml: label_words: is unknown"),
        (COMPLETION.replace("{command}", "it"), "t.toml: completion: uses no field at all"),
        (COMPLETION.replace("{command}", "{{command}}"), "t.toml: completion: has {{command}}"),
        (TEXT + 'field = ""', "t.toml: field: "),
        (WORDS.replace('"pos"', '"pos", "mid"'), "2 label_words but 3 labels"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        made(tmp_path, toml)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("description", "place"),
    [
        ({"kind": "choice", "fields": ["q"], "template": "{q}", "options": ["o"] * 65}, "options"),
        ({"kind": "choice", "fields": ["q"], "template": "{q}", "options": []}, "options"),
        ({"kind": "completion", "fields": ["q"], "template": "{q}" * 2000, "completion": "{q}"}, "template"),
        ({"kind": "completion", "fields": ["q"], "template": "{q}", "completion": "{q}", "chat": "yes"}, "chat"),
        ({"kind": "completion", "fields": ["q"], "template": "{q}", "completion": "q", "system": "s" * 5000}, "system"),
        ({"kind": "completion", "fields": ["q"] * 17, "template": "{q}", "completion": "{q}"}, "fields"),
        ({"kind": "text", "max_tokens": 10**9}, "max_tokens"),
        ({"kind": "text", "max_tokens": 4}, "max_tokens"),
        ({"kind": "text", "loss": "mine"}, "loss"),
    ],
)
def test_a_hostile_task_is_refused(description: dict[str, Any], place: str) -> None:
    with pytest.raises(BadValue, match=rf"^RunDescriptor\.task\.{place}"):
        task_of(TaskDescription.model_validate({"name": "x"} | description))


def test_a_template_does_not_multiply_a_long_field() -> None:
    with pytest.raises(DataError, match="a row: fills its task's template with 20,00"):
        fill("{a}" * 1000, {"a": "x" * 20_000})
    assert len(fill("{a}" * 100, {"a": "x" * (MOST_FILLED // 200)})) == 100 * (MOST_FILLED // 200)


# --- rows ---


def test_choice_rows(tmp_path: Path) -> None:
    task = made(tmp_path, CHOICE + 'labels = ["A", "B", "C"]')
    (row,) = rows(tmp_path, task, '{"question": "Who", "endings": ["a", "b"], "label": "B"}')
    example = task.example(row)
    assert (example.prompt, example.candidates, example.answer) == ("Question: Who\nAnswer:", (" a", " b"), 1)
    assert task.as_text(row) == "Question: Who\nAnswer: b"
    assert (task.class_of(row), class_counts([row], task)) == (0, [])


def test_choice_rows_of_a_table(tmp_path: Path) -> None:
    task = made(tmp_path, COPA)
    (row,) = rows(tmp_path, task, "premise,choice1,choice2,label\nIt rained,it was wet,it was dry,0\n", "d.csv")
    assert task.example(row).candidates == (" it was wet", " it was dry")
    assert task.example(row).answer == 0


def with_endings(endings: str, label: str = "0") -> str:
    return f'{{"question": "Who", "endings": {endings}, "label": {label}}}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Who", "label": 0}', r"d\.jsonl:1: field 'endings' is missing; give a list of 2 to 64 texts"),
        (with_endings('"a"'), r"d\.jsonl:1: field 'endings' is 'a'; give a list"),
        (with_endings('["a"]'), r"d\.jsonl:1: field 'endings' is \['a'\]; give a list"),
        (with_endings(str(["a"] * 65).replace("'", '"')), r"d\.jsonl:1: field 'endings' is \['a', .*; give a list"),
        (with_endings('["a", 3]'), r"d\.jsonl:1: field 'endings' is 3, not text"),
        (with_endings('["a", "\\ud83d"]'), r"d\.jsonl:1: field 'endings' holds \\ud83d, half a character"),
        (with_endings('["a", "%s", "%s"]' % (("x" * 700_000,) * 2)), r"d\.jsonl:1: its options have more than"),
        (with_endings('["a", "b"]', "2"), r"d\.jsonl:1: 'label' is 2; the row has labels 0 to 1"),
        (with_endings('["a", "b"]', "true"), r"d\.jsonl:1: 'label' is True; the row has labels 0 to 1"),
        (with_endings('["a", "b"]', '"A"'), r"d\.jsonl:1: 'label' is 'A'; the row has labels 0 to 1"),
    ],
)  # fmt: skip
def test_choice_rows_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        rows(tmp_path, made(tmp_path, CHOICE), line)
    assert str(caught.value).isprintable()


def test_completion_and_text_rows(tmp_path: Path) -> None:
    task = made(tmp_path, COMPLETION)
    (row,) = rows(tmp_path, task, '{"instruction": "List files", "command": "ls"}')
    assert task.example(row).prompt == "List files\nCommand:"
    assert task.example(row).candidates == (" ls",)
    assert task.as_text(row) == "List files\nCommand: ls"
    for line in ('{"instruction": "List files", "command": "  "}', '{"instruction": "List files"}'):
        with pytest.raises(DataError, match=r"d\.jsonl:1: (has an empty completion|field 'command' is missing)"):
            rows(tmp_path, task, line)
    text = made(tmp_path, TEXT)
    assert text.as_text(rows(tmp_path, text, '{"text": "a line"}')[0]) == "a line"
    with pytest.raises(DataError, match=r"d\.jsonl:1: field 'text' is empty"):
        rows(tmp_path, text, '{"text": " "}')


def test_a_long_text_makes_rows_of_its_place(tmp_path: Path) -> None:
    text = made(tmp_path, TEXT)
    (row,) = rows(tmp_path, text, '{"text": "one two", "system": "a"}')
    parts = text.windows(row, lambda found: [*found.partition(" ")])
    assert parts == [{"text": "one", "system": "a"}, {"text": "two", "system": "a"}]
    assert {part.where for part in parts} == {row.where}
    assert text.windows(row, lambda found: [found])[0] is row


@pytest.mark.parametrize("toml", FILES)
def test_a_row_made_of_a_text_is_one(tmp_path: Path, toml: str) -> None:
    task = made(tmp_path, toml)
    for number in range(3):
        example = task.example(task.row_of("a text", number))
        assert 0 <= example.answer < len(example.candidates)
        assert len(set(example.candidates)) == len(example.candidates)


# --- labels that are words ---


def test_labels_that_are_words(tmp_path: Path) -> None:
    task = made(tmp_path, WORDS)
    found = rows(tmp_path, task, '{"subject": "a", "label": "pos"}\n{"subject": "b", "label": "neg"}\n')
    assert [task.class_of(row) for row in found] == [1, 0]
    assert [task.example(row).answer for row in found] == [1, 0]
    assert class_counts(found, task) == [1, 1]
    assert partition(found, 2, "one-label", seed=0, class_of=task.class_of) == [[found[1]], [found[0]]]
    numbers = made(tmp_path, WORDS.replace('["neg", "pos"]', '["1", "0"]'))
    (row,) = rows(tmp_path, numbers, "subject,label\na,1\n", "d.csv")
    assert numbers.class_of(row) == 0


@pytest.mark.parametrize("label", ["1", '"positive"', '"POS"', "null", "true"])
def test_a_label_that_is_none_of_the_words(tmp_path: Path, label: str) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:1: 'label' is .*; task t has labels neg, pos"):
        rows(tmp_path, made(tmp_path, WORDS), f'{{"subject": "a", "label": {label}}}')


# --- figures ---


def test_figures_of_classes() -> None:
    truth = np.array([0, 0, 0, 1, 1, 3])
    best = np.array([0, 0, 1, 1, 0, 2])
    scores = np.full((6, 4), -2, np.float32)
    scores[np.arange(6), best] = 1
    found = classified(scores, truth)
    assert found.recalls == (2 / 3, 1 / 2, None, 0.0)
    assert found.figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found.figures["macro_f1"] == pytest.approx((2 * 2 / (3 + 3) + 2 * 1 / (2 + 2) + 0) / 3)
    assert found.figures["accuracy"] == 0.5


def texts(losses: list[float], tokens: list[int], first: list[int]) -> Scored:
    scores = -np.array(losses, np.float32)[:, None]
    return Scored(scores, np.zeros(len(losses), np.int64), np.array(tokens), np.array(first))


def test_figures_of_texts() -> None:
    found = continued(texts([1.0, 4.0], [3, 1], [3, 0]), whole=True)
    assert found == Evaluation(
        2, {"loss": 2.5, "perplexity": math.exp(7 / 4), "token_accuracy": 0.75, "exact_match": 0.5}
    )
    assert "exact_match" not in continued(texts([1.0], [3], [3]), whole=False).figures


def test_figures_of_a_broken_model_are_numbers() -> None:
    assert math.isnan(continued(texts([math.nan], [1], [0]), whole=True).figures["perplexity"])
    assert math.isfinite(continued(texts([1e9], [1], [0]), whole=True).figures["perplexity"])


def test_choice_counts_places_and_has_no_classes(tmp_path: Path) -> None:
    scores = np.array([[0, 1, -np.inf], [2, 1, 3]], np.float32)
    found = made(tmp_path, CHOICE).evaluation(Scored(scores, np.array([1, 0])))
    assert (found.accuracy, found.recalls) == (0.5, ())
    assert math.isfinite(found.loss)
