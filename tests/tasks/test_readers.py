"""One reader for rows and for text: the same content comes to the same rows and texts, whatever it is packed in."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.errors import DataError
from meerkat_mq.tasks.classification import TASKS
from meerkat_mq.tasks.data import read_rows, read_texts

AGNEWS = TASKS["agnews"]
ROWS = [{"text": "one, two\n\nthree", "label": 3}, {"text": 'a "b" [c]', "label": 0}, {"text": "\u2028é", "label": 1}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = 'text,label\n"one, two\n\nthree",3\n"a ""b"" [c]",0\n\u2028é,1\n'

WAYS: dict[str, str] = {
    "d.jsonl": LINES,
    "d.ndjson": LINES,
    "d.json": LINES,
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS, indent=1),
    "bom.json": "\ufeff" + json.dumps(ROWS),
    "d.txt": LINES,
    "array.txt": "\n " + json.dumps(ROWS, indent=2),
    "noending": LINES,
    "d.csv": TABLE,
    "D.CSV": "\ufeff" + TABLE.replace("\n", "\r\n").replace("two\r\n\r\nthree", "two\n\nthree"),
    "d.tsv": TABLE.replace('"one, two', '"one, two').replace('three",3', 'three"\t3').replace(',label', "\tlabel")
    .replace('",0', '"\t0').replace("é,1", "é\t1"),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", WAYS)
def test_the_same_rows_and_texts_whatever_the_way(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    data = WAYS[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_rows(path, AGNEWS) == ROWS
    assert read_texts(path) == [row["text"] for row in ROWS]


def test_a_folder_is_read_for_rows_and_for_texts(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("d.jsonl", "array.json", "d.csv", "d.tsv")):
        (folder / f"{number}-{name}").write_text(WAYS[name], encoding="utf-8")
    (folder / "9.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "notes.md").write_text("nothing")
    (folder / "._0-d.jsonl").write_bytes(b"\0\5\x16\7")  # as one system leaves them beside each file
    (folder / "more.jsonl").mkdir()
    assert read_rows(folder, AGNEWS) == ROWS * 5
    texts = [row["text"] for row in ROWS]
    assert read_texts(folder) == texts * 5
    (folder / "z.txt").write_text("plain\ntext\n\nmore")
    assert read_rows(folder, AGNEWS) == ROWS * 5
    assert read_texts(folder) == [*texts * 5, "plain\ntext", "more"]


def test_a_folder_without_data_says_what_it_is_read_for(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"holds no rows: no data file is there; it is read for \*\.jsonl, .*\*\.tsv"):
        read_rows(tmp_path, AGNEWS)
    with pytest.raises(DataError, match="holds no text"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    "text", ["[INFO] started\n\n{not} json", "{curly} words", "[[Link]] and text", "[1] a note\n", "(a) plain"]
)
def test_plain_text_may_begin_with_a_bracket(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    assert read_texts(tmp_path / "t.txt") == [part.strip() for part in text.split("\n\n")]


@pytest.mark.parametrize("name", ["t.txt", "t", "t.json", "t.text"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text": "two"\n', r":2: is not JSON \(.*\); mend or remove the line"),
        ('[{"text": "one"},\n {"text": }]', r":2: is not JSON \(Expecting value\)"),
        ('[{"text": "one"}, "two"]', r": item 2: is str, not a JSON object; give an array of objects"),
        ('["one", "two"]', r": item 1: is str, not a JSON object"),
        ('{\n "text": "one"\n}', r":1: is not JSON .*; the file is one dict: write one object a line, or an array"),
        ('{"data": [{"text": "one"}]}', r":1: field 'text' is missing; the line has data"),
        ('{"text": "one", "text": "two"}', r":1: is not JSON \(the key 'text' comes twice\)"),
        ("[]", "holds no text"),
    ],
)
def test_what_looks_like_json_is_never_read_as_plain_text(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_texts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_rows_are_never_plain_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("sentence one\n")
    with pytest.raises(
        DataError, match=r"t\.txt:1: is not JSON .*; rows are JSON lines, a JSON array, or a table whose"
    ):
        read_rows(tmp_path / "t.txt", AGNEWS)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.jsonl", LINES)


def tarred(path: Path) -> None:
    with tarfile.open(path, "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())


def numpy_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


MAKERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "d.npz": (lambda path: np.savez(path, a=np.zeros(3)), "is a NumPy archive; write the rows as JSON lines"),
    "d.npy": (numpy_array, "is a NumPy array; write the rows as JSON lines"),
    "d.parquet": (
        lambda path: path.write_bytes(b"PAR1\0\1\2PAR1"),
        r"is a Parquet file; give its folder as hf:<folder>",
    ),
    "named.parquet": (lambda path: path.write_text(LINES), r"is a Parquet file"),
    "d.jsonl": (lambda path: path.write_bytes(b"PAR1\0\1\2PAR1"), "is a Parquet file"),
    "d.xlsx": (zipped, "is a spreadsheet; save its sheet as CSV"),
    "d.zip": (zipped, "is a zip archive; unpack it"),
    "data": (zipped, "is a zip archive; unpack it"),
    "d.tar.gz": (tarred, "is a tar archive; unpack it, and give the folder"),
    "d.jsonl.bz2": (lambda path: path.write_bytes(b"BZh91AY"), "is packed with bzip2; unpack it"),
    "d.jsonl.zst": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd\0"), "is packed with zstd; unpack it"),
    "d.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(LINES.encode() * 9)[:-9]), "is damaged gzip"),
    "d.csv.gz": (lambda path: path.write_bytes(b"\x1f\x8b\x08garbage"), "is damaged gzip"),
    "d.pkl": (lambda path: path.write_bytes(b"\x80\x04."), "is a pickle, which is never loaded"),
    "m.gguf": (lambda path: path.write_bytes(b"GGUF\3\0"), "holds a model's weights"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><p>log in"), "is an HTML page; give its text"),
    "wide.csv": (
        lambda path: path.write_text(TABLE, encoding="utf-16"),
        "not UTF-8 .*; it begins as UTF-16 does: save",
    ),
    "latin.csv": (
        lambda path: path.write_bytes("text,label\né,1".encode("latin-1")),
        "is not UTF-8 .*; save it as UTF-8",
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, name: str) -> None:
    make, message = MAKERS[name]
    make(tmp_path / name)
    for read in (lambda path: read_rows(path, AGNEWS), read_texts):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert caught.value.remedy


def test_a_file_of_nul_bytes_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"abc\0\1\2")
    with pytest.raises(DataError, match=r"t\.bin: holds NUL characters: it is not text; give plain text"):
        read_texts(tmp_path / "t.bin")


def test_a_small_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_mq.tasks.sources.MOST_UNPACKED", 2**20)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b" " * 2**21))
    with pytest.raises(DataError, match=r"d\.jsonl\.gz: unpacks to more than 1 MiB; divide it"):
        read_rows(tmp_path / "d.jsonl.gz", AGNEWS)


# --- tables ---


def test_a_long_field_of_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"text,label\n{'x' * 200_000},2\n")
    assert len(read_rows(tmp_path / "d.csv", AGNEWS)[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label,label\nx,1,2\n", r"d\.csv:1: has 2 columns 'label'; rename or remove all but one"),
        ("text,text,label\nx,y,2\n", r"d\.csv:1: has 2 columns 'text'; rename"),
        ("text,lable\nx,1\n", r"d\.csv:2: 'label' is missing; task agnews has labels 0 to 3; the line has text, lable"),
        ("text;label\nx;1\n", r"d\.csv:2: field 'text' is missing; the line has 'text;label'"),
        ("text, label\nx,1\n", r"d\.csv:2: 'label' is missing; .*; the line has text, ' label'"),
        (f"text,label\nx,{'9' * 400}\n", r"d\.csv:2: 'label' is '9+\.\.\.9+'; task"),
    ],
)
def test_a_table_says_what_it_lacks_and_what_it_has(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "d.csv").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / "d.csv", AGNEWS)
    assert len(str(caught.value)) < 400


def test_what_comes_twice_among_very_many_is_found_at_once(tmp_path: Path) -> None:
    """Each name was looked for among all of them: a file of two megabytes took hours."""
    names = [*(f"c{number}" for number in range(300_000)), "z", "z"]
    (tmp_path / "d.csv").write_text(",".join(names) + "\n")
    with pytest.raises(DataError, match=r"d\.csv:1: has 2 columns 'z'; rename"):
        read_rows(tmp_path / "d.csv")
    (tmp_path / "d.jsonl").write_text("{" + ",".join(f'"{name}":1' for name in names) + "}")
    with pytest.raises(DataError, match="the key 'z' comes twice"):
        read_rows(tmp_path / "d.jsonl")


def test_columns_without_a_name_may_be_many(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label,,\nx,1,,\n")
    assert read_rows(tmp_path / "d.csv", AGNEWS)[0]["label"] == 1
