"""Texts to be learned: losses as the plain definition gives them, windows, chats, and what greedy decoding says."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from meerkat_mq.config import EvaluationConfig, ModelConfig, ServerConfig
from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row, projected_gradient
from meerkat_mq.engines.continuations import Continuations, check_completion, completion_fingerprint, pieces
from meerkat_mq.engines.evaluate import evaluate, first_order
from meerkat_mq.engines.torch import chat_template, head
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.engines.torch.scoring import scorer_for
from meerkat_mq.errors import DataError, ModelMismatch, TaskError
from meerkat_mq.server.monitor import Evaluator
from meerkat_mq.server.run import prepare_run
from meerkat_mq.tasks.choice import Choice
from meerkat_mq.tasks.completion import Completion
from meerkat_mq.tasks.data import read_rows, write_rows
from meerkat_mq.tasks.load import load_task
from meerkat_mq.tasks.sources import FileRow
from meerkat_mq.tasks.task import Example, Task
from meerkat_mq.tasks.text import Text
from tests.engines import tiny

Load = Callable[..., LoadedModel]
Make = Callable[..., TransformersEngine]

COMPLETION = Completion(
    name="answers", fields=("line", "answer"), template="{line} The thing is", completion=" {answer}", max_tokens=48
)
TEXT = Text(name="lines", max_tokens=48)
CHAT = COMPLETION.model_copy(update={"template": "{line}", "completion": "{answer}", "chat": True})
ANSWERS: list[Row] = [
    {"line": "The red pump in the cellar.", "answer": "broken when the farmer came"},
    {"line": "A fan.", "answer": "q"},
    {"line": "When the plumber came back the motor was running on Monday", "answer": "running"},
]
LINES: list[Row] = [{"text": text} for text in (tiny.TEXTS[0], "A fan.", tiny.TEXTS[7])]
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' and 'quiet' in messages[0]['content'] %}"
    "{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] | trim + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


@pytest.fixture
def chatting(folders: dict[str, Path], copy: Callable[[str], Path]) -> LoadedModel:
    folder = copy("llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_model(folder)


def plain(loaded: LoadedModel, prompt: list[int], followed: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens, at each place of what follows: (tokens, vocabulary)."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([[*prompt, *followed]])).logits[0].float()
    found: torch.Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return found


def ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def read(loaded: LoadedModel, task: Any, row: Row) -> tuple[list[int], list[int]]:
    """What is read and what is predicted, by the words of the documentation."""
    start, end = list(loaded.start), [loaded.tokenizer.eos_token_id]
    example = task.example(row)
    if isinstance(task, Completion):
        return [*start, *ids(loaded, example.prompt)], [*ids(loaded, example.candidates[0]), *end]
    text = [*start, *ids(loaded, row["text"])]
    return (text[:1], text[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("task", "rows"), [(COMPLETION, ANSWERS), (TEXT, LINES)], ids=["completion", "text"])
@pytest.mark.parametrize("size", [64, 3])
def test_losses_and_figures(
    engine: Make, monkeypatch: pytest.MonkeyPatch, name: str, task: Any, rows: list[Row], size: int
) -> None:
    monkeypatch.setattr(head, "SLICE", size)
    made = engine(name, task)
    found = made.losses(made.prepare(rows))
    losses, hits = list[float](), list[list[bool]]()
    for row in rows:
        prompt, followed = read(made.loaded, task, row)
        logs = plain(made.loaded, prompt, followed)
        losses.append(functional.nll_loss(logs, torch.tensor(followed)).item())
        hits.append((logs.argmax(-1) == torch.tensor(followed)).tolist())
    np.testing.assert_allclose(found, losses, rtol=0, atol=2e-5)
    figures = evaluate(made, rows, 2, task.evaluation).figures
    counts = [len(each) for each in hits]
    assert figures["loss"] == pytest.approx(np.mean(losses), abs=2e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(np.average(losses, weights=counts)), rel=1e-4)
    assert figures["token_accuracy"] == pytest.approx(sum(map(sum, hits)) / sum(counts))


@pytest.mark.parametrize("size", [64, 3])
def test_gradients_are_those_of_the_losses(
    engine: Make, masks: dict[str, Mask], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(head, "SLICE", size)
    for task, rows in ((COMPLETION, ANSWERS), (TEXT, LINES)):
        made, theta = engine("llama", task), masks["llama"].theta_0
        made.write(theta)
        gradient, loss = made.gradient(made.prepare(rows))
        assert loss == pytest.approx(float(np.mean(made.losses(made.prepare(rows)))), rel=1e-5)
        z = direction("mk1", 1, 0, theta.size)
        slope, _ = projected_gradient(made, theta, z, 1e-3, made.prepare(rows))
        assert slope == pytest.approx(float(gradient @ z), rel=0.05)


def greedy(loaded: LoadedModel, prompt: list[int], most: int) -> list[int]:
    """What the model says, token by token, up to its end token."""
    said: list[int] = []
    while len(said) < most and said[-1:] != [loaded.tokenizer.eos_token_id]:
        with torch.inference_mode():
            said.append(int(loaded.model(torch.tensor([[*prompt, *said]])).logits[0, -1].argmax()))
    return said


def test_exact_match_is_what_greedy_decoding_says(engine: Make, masks: dict[str, Mask]) -> None:
    """Trained until it says one of two answers by heart, and never the other, which begins likewise."""
    made, rows = engine("llama", COMPLETION), [ANSWERS[2], {"line": ANSWERS[2]["line"], "answer": "running at night"}]
    whole = make_mask(made.loaded, tiny.TEXTS, "dense", sequences=4, length=32)
    made = TransformersEngine(made.loaded, whole, COMPLETION)
    first_order(made, whole.theta_0, rows[:1], steps=60, lr=0.01, batch_size=1)
    exact = [evaluate(made, [row], figures=COMPLETION.evaluation).figures["exact_match"] for row in rows]
    expected = []
    for row in rows:
        prompt, followed = read(made.loaded, COMPLETION, row)
        expected.append(float(greedy(made.loaded, prompt, len(followed)) == followed))
    assert exact == expected == [1.0, 0.0]


# --- limits ---


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("limit", [8, 12, 30])
def test_limits_are_kept(load: Load, name: str, limit: int) -> None:
    loaded = load(name)
    for prompt, answer in (("x" * 90, "y" * 90), ("x", "y" * 90), ("x" * 90, "y"), ("x", "y")):
        task = COMPLETION.model_copy(update={"template": "{line}", "completion": "{answer}", "max_tokens": limit})
        texts = Continuations(loaded, task)
        first, second = texts.ids(task.example({"line": prompt, "answer": answer}))
        whole = [*loaded.start, *ids(loaded, prompt)], [*ids(loaded, answer), loaded.tokenizer.eos_token_id]
        assert len(first) + len(second) == min(limit, len(whole[0]) + len(whole[1]))
        assert second == whole[1][: len(second)]
        assert len(first) >= min(len(whole[0]), limit // 4)
        assert first[-1:] == whole[0][-1:]
        assert first[:1] == whole[0][:1]


def test_a_window_is_no_longer_than_the_limit_and_windows_are_the_text(load: Load) -> None:
    for name in ("llama", "gpt2"):
        loaded = load(name)
        for text in ("".join(tiny.TEXTS), "héllo wörld 😀😀 ok  two   spaces\n\n" * 4, "x", " "):
            for limit in (8, 9, 16, 64):
                parts = pieces(loaded, limit, text)
                assert "".join(parts) == text
                assert all(len(ids(loaded, part)) <= limit for part in parts)


def test_long_texts_become_rows(engine: Make) -> None:
    made = engine("llama", TEXT.model_copy(update={"max_tokens": 16}))
    rows = [FileRow({"text": "".join(tiny.TEXTS[:3])}, "d.jsonl:1"), FileRow({"text": "A fan."}, "d.jsonl:2")]
    found = made.usable(rows)
    assert len(found) == 6
    assert {row.where for row in found if isinstance(row, FileRow)} == {"d.jsonl:1", "d.jsonl:2"}
    assert "".join(row["text"] for row in found[:-1]) == rows[0]["text"]
    assert made.usable(found) == found
    batch = made.prepare(found)
    assert all(inputs.ids.shape[1] <= 16 for inputs in batch.passes)


def test_a_text_of_one_token_without_a_start_teaches_nothing(load: Load, engine: Make) -> None:
    texts = Continuations(load("gpt2"), TEXT)
    with pytest.raises(DataError, match="a row: has a single token, which nothing follows"):
        texts.ids(Example("", ("x",), 0, "x"))
    made = engine("gpt2", TEXT)
    assert made.usable([{"text": "x"}, *LINES]) == LINES


def test_an_encoder_can_do_none_of_them(load: Load) -> None:
    choice = Choice(name="x", fields=("q",), template="{q}", options=("a", "b"))
    for task in (COMPLETION, TEXT, choice):
        with pytest.raises(TaskError, match=rf"task {task.name}: a {task.kind} task says nothing that an encoder can"):
            scorer_for(load("bert"), task)


# --- chats ---


def test_a_chat_is_the_tokenizer_s_own(chatting: LoadedModel) -> None:
    for system in ("", "Be brief."):
        task = CHAT.model_copy(update={"system": system, "max_tokens": 64})
        row = {"line": "  {{ 7 }} {% x %} ", "answer": "ls"}
        messages = [{"role": "user", "content": row["line"]}, {"role": "assistant", "content": row["answer"]}]
        messages = [{"role": "system", "content": system}] * bool(system) + messages
        whole = chatting.tokenizer.apply_chat_template(messages, tokenize=False)
        asked = chatting.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        prompt, followed = Continuations(chatting, task).ids(task.example(row))
        assert prompt == ids(chatting, asked)
        assert [*prompt, *followed] == ids(chatting, whole.rstrip())
        assert followed[-1] == chatting.tokenizer.eos_token_id


def test_what_stands_around_a_completion_has_a_fingerprint(chatting: LoadedModel) -> None:
    tokenizer, ruled = chatting.tokenizer, CHAT.model_copy(update={"system": "Be short."})
    first, ends = (completion_fingerprint(tokenizer, task) for task in (CHAT, COMPLETION))
    assert None not in (first, ends)
    assert completion_fingerprint(tokenizer, TEXT) is completion_fingerprint(tokenizer, tiny.TASK) is None
    others = [ends, completion_fingerprint(tokenizer, ruled)]
    for template in (TEMPLATE.replace("</s>", "</s></s>"), TEMPLATE.replace("<assistant>", "<bot>")):
        tokenizer.chat_template = template
        others.append(completion_fingerprint(tokenizer, CHAT))
        assert completion_fingerprint(tokenizer, COMPLETION) == ends  # which no template decides
    assert len({first, *others}) == 1 + len(others)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<pad>"
    assert completion_fingerprint(tokenizer, CHAT) == first  # its template has an end of its own
    assert completion_fingerprint(tokenizer, COMPLETION) != ends


def test_another_template_or_end_token_is_refused(chatting: LoadedModel) -> None:
    tokenizer, folder = chatting.tokenizer, Path("base")
    chat, ends = (completion_fingerprint(tokenizer, task) for task in (CHAT, COMPLETION))
    for wanted in (chat, None):
        check_completion(folder, tokenizer, CHAT, wanted)
    with pytest.raises(ModelMismatch, match=r"^base: another end token: fingerprint \w{16}…, not \w{16}…; give the"):
        check_completion(folder, tokenizer, COMPLETION, chat)
    with pytest.raises(ModelMismatch, match=r"^base: another chat template: fingerprint "):
        check_completion(folder, tokenizer, CHAT, ends)


def test_a_long_message_keeps_its_frame(chatting: LoadedModel) -> None:
    least = int(_refused(chatting, CHAT.model_copy(update={"max_tokens": 8})).remedy.split()[3])
    with pytest.raises(TaskError):
        Continuations(chatting, CHAT.model_copy(update={"max_tokens": least - 1}))
    for limit in (least, least + 1, 60):
        task = CHAT.model_copy(update={"max_tokens": limit})
        prompt, followed = Continuations(chatting, task).ids(task.example({"line": "x" * 200, "answer": "y" * 200}))
        said = chatting.tokenizer.decode(prompt)
        assert len(prompt) + len(followed) == limit
        assert said.startswith("<user>\n")
        assert said.endswith("x</s>\n<assistant>\n")


def _refused(loaded: LoadedModel, task: Task) -> TaskError:
    with pytest.raises(TaskError) as caught:
        scorer_for(loaded, task)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "the model's tokenizer has no chat template; set chat = false"),
        ("{{ bro", "the tokenizer's chat template cannot be used"),
        ("{{ raise_exception('never') }}", r"the tokenizer's chat template cannot be used (never)"),
        ("hello", "the tokenizer's chat template does not say each message once"),
        ("{{ messages[0]['content'] * 3 }}", "the tokenizer's chat template does not say each message once"),
    ],
)
def test_chat_templates_that_cannot_be_used(load: Load, template: str, message: str) -> None:
    loaded = load("llama")
    loaded.tokenizer.chat_template = template
    error = _refused(loaded, CHAT)
    assert str(error).startswith("task answers: chat: ")
    assert message in str(error)


LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.mark.parametrize(
    "template",
    [LOOPS, TWICE, "{{ 'x' * 10**10 }}", "{{ [0] * 10**10 }}", "{{ '%10000000000d' % 1 }}", "{{ 'x' * 10**7 }}"],
    ids=["loops", "a macro", "a text", "a list", "a width", "a long text"],
)
def test_a_template_that_takes_for_ever_or_all_memory_is_refused_in_words(
    load: Load, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    loaded = load("llama")
    loaded.tokenizer.chat_template = template
    error = _refused(loaded, CHAT)
    assert error.problem.startswith("the tokenizer's chat template cannot be used (")
    assert re.search(r"more than 1 s or 512 MiB|10,000,000 characters|[Mm]emory", error.problem)


def test_a_template_is_rendered_once_in_a_process_of_its_own(
    chatting: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = completion_fingerprint(chatting.tokenizer, CHAT)
    monkeypatch.setattr("subprocess.run", pytest.fail)
    assert completion_fingerprint(chatting.tokenizer, CHAT) == before


def test_a_template_that_takes_no_system_message(chatting: LoadedModel) -> None:
    error = _refused(chatting, CHAT.model_copy(update={"system": "Be quiet."}))
    assert error.remedy == "leave system out, or set chat = false"


# --- on a server ---

WORDS = """
template = "{line} is"
label_words = [" a", " b", " c"]
labels = ["q", "running", "broken"]
label_field = "word"
"""


@pytest.mark.parametrize(
    ("toml", "rows", "figure"),
    [
        ('kind = "text"\nfield = "line"\nmax_tokens = 16\n', 4, "token_accuracy"),
        ('kind = "completion"\ntemplate = "{line}"\ncompletion = " {answer}"\nchat = true\n', 3, "exact_match"),
        (WORDS, 3, "macro_f1"),
    ],
)
async def test_a_server_evaluates_by_the_task_of_its_descriptor(
    chatting: LoadedModel, tmp_path: Path, toml: str, rows: int, figure: str
) -> None:
    (tmp_path / "t.toml").write_text(toml)
    write_rows(tmp_path / "rows.jsonl", [{**row, "word": row["answer"].split()[0]} for row in ANSWERS])
    mask = make_mask(chatting, tiny.TEXTS, "magnitude", density=0.1, sequences=4, length=32)
    mask.save(tmp_path / "mask.mkm")
    config = ServerConfig(
        federation="f",
        state_dir=tmp_path / "state",
        mask=tmp_path / "mask.mkm",
        task=str(tmp_path / "t.toml"),
        model=ModelConfig(source=str(chatting.folder)),
        evaluation=EvaluationConfig(data=tmp_path / "rows.jsonl"),
    )
    found = await Evaluator(config, prepare_run(config)).evaluate(mask.theta_0)
    assert found.rows == rows
    assert 0 <= found.figures[figure] <= 1
    made = TransformersEngine(chatting, mask, load_task(tmp_path / "t.toml"))
    batch = made.prepare(made.usable(read_rows(tmp_path / "rows.jsonl")))
    assert found.loss == pytest.approx(float(np.mean(made.losses(batch))), rel=1e-5)


# --- choices, and real models ---


def test_choices_are_scored_by_mean_log_probability(engine: Make) -> None:
    task = Choice(name="x", fields=("q",), template="{q} The thing is", options=("o",), max_tokens=48)
    rows = [
        {"q": "The red pump.", "o": ["broken", "running slowly at night", "q"], "label": 2},
        {"q": "Who", "o": ["the driver", "a fan"], "label": 0},
    ]
    made = engine("llama", task)
    scores, truth = made.scores(made.prepare(rows))
    assert truth.tolist() == [2, 0]
    for row, found in zip(rows, scores, strict=True):
        for option, score in zip(row["o"], found, strict=False):  # type: ignore[call-overload]
            prompt = [*made.loaded.start, *ids(made.loaded, f"{row['q']} The thing is")]
            followed = ids(made.loaded, f" {option}")
            expected = -functional.nll_loss(plain(made.loaded, prompt, followed), torch.tensor(followed)).item()
            assert score == pytest.approx(expected, abs=2e-5)
    assert evaluate(made, rows, 1, task.evaluation).rows == 2


def test_options_alike_leave_a_row_out(engine: Make) -> None:
    task = Choice(name="x", fields=("q",), template="{q} is", options=("o",), max_tokens=48)
    good = {"q": "Who", "o": ["the driver", "a fan"], "label": 0}
    assert engine("llama", task).usable([{"q": "Who", "o": ["a fan", "a fan"], "label": 0}, good]) == [good]


@pytest.mark.real
@pytest.mark.parametrize("name", ["nl2bash", "logs/linux"])
def test_real_rows_of_a_real_model(stories: Path, shared: Path, tmp_path: Path, name: str) -> None:
    table = {
        "nl2bash": 'kind = "completion"\ntemplate = "{instruction}\\nCommand:"\ncompletion = " {command}"\n',
        "logs/linux": 'kind = "text"\nmax_tokens = 64\n',
    }
    (tmp_path / "t.toml").write_text(table[name])
    task, loaded = load_task(tmp_path / "t.toml"), load_model(stories)
    mask = make_mask(loaded, tiny.TEXTS, "magnitude", density=0.1, sequences=4, length=32)
    made = TransformersEngine(loaded, mask, task)
    rows = made.usable(read_rows(shared / "data" / name / "validation.jsonl", task)[:40])
    before = evaluate(made, rows, figures=task.evaluation).figures
    first_order(made, mask.theta_0, rows, steps=30, lr=3e-3, batch_size=8)
    after = evaluate(made, rows, figures=task.evaluation).figures
    assert after["perplexity"] < 0.8 * before["perplexity"]
    assert after["token_accuracy"] > before["token_accuracy"]
