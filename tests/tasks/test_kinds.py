"""A new kind of task is one class: two are made here, and everything else works with them as it is."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.directions import direction
from meerkat_mq.core.step import Row, projected_gradient
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import BadValue, TaskError
from meerkat_mq.runtime.join import check_descriptor
from meerkat_mq.server.run import prepare_run
from meerkat_mq.tasks import load
from meerkat_mq.tasks.data import read_rows
from meerkat_mq.tasks.load import load_task, task_of
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.tasks.task import Continuation, Cut, Evaluation, Example, Scored, classified
from meerkat_mq.wire.descriptor import RunDescriptor, TaskDescription, decode_control
from tests.engines import tiny


class Quiz(BaseModel):
    """Each row has candidates of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "quiz"
    candidates_key: ClassVar[str] = "options"

    name: str
    max_tokens: int = 48
    columns: ClassVar[tuple[str, ...]] = ("question", "options", "right")
    integers: ClassVar[str | None] = "right"
    classes: ClassVar[tuple[str, ...]] = ()
    candidates: ClassVar[tuple[str, ...]] = ()
    ending: ClassVar[str] = "?"
    descriptions: ClassVar[tuple[str, ...]] = ()
    scale: ClassVar[float] = 1.0

    @classmethod
    def from_table(cls, table: dict[str, Any], stem: str, where: str) -> Self:
        return cls.model_validate({"name": stem} | table)

    def checked(self, row: FileRow) -> Row:
        return row

    def class_of(self, row: Row) -> int:
        return 0

    def as_text(self, row: Row) -> str:
        return str(row["question"])

    @property
    def text_settings(self) -> Mapping[str, Any]:
        return {}

    @property
    def continuation(self) -> Continuation | None:
        return None

    def windows(self, row: Row, cut: Cut) -> Sequence[Row]:
        return [row]

    def with_limit(self, max_tokens: int) -> Self:
        return self.model_copy(update={"max_tokens": max_tokens})

    def row_of(self, text: str, number: int) -> Row:
        return {"question": text, "options": [" one", " two"], "right": number % 2}

    def example(self, row: Row) -> Example:
        return Example(f"{row['question']}?", tuple(row["options"]), row["right"], row["question"])

    def evaluation(self, found: Scored) -> Evaluation:
        return classified(found.scores, found.truth)

    def describe(self) -> TaskDescription:
        return TaskDescription(kind=self.kind, **self.model_dump())  # type: ignore[call-arg]


class Echo(Quiz):
    """Each row has one candidate: the text that is to follow."""

    kind: ClassVar[str] = "echo"

    def evaluation(self, found: Scored) -> Evaluation:
        loss = float(-found.scores.mean(dtype=np.float64))
        return Evaluation(len(found.truth), {"loss": loss, "perplexity": math.exp(loss)})


QUIZ = [
    {"question": "The pump is", "options": [" broken", " running", " running slowly at night"], "right": 2},
    {"question": "When the farmer came back on Monday the fan was", "options": [" red", " green and blue"], "right": 0},
    {"question": "Who", "options": [" the driver", " the", " the plumber", " q"], "right": 3},
]
ECHO = [{**row, "options": [row["options"][row["right"]]], "right": 0} for row in QUIZ]  # type: ignore[index]


@pytest.fixture(autouse=True)
def _two_more_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "KINDS", {**load.KINDS, "quiz": Quiz, "echo": Echo})


def plain_score(engine: TransformersEngine, prompt: str, word: str) -> float:
    """Mean log-probability of the word's tokens after the prompt, in a pass of their own."""
    tokenizer, model = engine.loaded.tokenizer, engine.loaded.model
    start, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + word)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    found = [logits[position - 1, whole[position]].item() for position in range(len(start), len(whole))]
    return float(sum(found) / len(found))


Make = Callable[[Quiz], TransformersEngine]


@pytest.fixture
def make(tiny_llama: Path) -> Make:
    def made(task: Quiz) -> TransformersEngine:
        loaded = load_model(tiny_llama)
        mask = make_mask(loaded, tiny.TEXTS, "magnitude", density=0.1, sequences=4, length=32)
        return TransformersEngine(loaded, mask, task)

    return made


def test_rows_with_candidates_of_their_own(make: Make) -> None:
    engine = make(Quiz(name="pumps"))
    scores, truth = engine.scores(engine.prepare(QUIZ))
    assert (scores.shape, truth.tolist()) == ((3, 4), [2, 0, 3])
    for row, found in zip(QUIZ, scores, strict=True):
        options: Any = row["options"]
        expected = [plain_score(engine, f"{row['question']}?", option) for option in options]
        np.testing.assert_allclose(found[: len(options)], expected, rtol=0, atol=2e-5)
        assert np.isneginf(found[len(options) :]).all()
    evaluation = evaluate(engine, QUIZ, batch_size=2, figures=Quiz(name="pumps").evaluation)
    assert evaluation.accuracy == np.mean(scores.argmax(axis=1) == truth)
    assert evaluation.loss == pytest.approx(float(np.mean(engine.losses(engine.prepare(QUIZ)))), rel=1e-5)


def test_a_single_candidate_is_a_text_to_be_learned(make: Make) -> None:
    engine = make(Echo(name="pumps"))
    batch = engine.prepare(ECHO)
    options: list[Any] = [row["options"] for row in ECHO]
    expected = [
        -plain_score(engine, f"{row['question']}?", option) for row, (option,) in zip(ECHO, options, strict=True)
    ]
    np.testing.assert_allclose(engine.losses(batch), expected, rtol=0, atol=2e-5)
    gradient, loss = engine.gradient(batch)
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    mask = make_mask(engine.loaded, tiny.TEXTS, "magnitude", density=0.1, sequences=4, length=32)
    z = direction("mk1", 1, 0, mask.size)
    slope, _ = projected_gradient(engine, mask.theta_0, z, 1e-3, batch)
    assert slope == pytest.approx(float(gradient @ z), rel=0.02)
    engine.write(mask.theta_0)
    evaluation = evaluate(engine, ECHO, figures=Echo(name="pumps").evaluation)
    assert evaluation.figures["perplexity"] == pytest.approx(math.exp(float(np.mean(expected))), rel=1e-4)


def test_from_its_file_through_a_descriptor_to_a_node(tmp_path: Path, make: Make) -> None:
    (tmp_path / "pumps.toml").write_text('kind = "quiz"\nmax_tokens = 40\n')
    make_mask(make(Quiz(name="x")).loaded, tiny.TEXTS, "magnitude", density=0.1, sequences=4, length=32).save(
        tmp_path / "mask.mkm"
    )
    config = ServerConfig(
        federation="f", state_dir=tmp_path, mask=tmp_path / "mask.mkm", task=str(tmp_path / "pumps.toml")
    )
    sent = prepare_run(config).descriptor.encode()
    assert b'"task":{"name":"pumps","kind":"quiz","max_tokens":40}' in sent
    run = decode_control(sent, RunDescriptor)
    check_descriptor(run, "f")
    assert run.task is not None
    assert task_of(run.task) == Quiz(name="pumps", max_tokens=40)
    (tmp_path / "rows.json").write_text('[{"question": "Who", "options": [" a", " b"], "right": 1}]')
    assert read_rows(tmp_path / "rows.json", task_of(run.task))[0]["right"] == 1


def test_kinds_that_this_version_does_not_have(tmp_path: Path) -> None:
    for kind in ('"essay"', "3", "[1]"):
        (tmp_path / "t.toml").write_text(f"kind = {kind}\n")
        with pytest.raises(TaskError, match=r"t.toml: kind: .* is unknown; use one of classification, .*, quiz"):
            load_task(tmp_path / "t.toml")
        description = TaskDescription.model_validate_json(f'{{"name": "x", "kind": {kind}}}')
        with pytest.raises(BadValue, match=r"^RunDescriptor.task.kind: .* is none that this version has$"):
            task_of(description)


def test_an_encoder_cannot_do_a_task_without_descriptions(tmp_path: Path) -> None:
    loaded = load_model(tiny.save(tiny.bert(), tmp_path / "bert"))
    mask = make_mask(loaded, tiny.TEXTS, "magnitude", density=0.1, sequences=4, length=32)
    with pytest.raises(TaskError, match=r"^task pumps: a quiz task says nothing that an encoder can compare"):
        TransformersEngine(loaded, mask, Quiz(name="pumps"))
