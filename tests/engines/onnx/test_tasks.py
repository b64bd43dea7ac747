"""Tasks of options and of texts to be learned, without PyTorch: what PyTorch makes of them, chats and windows too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.directions import direction
from meerkat_mq.core.step import Row, projected_gradient
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import completion_of, make_engine
from meerkat_mq.errors import ModelError, ModelMismatch, TaskError
from meerkat_mq.tasks.choice import Choice
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.tasks.task import Task
from tests.engines import tiny
from tests.engines.onnx.conftest import Bundled
from tests.engines.onnx.test_engine import CLOSE, both, losses, moved
from tests.engines.test_continuations import ANSWERS, CHAT, COMPLETION, LINES, TEXT

CHOICE = Choice(name="what", fields=("line",), template="{line} The thing is", options=("options",), max_tokens=48)
CHOICES: list[Row] = [
    {"line": tiny.TEXTS[0], "options": ["broken", "running", "on"], "label": 0},
    {"line": "A fan.", "options": ["broken when the farmer came", "q"], "label": 1},
    {"line": tiny.TEXTS[7], "options": ["red", "running on Monday"], "label": 0},
]
RULED = CHAT.model_copy(update={"system": "Say what the thing is."})
TASKS: dict[str, tuple[Task, list[Row]]] = {
    "choice": (CHOICE, CHOICES),
    "completion": (COMPLETION, ANSWERS),
    "chat": (CHAT, ANSWERS),
    "chat with rules": (RULED, ANSWERS),
    "text": (TEXT, LINES),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("family", "weights"), [("llama-chat", "int8"), ("gemma2-chat", "float32")])
def test_losses_and_figures_of_pytorch(bundled: Bundled, family: str, weights: str, name: str) -> None:
    made = bundled(family, weights)
    task, rows = TASKS[name]
    ours, theirs = both(made, task)
    for theta in (made[2].theta_0, moved(made[2])):
        found, wanted = losses(ours, theta, rows), losses(theirs, theta, rows)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)
    figures = [evaluate(engine, rows, 2, task.evaluation).figures for engine in (ours, theirs)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=CLOSE)


def test_projected_gradients_of_texts_agree(bundled: Bundled) -> None:
    made = bundled("llama-chat", "int8")
    engines = both(made, COMPLETION)
    size = made[2].size
    found = [
        [
            projected_gradient(engine, made[2].theta_0, direction("mk1", seed, 0, size), 1e-2, engine.prepare(ANSWERS))[
                0
            ]
            for seed in range(10)
        ]
        for engine in engines
    ]
    assert np.corrcoef(found[0], found[1])[0][1] > 0.9999


def test_the_vocabulary_in_pieces_is_the_whole(bundled: Bundled, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundled("llama-chat", "int8")
    ours, _ = both(made, COMPLETION)
    whole = ours.scored(ours.prepare(ANSWERS))
    monkeypatch.setattr("meerkat_mq.engines.onnx.scoring._LOGITS", 7)
    parts = ours.scored(ours.prepare(ANSWERS))
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(parts.first, whole.first)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)


def test_a_long_text_is_cut_into_the_same_windows(bundled: Bundled) -> None:
    made = bundled("llama-chat", "int8")
    ours, theirs = both(made, TEXT.with_limit(16))
    rows: list[Row] = [FileRow({"text": " ".join(tiny.TEXTS[:3]) + " é ü — 漢字"}, "notes.jsonl:1")]
    found = ours.usable(rows)
    assert len(found) > 3
    assert found == theirs.usable(rows)
    theta = moved(made[2])
    np.testing.assert_allclose(losses(ours, theta, found), losses(theirs, theta, found), rtol=0, atol=CLOSE)


def test_a_bundle_says_what_stands_around_completions(bundled: Bundled) -> None:
    base, bundle, mask = bundled("llama-chat", "int8")
    for task in (COMPLETION, CHAT, RULED):
        by_bundle, by_base = completion_of("onnx", str(bundle), task), completion_of("transformers", str(base), task)
        assert by_bundle == by_base is not None
        make_engine("onnx", Setup(mask, task, str(bundle), completion=by_base), "a test")
    assert completion_of("onnx", str(bundle), CHOICE) is None
    with pytest.raises(ModelMismatch, match=r"bundle: another chat template: fingerprint .*, or a bundle"):
        make_engine("onnx", Setup(mask, CHAT, str(bundle), completion=bytes(32)), "a test")


def test_chats_that_a_bundle_does_not_know(bundled: Bundled, tmp_path: Path) -> None:
    made = bundled("llama-chat", "int8")
    with pytest.raises(TaskError, match=r"chat: .*no white space may stand around the system message\); leave system"):
        both(made, CHAT.model_copy(update={"system": "Be brief. "}))
    with pytest.raises(TaskError, match="the model's tokenizer has no chat template"):
        both(bundled("llama", "int8"), CHAT)
    folder = Path(shutil.copytree(made[1], tmp_path / "bundle"))

    def changed(change: Callable[[dict[str, Any]], Any]) -> tuple[Path, Path, Any]:
        table = json.loads((made[1] / "bundle.json").read_text())
        change(table)
        (folder / "bundle.json").write_text(json.dumps(table))
        return made[0], folder, made[2]

    ruleless = changed(lambda table: table.update(chat_with_system=None))
    both(ruleless, CHAT)
    with pytest.raises(TaskError, match="it takes no chat with a system message"):
        both(ruleless, RULED)
    with pytest.raises(TaskError, match="does not say each message once"):
        both(changed(lambda table: table["chat"].update(asked="nothing")), CHAT)
    with pytest.raises(ModelError, match=r"bundle\.json: is of format 1, not 2; make the bundle again"):
        both(changed(lambda table: table.update(format=1)), CHAT)


def test_texts_to_be_learned_are_not_for_an_encoder(bundled: Bundled) -> None:
    with pytest.raises(TaskError, match="a completion task says nothing that an encoder can compare; give a causal"):
        both(bundled("bert"), COMPLETION)
