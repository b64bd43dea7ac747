"""Data rows: JSONL, CSV and data sets in, JSONL out, and their division among nodes. No torch."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from meerkat_mq.config import HUB_DATA
from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError
from meerkat_mq.extras import importing
from meerkat_mq.wire.descriptor import Task

Division = Literal["iid", "dirichlet", "one-label"]


def read_rows(source: Path | str, task: Task) -> list[Row]:
    """Read rows: the task's fields as text, its label an integer.

    Args:
        source: a JSONL file, one object a line; a CSV file with a header row, its name ending in .csv; a folder of such
            files, by name; or `hf:<folder or hub id>[,<config>]:<split>`, for the `datasets` library. Blank lines are
            skipped.
        task: what a row must have.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    rows = [_checked(row, task, where) for where, row in _records(source, task.fields, task.label_field)]
    if not rows:
        raise DataError(str(source), "holds no rows", "give a JSONL file with one object a line")
    return rows


def data_files(source: Path) -> list[Path]:
    """A folder's *.jsonl and *.csv files, by name; of anything else, itself.

    Raises:
        DataError: the folder cannot be read.
    """
    if not source.is_dir():
        return [source]
    try:
        return sorted(file for file in source.iterdir() if file.suffix.lower() in (".jsonl", ".csv") and file.is_file())
    except OSError as error:
        raise DataError(str(source), f"cannot be read ({error.strerror})", "give a folder of data files") from error


def read_texts(source: Path | str, field: str = "text") -> list[str]:
    """Calibration texts: the `field` of each row of what `read_rows` reads, or the paragraphs of any other file.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    if isinstance(source, str) or source.suffix.lower() in (".jsonl", ".csv"):
        texts = [_text(row, field, where) for where, row in _records(source, (field,))]
    else:
        whole = "\n".join(line.rstrip() for _, line in _lines(source))
        texts = [paragraph.strip() for paragraph in whole.split("\n\n") if paragraph.strip()]
    if not any(text.strip() for text in texts):
        raise DataError(str(source), "holds no text", 'give a text file, or JSONL with {"text": …} on each line')
    return texts


def _records(
    source: Path | str, fields: Sequence[str], label_field: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row and where it is: file and line, or the data set's row."""
    if isinstance(source, str):
        yield from _hub_records(source, [*fields, label_field] if label_field else fields)
    elif source.is_dir():
        for file in data_files(source):
            yield from _records(file, fields, label_field)
    elif source.suffix.lower() == ".csv":
        yield from _csv_records(source, label_field)
    else:
        for number, line in _lines(source):
            if line.strip():
                yield (where := f"{source}:{number}"), _object(line, where)


def _csv_records(path: Path, label_field: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file; labels, which CSV knows only as text, become integers where they are some."""
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(where, f"is not CSV ({error})", "mend or remove the line") from error
        if values is None:
            return
        if header is None:
            header = values
        elif values:
            if len(values) != len(header):
                raise DataError(where, f"has {len(values)} columns, the header {len(header)}", "quote text with commas")
            row: dict[str, Any] = dict(zip(header, values, strict=True))
            if label_field is not None and re.fullmatch(r"-?\d{1,9}", row.get(label_field, "").strip()):
                row[label_field] = int(row[label_field])
            yield where, row


def _hub_records(source: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set, of which only these columns are read: others may be images or dates."""
    match = HUB_DATA.fullmatch(source)
    if match is None:
        raise DataError(source, "is no hf:<folder or hub id>[,<config>]:<split>", "such as hf:imdb:train")
    with importing("datasets", source):
        import datasets  # noqa: PLC0415 - slow to import

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(match["path"], match["config"], split=match["split"])
    except Exception as error:  # the library, its readers and the hub's client raise all kinds
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            source, f"cannot be loaded ({first})", "check folder or hub id, config, split, and the network"
        ) from error
    absent = [column for column in columns if column not in rows.column_names]
    if absent:
        raise DataError(source, f"has no column {absent[0]!r}", f"it has {', '.join(rows.column_names)}")
    for number, row in enumerate(rows.select_columns(list(columns))):
        yield f"{source}: row {number}", row


def _lines(path: Path) -> list[tuple[int, str]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    return list(enumerate(_read(path).split("\n"), start=1))


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "give the path of a data file") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"is not UTF-8 ({error.reason} at byte {error.start})", "convert it") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise DataError(where, f"is not JSON ({error})", "mend or remove the line") from error
    if not isinstance(row, dict):
        raise DataError(where, f"is {type(row).__name__}, not a JSON object", "mend or remove the line")
    return row


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        found = "is missing" if field not in row else f"is {value!r}, not text"
        raise DataError(where, f"field {field!r} {found}", f"the line has {', '.join(map(str, row)) or 'no fields'}")
    return value


def _checked(row: dict[str, Any], task: Task, where: str) -> Row:
    for field in task.fields:
        _text(row, field, where)
    label, classes = row.get(task.label_field), len(task.label_words)
    if type(label) is not int or not 0 <= label < classes:
        found = "is missing" if task.label_field not in row else f"is {label!r}"
        raise DataError(where, f"{task.label_field!r} {found}", f"task {task.name} has labels 0 to {classes - 1}")
    return row


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSONL file atomically: a crash leaves the old file or the new one.

    Raises:
        DataError: the file cannot be written.
    """
    lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    try:
        write_atomically(path, lines.encode())
    except OSError as error:
        raise DataError(str(path), f"cannot be written ({error.strerror})", "choose another folder") from error


def partition(
    rows: Sequence[Row], nodes: int, how: Division, *, seed: int, alpha: float = 0.5, label_field: str = "label"
) -> list[list[Row]]:
    """Divide rows among nodes; every node gets at least one, and the same seed gives the same division.

    Args:
        rows: at least `nodes` of them.
        nodes: ≥ 1.
        how: "iid" (shuffled, equal shares); "dirichlet" (each label's rows by shares drawn from Dirichlet(alpha), the
            smaller alpha the more skewed); "one-label" (node i gets rows of the i-th label found, modulo their number;
            with fewer nodes than labels the rows of the other labels stay out).
        seed: ≥ 0.
        alpha: of the Dirichlet distribution, > 0.
        label_field: key of the label.

    Raises:
        DataError: too few rows for so many nodes, or an argument out of range.
    """
    if not 1 <= nodes <= len(rows):
        raise DataError("nodes", f"{nodes} nodes for {len(rows)} rows", "every node needs at least one row")
    if not 0 < alpha < float("inf"):
        raise DataError("alpha", f"{alpha} is not above 0", "0.5 is common")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    if how == "iid":
        parts = np.array_split(order, nodes)
    elif how == "dirichlet":
        parts = _fill_empty(_dirichlet(_by_label(rows, order, label_field), nodes, alpha, rng))
    elif how == "one-label":
        parts = _one_label(_by_label(rows, order, label_field), nodes)
    else:
        raise DataError("partition", f"{how!r} is unknown", "use one of iid, dirichlet, one-label")
    return [[rows[index] for index in rng.permutation(part)] for part in parts]


Indices = npt.NDArray[np.int64]


def _by_label(rows: Sequence[Row], order: Indices, label_field: str) -> list[Indices]:
    labels = np.array([rows[index][label_field] for index in order])
    return [order[labels == label] for label in np.unique(labels)]


def _dirichlet(groups: list[Indices], nodes: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    shares = [rng.dirichlet(np.full(nodes, alpha)) for _ in groups]
    cuts = [
        np.rint(np.cumsum(share)[:-1] * len(group)).astype(int) for share, group in zip(shares, groups, strict=True)
    ]
    pieces = [np.split(group, cut) for group, cut in zip(groups, cuts, strict=True)]
    return [np.concatenate(node_pieces) for node_pieces in zip(*pieces, strict=True)]


def _fill_empty(parts: list[Indices]) -> list[Indices]:
    """Move one row from the largest part to each empty one."""
    for node, part in enumerate(parts):
        if not part.size:
            largest = max(range(len(parts)), key=lambda other: parts[other].size)
            parts[node], parts[largest] = parts[largest][-1:], parts[largest][:-1]
    return parts


def _one_label(groups: list[Indices], nodes: int) -> list[Indices]:
    sharers = Counter(node % len(groups) for node in range(nodes))
    short = [label for label, count in sharers.items() if count > groups[label].size]
    if short:
        raise DataError(
            "partition",
            f"label number {short[0]} has {groups[short[0]].size} rows for {sharers[short[0]]} nodes",
            "use fewer nodes or more rows",
        )
    pieces = {label: iter(np.array_split(groups[label], count)) for label, count in sharers.items()}
    return [next(pieces[node % len(groups)]) for node in range(nodes)]
