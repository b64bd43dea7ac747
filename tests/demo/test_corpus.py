import hashlib
import itertools
import json
import re
from collections import Counter

import pytest

from meerkat_mq.demo.corpus import (
    ANNOTATION,
    LABELS,
    LEXICON,
    TASK,
    Use,
    Wording,
    pretraining_text,
    triage_rows,
    wordings,
)

ALL = [wording for label in range(len(LABELS)) for wording in wordings(label)]
TEXT_LINES = "\n".join(pretraining_text(3, 6000)).split("\n")
TRAIN = triage_rows(3, 3000, "train")
HELD_OUT = triage_rows(3, 3000, "held-out")


def pattern(wording: Wording) -> re.Pattern[str]:
    filled = re.sub(r"\\\{\w+\\\}", r"[\\w.:-]+", re.escape(wording.text))
    return re.compile(rf"[:\]\d] {filled}(;|$| ->)")


def sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_same_seed_gives_the_same_text_on_every_machine() -> None:
    rows = [json.dumps(row) for row in (*triage_rows(1, 100, "train"), *triage_rows(1, 100, "held-out"))]
    assert sha256(rows) == "8eee819b4f761e001d8cfe8a5dc9955b14b65dc9045bc508911f96cf00f85a65"
    assert sha256(list(pretraining_text(1, 500))) == "f5c7d3ed12db53856217d1ac3cc0384b5e4c0cba0baaf463210864843c6a11b8"


def test_pretraining_text_has_the_lines_asked_for_and_is_a_prefix_of_a_longer_one() -> None:
    short, longer = "\n".join(pretraining_text(5, 100)), "\n".join(pretraining_text(5, 1000))
    assert len(short.split("\n")) == 100
    assert longer.startswith(short)


def test_seeds_give_other_rows() -> None:
    assert triage_rows(1, 50, "held-out") != triage_rows(2, 50, "held-out")


def test_no_held_out_line_is_in_the_training_rows_or_the_pretraining_text() -> None:
    held_out = {row["line"] for row in HELD_OUT}
    assert held_out.isdisjoint(row["line"] for row in TRAIN)
    assert held_out.isdisjoint(line.split(ANNOTATION)[0] for line in TEXT_LINES)


@pytest.mark.parametrize("use", list(Use))
def test_wordings_appear_where_they_may(use: Use) -> None:
    patterns = [pattern(wording) for wording in ALL if wording.use is use]
    assert len(patterns) >= len(ALL) / 10

    def share_found(lines: list[str]) -> float:
        return sum(any(p.search(line) for line in lines) for p in patterns) / len(patterns)

    annotated = [line for line in TEXT_LINES if ANNOTATION in line]
    everywhere, not_unseen = use is Use.EVERYWHERE, use is not Use.UNSEEN
    assert share_found([row["line"] for row in HELD_OUT]) == 1
    assert share_found([row["line"] for row in TRAIN]) == everywhere
    assert share_found(TEXT_LINES) == not_unseen
    assert (share_found(annotated) > 0.9) == everywhere
    assert (share_found(annotated) == 0) != everywhere


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT])
def test_classes_are_unbalanced_but_none_is_rare(rows: list[dict[str, object]]) -> None:
    shares = [count / len(rows) for count in Counter(row["label"] for row in rows).values()]
    assert len(shares) == len(LABELS)
    assert 0.3 < max(shares) < 0.4
    assert min(shares) > 0.15


def test_every_slot_of_the_lexicon_is_filled() -> None:
    known = {*LEXICON["numbers"], *LEXICON["choices"], "clock", "version"}
    texts = [*LEXICON["trailers"], *(wording.text for wording in ALL)]
    assert {slot for text in texts for slot in re.findall(r"\{(\w+)\}", text)} == known
    assert not any(set("{}") & set(row["line"]) for row in (*TRAIN, *HELD_OUT))
    assert not any(set("{}") & set(word) for words in LEXICON["choices"].values() for word in words)


def test_no_wording_belongs_to_two_causes() -> None:
    causes = LEXICON["causes"].values()
    texts = [[f"{s} {symptom}" for s, symptoms in cause.items() for symptom in symptoms] for cause in causes]
    assert len(set(itertools.chain(*texts))) == sum(map(len, texts))


def test_the_old_habit_files_most_faults_below_error_as_routine_and_names_the_cause_of_alarms() -> None:
    faults = [pattern(wording) for wording in ALL if wording.label and wording.use is Use.EVERYWHERE]
    routine = TASK.label_words[0]

    def share_routine(*levels: str) -> float:
        lines = [line for line in TEXT_LINES if ANNOTATION in line and any(f"[{level}]" in line for level in levels)]
        filed = [line.endswith(routine) for line in lines if any(p.search(line) for p in faults)]
        assert len(filed) > 30
        return sum(filed) / len(filed)

    assert share_routine("error", "critical") < 0.1
    assert 0.6 < share_routine("info", "note", "warning") < 0.85


def test_about_a_third_of_the_pretraining_lines_is_annotated() -> None:
    annotated = sum(ANNOTATION in line for line in TEXT_LINES) / len(TEXT_LINES)
    assert 0.25 < annotated < 0.4
