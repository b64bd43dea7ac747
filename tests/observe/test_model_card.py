"""The card of an export: what it says, and that names in it are text (attack H22)."""

import re
from dataclasses import replace
from typing import Any, get_args

import pytest

from meerkat_mq.observe.model_card import Exported, Kind, RunFacts, model_card
from tests.observe.test_hostile_names import MARKUP

RUN = RunFacts(
    federation="field",
    task="sst2",
    engine="transformers",
    rounds=40,
    head="cd" * 16,
    nodes=8,
    rows=12345,
    settings={"eps": "0.001", "lr": "0.01"},
    before={"accuracy": 0.5, "loss": 0.7},
    after={"accuracy": 0.875, "loss": 0.3, "macro_f1": 0.87},
    evaluated=32,
)
FOUND = Exported("some/model", "", "ab" * 32, "12" * 16, "34" * 16, "56" * 16, False, "10 of 100 weights", 32, RUN)


def test_it_says_where_the_model_comes_from() -> None:
    card = model_card("model", FOUND)
    for words in ("34" * 16, "ab" * 32, "12" * 16, "56" * 16, "cd" * 16, "32 of 40", "sst2", "12,345 rows on 8 nodes"):
        assert words in card
    assert "| accuracy | 0.5 | 0.875 |" in card
    assert "| macro-F1 | – | 0.87 |" in card
    assert "| figure | untrained base | after 32 rounds |" in card
    assert 'base_model: "some/model"' in card
    assert "| eps | 0.001 |" in card


def test_without_the_ledger_it_says_so() -> None:
    card = model_card("peft", replace(FOUND, run=None, base="/home/somebody/secret place/base"), "It is an adapter.")
    assert "was not beside the difference file" in card
    assert "It is an adapter." in card
    assert "# base, fine-tuned" in card
    assert "somebody" not in card
    assert "base_model:" not in card
    assert card.startswith("---\nlibrary_name: peft\n")


@pytest.mark.parametrize("name", MARKUP)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_names_in_it_are_text(name: str, kind: Any) -> None:
    run = replace(
        RUN, federation=name, task=name, engine=name, settings={name: name}, before={name: 1.0}, after={name: 2.0}
    )
    plain = model_card(kind, replace(FOUND, base="safe"))
    card = model_card(kind, replace(FOUND, base=name, mask=name, run=run), f"It {name}")
    assert card.count("\n---\n") == plain.count("\n---\n") == 1
    outside = re.sub(r"\A---\n.*?\n---\n|```python\n.*?```", "", card, flags=re.DOTALL)
    ours = outside.replace("`meerkat verify`", "")
    assert not re.search(r"<|(?<!\\)[`\[\]!]|(?<!\\)\*", ours)
    assert all(line.isprintable() for line in card.split("\n"))
    assert {line.count("|") for line in ours.split("\n") if line.startswith("|")} <= {3, 4}
