"""Data: every bad line is named with its number; every row goes to exactly one node."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError
from meerkat_mq.tasks.classification import TASKS
from meerkat_mq.tasks.data import Division, hold_out, partition, read_rows, read_texts, write_rows
from meerkat_mq.tasks.sources import FileRow

SST2 = TASKS["sst2"]
GOOD = '{"sentence": "fine", "label": 1}'


def rows_of(*labels: int) -> list[Row]:
    return [{"id": index, "label": label} for index, label in enumerate(labels)]


def test_rows_keep_all_fields_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD + '\n\n{"label": 0, "sentence": "a\u2028b", "more": [1]}\n', encoding="utf-8")
    assert read_rows(path, SST2) == [
        {"sentence": "fine", "label": 1},
        {"label": 0, "sentence": "a\u2028b", "more": [1]},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"d\.jsonl:3: is not JSON \(.*\); mend or remove the line"),
        ("[1]", r"d\.jsonl:3: is list, not a JSON object"),
        ('{"label": 1}', r"d\.jsonl:3: field 'sentence' is missing; the line has label"),
        ("{}", r"d\.jsonl:3: field 'sentence' is missing; the line has no fields"),
        ('{"sentence": 5, "label": 1}', r"d\.jsonl:3: field 'sentence' is 5, not text"),
        ('{"sentence": "x"}', r"d\.jsonl:3: 'label' is missing; task sst2 has labels 0 to 1"),
        ('{"sentence": "x", "label": 2}', r"d\.jsonl:3: 'label' is 2; task sst2 has labels 0 to 1"),
        ('{"sentence": "x", "label": -1}', r"d\.jsonl:3: 'label' is -1"),
        ('{"sentence": "x", "label": "1"}', r"d\.jsonl:3: 'label' is '1'"),
        ('{"sentence": "x", "label": true}', r"d\.jsonl:3: 'label' is True"),
        ('{"sentence": "x", "label": 1.0}', r"d\.jsonl:3: 'label' is 1\.0"),
        ("[" * 100_000, r"d\.jsonl:3: is not JSON"),
        ('{"sentence": "x", "label": %s}' % ("1" * 5000), r"d\.jsonl:3: is not JSON"),
    ],
)
def test_bad_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path, SST2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"d\.jsonl: holds no rows"):
        read_rows(path, SST2)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: cannot be read \(No such file or directory\)"):
        read_rows(tmp_path / "absent", SST2)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"is not UTF-8 .* at byte 0"):
        read_rows(tmp_path / "d.jsonl", SST2)


def test_texts_of_jsonl_and_of_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": "two\\n\\nthree"}\n')
    (tmp_path / "t.txt").write_text("one\nstill one\n \n\n  two\n")
    assert read_texts(tmp_path / "t.jsonl") == ["one", "two\n\nthree"]
    assert read_texts(tmp_path / "t.txt") == ["one\nstill one", "two"]


def test_texts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:1: field 'text' is missing; the line has words"):
        read_texts(tmp_path / "t.jsonl")
    (tmp_path / "t.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"t\.txt: holds no text"):
        read_texts(tmp_path / "t.txt")


def test_write_and_read_again(tmp_path: Path) -> None:
    rows = [{"sentence": 'é "\u2028\n', "label": 1}, {"sentence": "", "label": 0}]
    write_rows(tmp_path / "d.jsonl", rows)
    assert read_rows(tmp_path / "d.jsonl", SST2) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD)
    with pytest.raises(TypeError):
        write_rows(path, [{"label": object()}])
    assert path.read_text() == GOOD
    assert [file.name for file in tmp_path.iterdir()] == ["d.jsonl"]


def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_rows(tmp_path / "absent" / "d.jsonl", [])


labels = st.lists(st.integers(0, 3), min_size=1, max_size=80)


@given(labels=labels, nodes=st.integers(1, 80), seed=st.integers(0, 9), alpha=st.floats(0.01, 100))
def test_every_row_goes_to_one_node_and_no_node_goes_without(
    labels: list[int], nodes: int, seed: int, alpha: float
) -> None:
    rows, nodes = rows_of(*labels), min(nodes, len(labels))
    divisions: tuple[Division, ...] = ("iid", "dirichlet")
    for how in divisions:
        parts = partition(rows, nodes, how, alpha=alpha, seed=seed)
        assert len(parts) == nodes
        assert min(map(len, parts)) >= 1
        assert sorted(row["id"] for part in parts for row in part) == list(range(len(rows)))


def test_iid_parts_are_of_equal_size() -> None:
    assert sorted(len(part) for part in partition(rows_of(*[0, 1] * 11), 4, "iid", seed=1)) == [5, 5, 6, 6]


def test_same_seed_same_parts() -> None:
    rows = rows_of(*[0, 1, 2, 3] * 25)
    divisions: tuple[Division, ...] = ("iid", "dirichlet", "one-label")
    for how in divisions:
        assert partition(rows, 5, how, seed=3) == partition(rows, 5, how, seed=3)
        assert partition(rows, 5, how, seed=3) != partition(rows, 5, how, seed=4)


def largest_share(alpha: float) -> float:
    """Mean over nodes of the share of their most frequent label."""
    parts = partition(rows_of(*[0, 1, 2, 3] * 250), 8, "dirichlet", alpha=alpha, seed=0)
    return sum(max(Counter(row["label"] for row in part).values()) / len(part) for part in parts) / len(parts)


def test_the_smaller_alpha_the_more_skewed() -> None:
    assert largest_share(0.05) > 0.75 > largest_share(0.5) > 0.45 > largest_share(100) > 0.25


def test_one_label_a_node() -> None:
    parts = partition(rows_of(*[0, 1, 2] * 20), 5, "one-label", seed=0)
    assert [{row["label"] for row in part} for part in parts] == [{0}, {1}, {2}, {0}, {1}]
    assert [len(part) for part in parts] == [10, 10, 20, 10, 10]


def by_system(nodes: int, *systems: object) -> list[list[object]]:
    rows = [{"id": number, "system": system} for number, system in enumerate(systems)]
    parts = partition(rows, nodes, "field", seed=0, field="system")
    return [sorted({row["system"] for row in part}) for part in parts]


def test_each_value_of_a_field_is_one_nodes() -> None:
    assert by_system(3, "web", "db", "web", "auth", "db") == [["auth"], ["db"], ["web"]]
    assert by_system(2, "web", "db", "web", "auth", "db") == [["auth", "web"], ["db"]]
    assert by_system(1, 2, 1) == [[1, 2]]


@given(values=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), nodes=st.integers(1, 6))
def test_a_field_divides_all_rows(values: list[str], nodes: int) -> None:
    nodes = min(nodes, len(set(values)))
    rows = [{"id": number, "system": value} for number, value in enumerate(values)]
    parts = partition(rows, nodes, "field", seed=1, field="system")
    assert parts == partition(rows, nodes, "field", seed=1, field="system")
    assert sorted(row["id"] for part in parts for row in part) == list(range(len(rows)))
    holders = Counter(value for part in parts for value in {row["system"] for row in part})
    assert set(holders.values()) == {1}


def test_nodes_of_one_value_divide_its_rows() -> None:
    rows = [{"system": "ab"[number % 2]} for number in range(12)]
    parts = partition(rows, 4, "field", seed=0, field="system")
    held = [(len(part), {row["system"] for row in part}) for part in parts]
    assert held == [(3, {"a"}), (3, {"b"}), (3, {"a"}), (3, {"b"})]
    with pytest.raises(DataError, match="system 'b' has 1 rows for 2 nodes; use fewer nodes or more rows"):
        partition([{"system": "a"}] * 3 + [{"system": "b"}], 4, "field", seed=0, field="system")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "field 'system' is missing; the row has id"),
        ({"system": None}, "field 'system' is None, neither text nor an integer"),
        ({"system": ["a"]}, "neither text nor an integer"),
        ({"system": 0.5}, "field 'system' is 0.5, neither"),
    ],
)
def test_a_row_without_the_field_is_named(value: dict[str, object], words: str) -> None:
    rows = [FileRow({"id": 1, "system": "a"}, "rows.jsonl:1"), FileRow({"id": 2} | value, "rows.jsonl:2")]
    with pytest.raises(DataError, match="rows.jsonl:2: .*" + re.escape(words)):
        partition(rows, 2, "field", seed=0, field="system")


def test_labels_may_be_any_numbers() -> None:
    rows = [{"topic": 7}, {"topic": 9}]
    assert partition(rows, 2, "one-label", seed=0, class_of=lambda row: int(row["topic"])) == [
        [{"topic": 7}],
        [{"topic": 9}],
    ]


@pytest.mark.parametrize(
    ("nodes", "how", "alpha", "message"),
    [
        (0, "iid", 0.5, "nodes: 0 nodes for 4 rows"),
        (5, "iid", 0.5, "nodes: 5 nodes for 4 rows; every node needs at least one row"),
        (2, "dirichlet", 0.0, "alpha: 0.0 is not above 0"),
        (2, "dirichlet", float("nan"), "alpha: nan is not above 0"),
        (4, "one-label", 0.5, "label number 1 has 1 rows for 2 nodes"),
        (2, "by-name", 0.5, "'by-name' is unknown; use one of iid, dirichlet, one-label, field"),
        (2, "field", 0.5, "field needs the name of the field"),
    ],
)
def test_refused(nodes: int, how: Division, alpha: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(rows_of(0, 0, 0, 1), nodes, how, alpha=alpha, seed=0)


def test_json_lines_are_lines(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"a": "x\r\ny"}, {"a": "z"}])
    lines = (tmp_path / "d.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:2]] == [{"a": "x\r\ny"}, {"a": "z"}]
    assert lines[2:] == [b""]


@pytest.mark.parametrize("order", ["in turn", "sorted", "reversed"])
def test_held_out_rows_are_drawn_of_each_label_alike(order: str) -> None:
    labels = {"in turn": [0, 1, 2, 3, 4] * 20, "sorted": sorted([0, 1, 2, 3, 4] * 20)}
    rows = rows_of(*labels.get(order, labels["sorted"][::-1]))
    train, held_out = hold_out(rows, 0.2, seed=0)
    assert Counter(row["label"] for row in train) == dict.fromkeys(range(5), 16)
    assert Counter(row["label"] for row in held_out) == dict.fromkeys(range(5), 4)
    assert hold_out(rows, 0.2, seed=0) == (train, held_out)
    assert hold_out(rows, 0.2, seed=1) != (train, held_out)
    places = [row["id"] for row in held_out]
    assert len({place // 20 for place in places}) > 3
    assert places != sorted(places)


@given(labels=labels, share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_every_label_with_rows_enough_is_on_both_sides(labels: list[int], share: float, seed: int) -> None:
    train, held_out = hold_out(rows_of(*labels), share, seed=seed)
    assert sorted(row["id"] for row in train + held_out) == list(range(len(labels)))
    for label, number in Counter(labels).items():
        assert any(row["label"] == label for row in train)
        assert any(row["label"] == label for row in held_out) == (number > 1)
