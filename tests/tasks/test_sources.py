"""Rows from CSV and from the `datasets` library: real files, its real loading, and no network."""

import csv
import datetime
import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.errors import DataError, MissingExtra
from meerkat_mq.tasks.classification import TASKS
from meerkat_mq.tasks.data import read_rows, read_texts, write_rows

SST2 = TASKS["sst2"]
ROWS = [{"sentence": "fine, really", "label": 1}, {"sentence": 'a "bad"\none', "label": 0}]


# --- CSV ---


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_csv(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "d.CSV", '\ufeffid,sentence,label\r\n1,"fine, really",1\r\n\r\n2,"a ""bad""\none", 0 \r\n'
    )
    assert read_rows(path, SST2) == [{"id": str(n), **row} for n, row in enumerate(ROWS, start=1)]


@given(rows=st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 1)), min_size=1))
def test_what_the_csv_module_writes_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("sentence", "label"), *rows])
    path = write_csv(tmp_path_factory.mktemp("csv") / "d.csv", text.getvalue())
    assert read_rows(path, SST2) == [{"sentence": sentence, "label": label} for sentence, label in rows]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,2", r"d\.csv:5: 'label' is 2; task sst2 has labels 0 to 1"),
        ("x,one", r"d\.csv:5: 'label' is 'one'; task sst2"),
        ("x,1.0", r"d\.csv:5: 'label' is '1\.0'"),
        ("x,", r"d\.csv:5: 'label' is ''"),
        ("x,1,y", r"d\.csv:5: has 3 columns, the header 2; quote text with commas"),
        ("x", r"d\.csv:5: has 1 columns, the header 2"),
        ('"x,1', r"d\.csv:5: is not CSV \(.*\); mend or remove the line"),
        ('"x"y,1', r"d\.csv:5: is not CSV"),
    ],
)
def test_bad_csv_line(tmp_path: Path, line: str, message: str) -> None:
    path = write_csv(tmp_path / "d.csv", f'sentence,label\n"two\nlines",1\n\n{line}\n')
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path, SST2)
    assert "\n" not in str(caught.value)


def test_csv_without_a_column(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", "text,label\nx,1\n")
    with pytest.raises(DataError, match=r"d\.csv:2: field 'sentence' is missing; the line has text, label"):
        read_rows(path, SST2)
    assert read_texts(path) == ["x"]
    with pytest.raises(DataError, match=r"e\.csv:2: 'label' is missing"):
        read_rows(write_csv(tmp_path / "e.csv", "sentence,class\nx,1\n"), SST2)


@pytest.mark.parametrize("text", ["", "sentence,label\n"])
def test_csv_without_rows(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"d\.csv: holds no rows"):
        read_rows(write_csv(tmp_path / "d.csv", text), SST2)


# --- datasets ---


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder(tmp_path: Path, kind: str) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = Dataset.from_list(ROWS, features=features)
    folder = tmp_path / "rows"
    folder.mkdir()
    if kind == "jsonl":
        write_rows(folder / "validation.jsonl", ROWS)
    else:
        getattr(table, f"to_{kind}")(folder / f"validation.{kind}")
    assert read_rows(f"hf:{folder}:validation", SST2) == ROWS
    assert read_rows(f"hf:{folder},default:validation[:1]", SST2) == ROWS[:1]
    assert read_texts(f"hf:{folder}:validation", "sentence") == [row["sentence"] for row in ROWS]


def test_only_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "rows").mkdir()
    rows = [{**row, "date": datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC)} for row in ROWS]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    assert read_rows(f"hf:{tmp_path / 'rows'}:train", SST2) == ROWS


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:{folder}:test", r"rows:test: cannot be loaded \(.*test.*\); check folder or hub id, config, split"),
        ("hf:{folder},other:train", r"rows,other:train: cannot be loaded \(.*other.*\)"),
        ("hf:{folder}/none:train", r"none:train: cannot be loaded"),
        ("hf:nobody/has-this:train", r"hf:nobody/has-this:train: cannot be loaded \(.*\); check .* the network"),
        ("hf:{folder}", r"rows: is no hf:<folder or hub id>\[,<config>\]:<split>; such as hf:imdb:train"),
        ("hf:", "hf:: is no hf:<folder or hub id>"),
    ],
)
def test_sources_that_give_nothing(tmp_path: Path, source: str, message: str) -> None:
    """HF_HUB_OFFLINE stands for a hub that cannot be reached."""
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(source.format(folder=tmp_path / "rows"), SST2)
    assert "\n" not in str(caught.value)


def test_rows_that_do_not_fit_the_task(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [*ROWS, {"sentence": None, "label": 1}])
    write_rows(folder / "test.jsonl", [{"sentence": "hidden", "label": -1}])
    with pytest.raises(DataError, match=r"rows:train: row 2: field 'sentence' is None, not text"):
        read_rows(f"hf:{folder}:train", SST2)
    with pytest.raises(DataError, match=r"rows:test: row 0: 'label' is -1; task sst2 has labels 0 to 1"):
        read_rows(f"hf:{folder}:test", SST2)
    with pytest.raises(DataError, match=r"rows:train: has no column 'text'; it has sentence, label"):
        read_rows(f"hf:{folder}:train", TASKS["agnews"])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "datasets" else find(name, *rest)
    )
    with pytest.raises(MissingExtra, match=r"datasets is not installed; pip install 'meerkat-mq\[datasets\]'"):
        read_rows("hf:imdb:train", SST2)


def test_the_library_is_not_imported_without_need(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", "text\nx\n")
    said = "import sys; from pathlib import Path; from meerkat_mq.tasks.data import read_texts as r; "
    said += f"r(Path({str(path)!r})); print(*({{'datasets', 'pandas', 'pyarrow', 'torch'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
