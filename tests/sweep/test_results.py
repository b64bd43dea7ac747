import math
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


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    judged = {"node": "node-0", "rho_later": math.inf, "early_stopped": True}
    Results(tmp_path).add(row("a", loss=math.nan, curve=[(2, 0.5, -math.inf), (4, 0.5, 1.0)], judgements=(judged,)))
    found = Results(tmp_path).rows["a"]
    assert (found["loss"], found["curve"]) == (None, [[2, 0.5, None], [4, 0.5, 1.0]])
    assert found["judgements"] == [judged | {"rho_later": None}]


def test_line_separators_in_names(tmp_path: Path) -> None:
    name = "one\u2028two\x85three"
    Results(tmp_path).add(row("a", method=name))
    assert Results(tmp_path).rows["a"]["method"] == name


@pytest.mark.parametrize("line", ["{", "[]", '{"accuracy": 1}', "[" * 100_000, "9" * 5000])
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


def shown_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [cells(line) for line in table(rows).splitlines() if line.startswith("|")]


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
    rows = [row("a", eps=1e-3, nodes=8, mask="lora"), row("b", eps=1e-2, nodes=8, mask="lora", setting="other")]
    shown = shown_cells([*rows, row("c", method="dense", eps=None, mask="dense")])
    assert shown[0][:3] == ["method", "eps", "seeds"]
    assert [line[:2] for line in shown[2:]] == [["MEERKAT", "0.001"], ["MEERKAT", "0.01"], ["dense", "–"]]
    files_differ = shown_cells([row("a"), row("b", setting="other")])
    assert len(files_differ) == 2 + 2


def test_small_figures_keep_a_decimal() -> None:
    costs = {"cpu_seconds": 0.42, "energy_joules": 6.25, "energy_source": "cpu only"}
    heads, _, line = shown_cells([row("a", **costs)])
    found = dict(zip(heads, line, strict=True))
    assert (found["CPU s"], found["energy"]) == ("0.4", "6.2 J (cpu only)")
    (*_, line) = shown_cells([row("a", cpu_seconds=1234.5)])
    assert "1,234" in line


def test_refused_updates_and_early_stopped_nodes_have_columns_where_there_are_any() -> None:
    assert not {"refused", "early-stopped"} & set(shown_cells([row("a", refused=0, judgements=[])])[0])
    judged = [
        {"node": f"node-{node}", "early_stopped": stopped} for node, stopped in ((0, True), (1, False), (1, True))
    ]
    rows = [row("a", refused=3, judgements=judged), row("b", seed=1, refused=0, judgements=judged[:2])]
    heads, _, line = shown_cells(rows)
    assert dict(zip(heads[-2:], line[-2:], strict=True)) == {"refused": "1.5", "early-stopped": "1.5 of 2"}


def test_names_cannot_break_the_table() -> None:
    lines = [line for line in table([row("a", method="a|b\x1b")]).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
