"""Rows that pass reading and fail later: refused when read; whatever still fails, the run goes on without it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row, local_steps
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.prompts import Prompt
from meerkat_mq.engines.torch.calibration import calibration_batches
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.errors import DataError
from meerkat_mq.tasks.classification import TASKS
from meerkat_mq.tasks.data import read_rows, read_texts, usable_rows, write_rows
from meerkat_mq.tasks.task import Example
from tests.engines import tiny

SST2 = TASKS["sst2"]
GOOD = '{"sentence": "fine", "label": 1}\n'
Make = Callable[..., TransformersEngine]


class PanicException(BaseException):
    """As Rust's tokenizers raise it: no Exception."""


def tokenizer_fails_on(engine: TransformersEngine, word: str) -> None:
    """As a tokenizer that raises something of its own for texts with a word in them."""
    tokens = engine.scorer.tokens

    def failing(examples: Sequence[Example]) -> list[Prompt]:
        if any(word in example.text for example in examples):
            raise PanicException("index out of bounds\nat lib.rs:1")
        return tokens(examples)

    engine.scorer.tokens = failing  # type: ignore[method-assign]


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    write_rows(tmp_path / "d.jsonl", [*tiny.ROWS[:6], {"line": "a poison pill", "label": 0}, *tiny.ROWS[6:9]])
    return read_rows(tmp_path / "d.jsonl", tiny.TASK)


# --- refused when they are read ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", GOOD + '{"sentence": "loved it \\ud83d so much", "label": 1}\n'),
        ("d.jsonl", GOOD + '{"sentence": "\\udc00", "label": 1}\n'),
        ("d.jsonl", GOOD + '{"sentence": "\\ude00\\ud83d", "label": 1}\n'),
    ],
)
def test_half_a_character_is_refused_by_file_and_line(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(
        DataError, match=r"d\.jsonl:2: field 'sentence' holds \\ud\w{3}, half a character, at position \d+; mend or"
    ) as caught:
        read_rows(tmp_path / name, SST2)
    assert str(caught.value).isprintable()
    with pytest.raises(DataError, match=r"d\.jsonl:2: field 'sentence' holds"):
        read_texts(tmp_path / name, "sentence")


def test_whole_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"sentence": "\\ud83d\\ude00", "label": 1}\n')
    assert read_rows(tmp_path / "d.jsonl", SST2) == [{"sentence": "\U0001f600", "label": 1}]


def test_a_field_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(GOOD + '{"sentence": "%s", "label": 1}\n' % ("x" * (2**20 + 1)))
    with pytest.raises(DataError, match=r"d\.jsonl:2: field 'sentence' has 1,048,577 characters, more than 1,048,576"):
        read_rows(tmp_path / "d.jsonl", SST2)


def test_fields_that_no_task_reads_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"sentence": "fine", "label": 1, "note\\ud83d": "\\ud83d"}\n')
    found = read_rows(tmp_path / "d.jsonl", SST2)
    write_rows(tmp_path / "e.jsonl", found)
    assert read_rows(tmp_path / "e.jsonl", SST2) == found == [{"sentence": "fine", "label": 1, "note\ud83d": "\ud83d"}]


# --- and those that fail all the same ---


def test_usable_rows_are_counted_and_named(rows: list[Row]) -> None:
    def prepare(part: Sequence[Row]) -> None:
        assert not any("poison" in row["line"] for row in part), "first\nsecond"

    with capture_logs() as logs:
        kept = usable_rows(rows * 12, prepare)
    assert len(kept) == 9 * 12
    assert [line["event"] for line in logs] == ["row left out: it cannot be prepared"] * 10 + ["rows left out"]
    assert logs[0]["row"].endswith("d.jsonl:7")
    assert logs[0]["problem"] == "AssertionError: first"
    assert (logs[-1]["count"], logs[-1]["of"]) == (12, 120)


def test_where_all_rows_fail_the_first_is_named(rows: list[Row]) -> None:
    def prepare(part: Sequence[Row]) -> None:
        raise KeyError("never")

    with pytest.raises(
        DataError, match=r"d\.jsonl:1: cannot be prepared \(KeyError: 'never'\), nor can any other of 10 rows; give"
    ):
        usable_rows(rows, prepare)
    assert usable_rows([], prepare) == []


def test_a_signal_is_no_fault_of_a_row(rows: list[Row]) -> None:
    def prepare(part: Sequence[Row]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        usable_rows(rows, prepare)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_batch_goes_on_without_a_row_that_fails(
    engine: Make, masks: dict[str, Mask], name: str, rows: list[Row]
) -> None:
    made, theta = engine(name), masks[name].theta_0
    good = [row for row in rows if "poison" not in row["line"]]
    expected = local_steps(made, theta, [1, 2], [good, good], stream="mk1", eps=1e-3, lr=1e-3)
    tokenizer_fails_on(made, "poison")
    with capture_logs() as logs:
        found = local_steps(made, theta, [1, 2], [rows, rows], stream="mk1", eps=1e-3, lr=1e-3)
    assert found == expected
    assert all(line["row"].endswith("d.jsonl:7") for line in logs)
    assert len(logs) == 2
    made.write(theta)
    assert evaluate(made, rows, 5).rows == 9
    with pytest.raises(
        DataError, match=r"d\.jsonl:7: cannot be prepared \(PanicException: index out of bounds\), nor can"
    ):
        made.prepare(rows[6:7])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mask_is_scored_without_a_text_that_fails(load: Any, name: str) -> None:
    loaded, texts = load(name), [str(row["line"]) for row in tiny.ROWS[:8]]
    with capture_logs() as logs:
        found = calibration_batches(loaded, [*texts, "half \ud83d one"], seed=0, sequences=99, length=16, batch_size=99)
    assert len(found) == 1
    assert [line["event"] for line in logs] == ["text left out: it cannot be tokenised"]
