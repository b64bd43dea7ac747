from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.errors import DataError
from meerkat_mq.sweep.results import RESULTS_FILE, TABLE_FILE, Results, spread, table


def row(key: str, **changes: Any) -> dict[str, Any]:
    axes = {"method": "MEERKAT", "task": "sst2", "split": "iid", "local_steps": 1, "lr": 0.1, "seed": 0}
    rest = {"evaluated_on": "validation", "budget": "8 passes", "setting": "abcdef0123456789"}
    return {"key": key, **axes, **rest, "accuracy_before": 0.5, "accuracy": 0.75, **changes}


def test_rows_are_found_again(tmp_path: Path) -> None:
    first = Results(tmp_path)
    first.add(row("a"))
    first.add(row("b", failed="no memory"))
    again = Results(tmp_path)
    assert again.rows == first.rows
    assert [again.finished(key) for key in "abc"] == [True, False, False]


def test_a_second_try_replaces_the_failure(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(row("a", failed="no memory"))
    assert "no memory" in (tmp_path / TABLE_FILE).read_text()
    results.add(row("a"))
    again = Results(tmp_path)
    assert again.finished("a")
    assert "no memory" not in (tmp_path / TABLE_FILE).read_text()


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    Results(tmp_path).add(row("a"))
    whole = (tmp_path / RESULTS_FILE).read_bytes()
    (tmp_path / RESULTS_FILE).write_bytes(whole + whole[:40])
    results = Results(tmp_path)
    assert list(results.rows) == ["a"]
    results.add(row("b"))
    assert list(Results(tmp_path).rows) == ["a", "b"]


@pytest.mark.parametrize("line", ["{", "[]", '{"accuracy": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    Results(tmp_path).add(row("a"))
    with (tmp_path / RESULTS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=rf"{RESULTS_FILE}:2: .*; remove the line"):
        Results(tmp_path)


def test_spread() -> None:
    assert spread([0.5, 0.7], 2) == "0.60 ± 0.14"
    assert spread([0.5], 2) == "0.50"
    assert spread([], 2) == "–"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_for_each_place_and_the_spread_over_seeds() -> None:
    rows = [row("a"), row("b", seed=1, accuracy=0.85, diverged=True), row("c", method="dense", accuracy=0.5)]
    lines = [line for line in table(rows).splitlines() if line.startswith("|")]
    heads, _, first, second = map(cells, lines)
    assert len(heads) == len(first) == len(second)
    found = dict(zip(heads, first, strict=True))
    assert (found["method"], found["accuracy"], found["seeds"]) == ("MEERKAT", "0.800 ± 0.071", "2 (1 diverged)")
    assert dict(zip(heads, second, strict=True))["accuracy"] == "0.500"
    assert "T" not in heads
    assert "task sst2, split iid, T 1, lr 0.1" in table(rows)


def test_axes_that_differ_are_columns() -> None:
    lines = table([row("a"), row("b", local_steps=None), row("c", local_steps=10)]).splitlines()
    shown = [cells(line) for line in lines if line.startswith("|")]
    assert shown[0][:2] == ["method", "T"]
    assert [line[1] for line in shown[2:]] == ["–", "1", "10"]


def test_other_settings_are_told_apart() -> None:
    lines = table([row("a"), row("b", setting="0123456789abcdef")]).splitlines()
    shown = [cells(line) for line in lines if line.startswith("|")]
    assert shown[0][1] == "setting"
    assert {line[1] for line in shown[2:]} == {"abcdef01", "01234567"}


def test_names_cannot_break_the_table() -> None:
    lines = [line for line in table([row("a", method="a|b\x1b")]).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
