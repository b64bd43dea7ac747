"""Data rows: read and checked against a task, written as JSONL, divided among nodes. No torch."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import structlog

from meerkat_mq.core.files import write_atomically
from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError, shown, shown_names
from meerkat_mq.tasks.sources import SUFFIXES, FileRow, data_files, place_of, records
from meerkat_mq.tasks.task import Task

MOST_CHARACTERS = 2**20  # of a field; a tokenizer takes about a second for them
ROWS_NAMED = 10  # of those that are left out, one by one in the log
CHECKED = 64  # rows at a time

Division = Literal["iid", "dirichlet", "one-label", "field"]
ClassOf = Callable[[Row], int]


def read_rows(source: Path | str, task: Task | None = None, field: str | None = None) -> list[Row]:
    """Read rows, each checked by the task.

    Args:
        source: a file of JSON lines, one object a line, or of one JSON array of objects; a CSV or TSV file with a
            header row, its name ending in .csv or .tsv; any of these gzipped; a folder of such files, by name; or
            `hf:<folder or hub id>[,<config>]:<split>`, for the `datasets` library. Blank lines are skipped.
        task: what a row must have; None: whatever its fields are.
        field: one that is read too, of a data set; files always give all of their fields.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    rows: list[Row]
    if task is None:
        rows = list(records(source, None))
    else:
        columns = dict.fromkeys((*task.columns, field) if field else task.columns)
        rows = [task.checked(row) for row in records(source, tuple(columns), task.integers)]
    if not rows:
        raise no_rows(source, "give a JSONL file with one object a line")
    return rows


def no_rows(source: Path | str, remedy: str) -> DataError:
    """A source without rows; of a folder, what is there instead."""
    if isinstance(source, str) or not source.is_dir() or data_files(source):
        return DataError(str(source), "holds no rows", remedy)
    wanted = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
    return DataError(str(source), "holds no rows: no data file is there", f"it is read for {wanted}, also with .gz")


def read_texts(source: Path | str, field: str = "text") -> list[str]:
    """Calibration texts: the `field` of each row of what `read_rows` reads, or the paragraphs of plain text.

    A file without a data file's ending is plain text, unless it begins like JSON; a folder's *.txt files count too.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    texts = [text_of(row, field) for row in records(source, (field,), plain=field)]
    if not any(text.strip() for text in texts):
        raise DataError(str(source), "holds no text", 'give a text file, or JSONL with {"text": …} on each line')
    return texts


def text_of(row: FileRow, field: str) -> str:
    """A field of a row that must be text.

    Raises:
        DataError: it is missing, or is none that UTF-8 can hold.
    """
    value = row.get(field)
    if not isinstance(value, str):
        found = "is missing" if field not in row else f"is {shown(value)}, not text"
        raise DataError(row.where, f"field {field!r} {found}", f"the line has {shown_names(list(row), 'no fields')}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a pair of surrogates: no tokenizer takes it
        half = f"\\u{ord(value[error.start]):04x}, half a character, at position {error.start}"
        raise DataError(row.where, f"field {field!r} holds {half}", "mend or remove the line") from error
    return value


def usable_rows(rows: Sequence[Row], prepare: Callable[[Sequence[Row]], object]) -> list[Row]:
    """The rows of which `prepare` makes a batch, whatever it raises of others: those the log names and counts.

    Raises:
        DataError: none of them is left.
    """
    kept, out = list[Row](), list[tuple[str, str]]()
    for start in range(0, len(rows), CHECKED):
        part = rows[start : start + CHECKED]
        whole = _problem(part, prepare) is None
        for row in part:
            problem = None if whole else _problem([row], prepare)
            if problem is None:
                kept.append(row)
            else:
                out.append((place_of(row), problem))
    log = structlog.get_logger()
    for place, problem in out[:ROWS_NAMED]:
        log.warning("row left out: it cannot be prepared", row=place, problem=problem)
    if len(out) > ROWS_NAMED:
        log.warning("rows left out", count=len(out), of=len(rows))
    if out and not kept:
        problem = f"cannot be prepared ({out[0][1]}), nor can any other of {len(rows)} rows"
        raise DataError(out[0][0], problem, "give rows that fit the run's task, and the tokenizer of its model")
    return kept


def _problem(rows: Sequence[Row], prepare: Callable[[Sequence[Row]], object]) -> str | None:
    try:
        prepare(rows)
    except BaseException as error:
        return problem_of(error)
    return None


def problem_of(error: BaseException) -> str:
    """What a tokenizer raised, in one line; they raise all kinds, bare Exception and Rust's panics too.

    Raises:
        BaseException: the error itself, where it is about the process: a signal, an exit.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def encode_rows(rows: Sequence[Row]) -> bytes:
    """Rows as JSON lines; half a pair of surrogates, in a field that no task reads, stays the escape that it was."""
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows).encode(errors="backslashreplace")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSONL file atomically, or raise `DataError`: a crash leaves the old file or the new one."""
    try:
        write_atomically(path, encode_rows(rows))
    except OSError as error:
        raise DataError(str(path), f"cannot be written ({error.strerror})", "choose another folder") from error


def by_label(row: Row) -> int:
    """The class of a row whose field `label` is its number."""
    return int(row["label"])


def class_counts(rows: Sequence[Row], task: Task) -> list[int]:
    """How many rows there are of each class."""
    found = Counter(map(task.class_of, rows))
    return [found[number] for number in range(len(task.classes))]


def hold_out(
    rows: Sequence[Row], share: float, *, seed: int, class_of: ClassOf = by_label
) -> tuple[list[Row], list[Row]]:
    """Draw rows to be held out, of each label alike: both sides hold every label that has two rows or more.

    Args:
        rows: in any order, which decides nothing.
        share: of each label's rows, above 0 and below 1; at least one row, and never all.
        seed: ≥ 0; the same seed gives the same draw.
        class_of: the number of a row's class.

    Returns:
        (rows that stay, rows that are held out), each in a drawn order.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    groups = _by_label(rows, order, class_of)
    counts = [min(max(1, round(len(group) * share)), len(group) - 1) for group in groups]
    held = {int(index) for group, count in zip(groups, counts, strict=True) for index in group[:count]}
    return [rows[index] for index in order if index not in held], [rows[index] for index in order if index in held]


def value_of(row: Row, field: str) -> str:
    """The value of a field by which rows are divided, as text: a table knows no other.

    Raises:
        DataError: the row has no such field, or its value is neither text nor an integer.
    """
    value = row.get(field)
    if isinstance(value, str | int):
        return str(value)
    found = f"is {shown(value)}, neither text nor an integer" if field in row else "is missing"
    raise DataError(place_of(row), f"field {field!r} {found}", f"the row has {shown_names(list(row), 'no fields')}")


def partition(
    rows: Sequence[Row],
    nodes: int,
    how: Division,
    *,
    seed: int,
    alpha: float = 0.5,
    class_of: ClassOf = by_label,
    field: str | None = None,
) -> list[list[Row]]:
    """Divide rows among nodes; every node gets at least one, and the same seed gives the same division.

    Args:
        rows: at least `nodes` of them.
        nodes: ≥ 1.
        how: "iid" (shuffled, equal shares); "dirichlet" (each label's rows by shares drawn from Dirichlet(alpha), the
            smaller alpha the more skewed); "one-label" (node i gets rows of the i-th label found, modulo their number;
            with fewer nodes than labels the rows of the other labels stay out); "field" (node i gets the rows of the
            i-th value of a field, in order of their text, modulo their number; with fewer nodes than values a node gets
            several values).
        seed: ≥ 0.
        alpha: of the Dirichlet distribution, > 0.
        class_of: the number of a row's class.
        field: of "field".

    Raises:
        DataError: too few rows for so many nodes, a row without the field, or an argument out of range.
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
        parts = _fill_empty(_dirichlet(_by_label(rows, order, class_of), nodes, alpha, rng))
    elif how == "one-label":
        labels = _by_label(rows, order, class_of)
        parts = _one_each(labels, nodes, [f"label number {number}" for number in range(len(labels))])
    elif how == "field" and field is not None:
        values = {value: place for place, value in enumerate(sorted({value_of(row, field) for row in rows}))}
        groups = _by_label(rows, order, lambda row: values[value_of(row, field)])
        dealt = [np.concatenate(groups[node::nodes]) for node in range(min(nodes, len(groups)))]
        parts = _one_each(dealt, nodes, [f"{field} {shown(value)}" for value in values])
    elif how == "field":
        raise DataError("partition", "field needs the name of the field", 'such as "system"')
    else:
        raise DataError("partition", f"{how!r} is unknown", f"use one of {', '.join(get_args(Division))}")
    return [[rows[index] for index in rng.permutation(part)] for part in parts]


Indices = npt.NDArray[np.int64]


def _by_label(rows: Sequence[Row], order: Indices, class_of: ClassOf) -> list[Indices]:
    labels = np.array([class_of(rows[index]) for index in order])
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


def _one_each(groups: list[Indices], nodes: int, names: Sequence[str]) -> list[Indices]:
    """A group for each node, which nodes share where there are more of them than groups."""
    sharers = Counter(node % len(groups) for node in range(nodes))
    short = [label for label, count in sharers.items() if count > groups[label].size]
    if short:
        problem = f"{names[short[0]]} has {groups[short[0]].size} rows for {sharers[short[0]]} nodes"
        raise DataError("partition", problem, "use fewer nodes or more rows")
    pieces = {label: iter(np.array_split(groups[label], count)) for label, count in sharers.items()}
    return [next(pieces[node % len(groups)]) for node in range(nodes)]
