"""Scores: equal to the plain definition, row by row and candidate by candidate, without any of the short cuts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM

from meerkat_mq.engines.prompts import candidate_ids, cut_left
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.scoring import CausalScorer, EncoderScorer, scorer_for
from meerkat_mq.errors import TaskError, UnsupportedModel
from meerkat_mq.tasks.classification import TASKS, Classification
from meerkat_mq.tasks.template import fill
from tests.engines import tiny

Load = Callable[..., LoadedModel]
ROWS = [tiny.ROWS[index] for index in (0, 7, 20, 33)] + [{"line": "A fan.", "label": 0}]


def words(*label_words: str, **changes: Any) -> Classification:
    return tiny.TASK.model_copy(update={"label_words": label_words, "descriptions": label_words, **changes})


def plain_score(loaded: LoadedModel, task: Classification, row: dict[str, Any], word: str) -> float:
    """Mean log-probability of the word's tokens after the prompt, in a pass of their own."""
    prompt = loaded.tokenizer(fill(task.template, row))["input_ids"]
    whole = loaded.tokenizer(fill(task.template, row) + word)["input_ids"]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    found = [logits[position - 1, whole[position]].item() for position in range(len(prompt), len(whole))]
    return float(sum(found) / len(found))


def scores(loaded: LoadedModel, task: Classification, rows: list[Any]) -> Any:
    scorer = scorer_for(loaded, task)
    with torch.inference_mode():
        return scorer.scores([prepare(scorer, rows)]).numpy()


def prepare(scorer: Any, rows: list[Any]) -> Any:
    return scorer.collate(scorer.tokens([scorer._task.example(row) for row in rows]))


SINGLE = words(" broken", " running")
MIXED = words(" broken", " running slowly", " running at night", " q")
NESTED = words(" x", " xy zw", " xy zw k")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("task", [SINGLE, MIXED, NESTED], ids=["single", "mixed", "nested"])
def test_causal_scores(load: Load, name: str, task: Classification) -> None:
    loaded = load(name)
    expected = [[plain_score(loaded, task, row, word) for word in task.label_words] for row in ROWS]
    np.testing.assert_allclose(scores(loaded, task, ROWS), expected, rtol=0, atol=2e-5)


def test_single_tokens_need_one_sequence_a_row(load: Load) -> None:
    loaded = load("llama")
    assert all(len(ids) == 1 for ids in candidate_ids(loaded.tokenizer, SINGLE))
    inputs = prepare(CausalScorer(loaded, SINGLE), ROWS)
    assert len(inputs.ids) == len(ROWS)
    assert inputs.positions.shape == (len(ROWS), 1)


def test_candidates_share_what_they_share(load: Load) -> None:
    loaded = load("llama")
    lengths = [len(ids) for ids in candidate_ids(loaded.tokenizer, NESTED)]
    scorer = CausalScorer(loaded, NESTED)
    (prompt,) = scorer.tokens([NESTED.example(ROWS[0])])
    assert len(prepare(scorer, ROWS).ids) == prompt.sequences * len(ROWS) < len(lengths) * len(ROWS)


def test_the_head_sees_only_what_is_needed(load: Load) -> None:
    loaded = load("llama")
    seen: list[torch.Size] = []
    loaded.model.register_forward_hook(lambda _, __, output: seen.append(output.logits.shape))
    scores(loaded, SINGLE, ROWS)
    assert seen == [(len(ROWS), 1, tiny.VOCABULARY)]
    with torch.inference_mode():
        loaded.model(torch.zeros(2, 9, dtype=torch.long))
    assert seen[1] == (2, 9, tiny.VOCABULARY)


def test_what_follows_the_head_stays(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=0.5,
        initializer_range=0.5, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    loaded = load_model(tiny.save(Gemma2ForCausalLM(config), tmp_path))
    expected = [[plain_score(loaded, SINGLE, row, word) for word in SINGLE.label_words] for row in ROWS]
    np.testing.assert_allclose(scores(loaded, SINGLE, ROWS), expected, rtol=0, atol=2e-5)
    capped, uncapped = scores(loaded, SINGLE, ROWS), None
    loaded.model.config.final_logit_softcapping = None
    uncapped = scores(loaded, SINGLE, ROWS)
    assert np.abs(capped - uncapped).max() > 0.1


def test_long_prompts_are_cut_from_the_left_and_keep_their_start_token(load: Load) -> None:
    loaded = load("llama")
    scorer = CausalScorer(loaded, SINGLE.model_copy(update={"max_tokens": 12}))
    inputs = prepare(scorer, [{"line": tiny.TEXTS[0] * 5, "label": 0}])
    assert inputs.ids.shape == (1, 12)
    assert inputs.ids[0, 0] == loaded.tokenizer.bos_token_id
    tail = loaded.tokenizer(" The thing is", add_special_tokens=False)["input_ids"]
    assert inputs.ids[0, -len(tail) :].tolist() == tail


def test_candidates_fit_into_the_limit(load: Load) -> None:
    scorer = CausalScorer(load("gpt2"), MIXED.model_copy(update={"max_tokens": 64}))
    inputs = prepare(scorer, [{"line": tiny.TEXTS[0] * 9, "label": 0}])
    assert inputs.ids.shape[1] <= 64


def test_bfloat16_logits_are_float32(load: Load) -> None:
    loaded, row = load("llama-bf16", dtype="bfloat16"), ROWS[0]
    ids = torch.tensor([loaded.tokenizer(fill(SINGLE.template, row))["input_ids"]])
    with torch.inference_mode():
        hidden = loaded.model.model(ids).last_hidden_state[0, -1]
    expected = (loaded.model.lm_head.weight.float() @ hidden.float()).log_softmax(-1)
    columns = [ids[0] for ids in candidate_ids(loaded.tokenizer, SINGLE)]
    np.testing.assert_allclose(scores(loaded, SINGLE, [row])[0], expected[columns], rtol=0, atol=1e-5)


def test_template_that_melts_into_the_label_word(load: Load) -> None:
    task = words("en", "ing", template="{line} The thing is brok")
    with pytest.raises(
        TaskError, match="task state: label_words: 'en' melts into the end of the template; put the space"
    ):
        candidate_ids(load("llama").tokenizer, task)


@pytest.mark.parametrize("second", ["", " broken"])
def test_label_words_without_tokens_of_their_own(load: Load, second: str) -> None:
    with pytest.raises(TaskError, match="task state: label_words: "):
        candidate_ids(load("llama").tokenizer, words(" broken", second))


def test_head_that_is_not_linear(load: Load) -> None:
    loaded = load("llama")
    loaded.model.lm_head = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="its output head is not linear"):
        CausalScorer(loaded, SINGLE)


def plain_embedding(loaded: LoadedModel, text: str) -> torch.Tensor:
    with torch.inference_mode():
        hidden = loaded.model(**loaded.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return functional.normalize(hidden.mean(dim=0), dim=0)


def test_encoder_scores(load: Load) -> None:
    loaded = load("bert")
    classes = torch.stack([plain_embedding(loaded, text) for text in tiny.TASK.descriptions])
    texts = torch.stack([plain_embedding(loaded, str(row["line"])) for row in ROWS])
    np.testing.assert_allclose(scores(loaded, tiny.TASK, ROWS), 20 * texts @ classes.T, rtol=0, atol=1e-4)


def test_encoder_cuts_from_the_right(load: Load) -> None:
    loaded = load("bert")
    task = tiny.TASK.model_copy(update={"max_tokens": 12})
    row = {"line": tiny.TEXTS[0] * 9, "label": 0}
    inputs = prepare(EncoderScorer(loaded, task), [row])
    assert inputs["input_ids"][0].tolist() == loaded.tokenizer(row["line"])["input_ids"][:12]


def test_model_limit_comes_before_the_task_s(load: Load) -> None:
    loaded = replace(load("bert"), max_tokens=10)
    inputs = prepare(EncoderScorer(loaded, tiny.TASK), [{"line": tiny.TEXTS[0] * 9, "label": 0}])
    assert inputs["input_ids"].shape == (1, 10)


@pytest.mark.real
def test_real_causal_model_on_a_real_task(stories: Path) -> None:
    loaded, task = load_model(stories), TASKS["sst2"].model_copy(update={"label_words": (" sad", " happy")})
    rows = [{"sentence": "Once upon a time there was a little girl.", "label": 1}, {"sentence": "The end.", "label": 0}]
    expected = [[plain_score(loaded, task, row, word) for word in task.label_words] for row in rows]
    np.testing.assert_allclose(scores(loaded, task, rows), expected, rtol=0, atol=2e-5)


@pytest.mark.real
def test_real_causal_model_knows_its_stories(stories: Path) -> None:
    loaded = load_model(stories)
    task = words(" time", " tree", " dog", template="{line}")
    found = scores(loaded, task, [{"line": "Once upon a", "label": 0}])
    assert found.argmax() == 0
    assert found[0, 0] > -1


# --- limits of tokens ---


LONG = words(" " + "xyzw" * 4, " " + "qvjk" * 4, max_tokens=8)


def test_label_words_that_leave_no_room_are_refused_by_name(load: Load) -> None:
    loaded = load("llama")
    most = max(map(len, candidate_ids(loaded.tokenizer, LONG)))
    assert most >= 16
    with pytest.raises(
        TaskError,
        match=rf"^task state: max_tokens: 8 tokens leave none for a row: label words take {most - 1}, the end of the "
        rf"template \d+; set max_tokens to \d+ at least, or shorten",
    ) as caught:
        CausalScorer(loaded, LONG)
    least = int(caught.value.remedy.split()[3])
    inputs = prepare(
        CausalScorer(loaded, LONG.model_copy(update={"max_tokens": least})), [{"line": "q" * 90, "label": 0}]
    )
    assert inputs.ids.shape[1] == least
    with pytest.raises(TaskError, match="max_tokens"):
        CausalScorer(loaded, LONG.model_copy(update={"max_tokens": least - 1}))


def test_where_the_model_is_the_limit_the_label_words_are_named(load: Load) -> None:
    with pytest.raises(
        TaskError, match=r"^task state: label_words: 12 tokens leave none for a row: .*; shorten the label"
    ):
        CausalScorer(replace(load("llama"), max_tokens=12), LONG.model_copy(update={"max_tokens": 200}))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("task", [SINGLE, MIXED, NESTED], ids=["single", "mixed", "nested"])
def test_the_limit_is_kept_for_every_row(load: Load, name: str, task: Classification) -> None:
    loaded = load(name)
    rows = [{"line": text, "label": 0} for text in ("", "x", tiny.TEXTS[0] * 9)]

    def longest(limit: int) -> int:
        scorer = CausalScorer(loaded, task.model_copy(update={"max_tokens": limit}))
        return int(prepare(scorer, rows).ids.shape[1])

    with pytest.raises(TaskError, match=r"set max_tokens to \d+ at least") as caught:
        longest(8)
    least = int(caught.value.remedy.split()[3])
    assert least < 24
    assert [longest(limit) for limit in range(least, 40)] == list(range(least, 40))


def test_cutting_keeps_any_limit() -> None:
    for limit in range(1, 6):
        assert len(cut_left([0, 1, 2, 3, 4, 5], limit, (0,))) == limit
        assert cut_left([7, 1, 2, 3, 4, 5], limit, (0,)) == [1, 2, 3, 4, 5][-limit:]
    assert cut_left([8, 0, 1, 2, 3], 3, (8, 0)) == [8, 0, 3]
    assert cut_left([], 3, ()) == [0]


@pytest.mark.parametrize(
    ("descriptions", "message"),
    [
        (("a " * 30, "b"), r"^task state: descriptions: 'a a .*' has \d+ tokens, more than 12; shorten it, or raise"),
        (("same", "same"), r"^task state: descriptions: 'same' has the tokens of another one; describe each class"),
    ],
)
def test_descriptions_are_neither_cut_nor_alike(load: Load, descriptions: tuple[str, str], message: str) -> None:
    task = tiny.TASK.model_copy(update={"descriptions": descriptions, "max_tokens": 12})
    with pytest.raises(TaskError, match=message):
        EncoderScorer(load("bert"), task)


def test_an_encoder_reads_an_empty_text(load: Load) -> None:
    loaded = load("bert")
    plain = replace(loaded, tokenizer=tiny.tokenizer(start=False))
    assert np.isfinite(scores(plain, tiny.TASK, [{"line": "", "label": 0}, {"line": "a fan", "label": 1}])).all()
    with pytest.raises(TaskError, match="task state: descriptions: '' has no tokens"):
        EncoderScorer(plain, tiny.TASK.model_copy(update={"descriptions": ("", "b")}))
