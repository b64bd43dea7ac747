"""What a sweep leaves: `results.jsonl`, a row a cell, and `results.md`, the mean and spread over seeds."""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meerkat_mq.core.files import write_atomically, writing
from meerkat_mq.core.foreign import parse_json
from meerkat_mq.errors import DataError
from meerkat_mq.observe.figures import DASH, human_bytes
from meerkat_mq.observe.markdown import escaped
from meerkat_mq.observe.markdown import table as markdown_table

RESULTS_FILE = "results.jsonl"
TABLE_FILE = "results.md"

Row = Mapping[str, Any]
Cells = Callable[[Sequence[Row]], str]

_SMALL = 10.0
_LEGEND = (
    "Mean ± standard deviation over seeds; own mix: accuracy on each node's own label mix, mean and least over nodes; "
    "passes of all nodes; bytes of a node."
)
_AXES = ("method", "task", "split", "local_steps", "lr", "from_layer", "evaluated_on", "budget")
SETTINGS = (
    "optimiser", "mask", "density", "rank", "eps", "directions", "perturbations", "early_stopping", "nodes",
    "batch_size", "max_tokens", "eval_rows", "tune_rows", "model", "dtype", "device",
)  # fmt: skip
_HEADINGS = {
    "local_steps": "T", "from_layer": "from layer", "evaluated_on": "evaluated on",
    "early_stopping": "early stopping", "batch_size": "batch size", "max_tokens": "tokens",
    "eval_rows": "rows evaluated", "tune_rows": "rows for tuning",
}  # fmt: skip


class Results:
    """The rows of `results.jsonl`, appended one by one; of each key the newest, in the order of the file."""

    def __init__(self, folder: Path) -> None:
        """Read the file, and cut off a last line that a crash tore; DataError where another is damaged."""
        self._file, self._table = folder / RESULTS_FILE, folder / TABLE_FILE
        self.rows: dict[str, Row] = {}
        try:
            data = self._file.read_bytes() if self._file.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self._file, whole)
        except OSError as error:
            raise DataError(str(self._file), f"cannot be used ({error.strerror})", "name another folder") from error
        lines = data[:whole].decode(errors="replace").split("\n")[:-1]  # a name may hold another line separator
        for number, line in enumerate(lines, start=1):
            self._take(_parsed(line, f"{self._file}:{number}"))

    def _take(self, row: Row) -> None:
        self.rows.pop(row["key"], None)
        self.rows[row["key"]] = row

    def finished(self, key: str) -> bool:
        """Whether a cell has a row that is no failure."""
        return key in self.rows and "failed" not in self.rows[key]

    def add(self, row: Row) -> None:
        """Append a row, durably, or raise DataError; then write the table anew. What is not finite becomes null."""
        row = _finite(row)
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with writing(str(self._file), "name another folder", DataError):
            with self._file.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self._take(row)
            write_atomically(self._table, table(self.rows.values()).encode(), durable=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _parsed(line: str, where: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(where, f"is not JSON ({error})", "remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise DataError(where, "is no row of a sweep", "remove the line")
    return row


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table: a line for each place in the grid, mean ± standard deviation over its seeds.

    Axes with one value in the whole grid are named above the table instead of in a column. Rows that agree in all axes
    but not in other settings have a line each, and columns for the settings that differ.
    """
    rows = list(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*(row.get(axis) for axis in _AXES), row["setting"]), []).append(row)
    values = {axis: {group[place] for group in groups} for place, axis in enumerate(_AXES)}
    shown = [axis for axis in _AXES if len(values[axis]) > 1 or axis == "method"]
    alike = {axis: next(iter(values[axis])) for axis in _AXES if axis not in shown}
    same = [f"{_HEADINGS.get(axis, axis)} {_plain(value)}" for axis, value in alike.items() if value is not None]
    shown += _telling(groups)
    columns = [*_COLUMNS, *((name, cell) for name, key, cell in _SOMETIMES if any(row.get(key) for row in rows))]
    columns += [(name, cell) for name, key, cell in _WHERE_KNOWN if any(row.get(key) is not None for row in rows)]
    heads = [_HEADINGS.get(axis, axis) for axis in shown] + [name for name, _ in columns]
    lines = [
        "# Results of a sweep",
        "",
        f"Same in all lines: {escaped(', '.join(same))}. {_LEGEND}",
        "",
    ]
    cells = []
    methods = list(dict.fromkeys(group[0] for group in groups))
    for _, members in sorted(groups.items(), key=lambda item: _order(item[0], methods)):
        finished = [row for row in members if "failed" not in row]
        place = [_plain(members[0].get(axis)) for axis in shown]
        cells.append([*place, *(cell(finished) for _, cell in columns)])
    lines += markdown_table(heads, cells)
    failed = [row for members in groups.values() for row in members if "failed" in row]
    if failed:
        lines += ["", "Failed, tried again at the next start:", ""]
        for row in failed:
            lines.append("- " + escaped(f"{row['method']}, {row['task']}, seed {row['seed']}: {row['failed']}"))
    return "\n".join(lines) + "\n"


def _telling(groups: Mapping[tuple[Any, ...], Sequence[Row]]) -> list[str]:
    """Settings in which lines of one place differ."""
    places: dict[tuple[Any, ...], list[Row]] = {}
    for group, members in groups.items():
        places.setdefault(group[:-1], []).append(members[0])
    return [name for name in SETTINGS if any(len({row.get(name) for row in same}) > 1 for same in places.values())]


def _order(group: tuple[Any, ...], methods: Sequence[str]) -> tuple[Any, ...]:
    return methods.index(group[0]), *((value is not None, value or 0) for value in group[1:])


def _plain(value: object) -> str:
    return DASH if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation, one value as it is, none as a dash."""
    if not values:
        return DASH
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _mean(rows: Sequence[Row], name: str, write: Callable[[float], str]) -> str:
    values = _values(rows, name)
    return write(statistics.fmean(values)) if values else DASH


def _seeds(rows: Sequence[Row]) -> str:
    broken = sum(bool(row.get("diverged")) for row in rows)
    return f"{len(rows)}" + (f" ({broken} diverged)" if broken else "")


def _rounded(value: float) -> str:
    return f"{value:,.1f}" if value < _SMALL else f"{value:,.0f}"


def _bytes(rows: Sequence[Row]) -> str:
    up, down = (_mean(rows, f"bytes_{way}", human_bytes) for way in ("up", "down"))
    return DASH if DASH in (up, down) else f"{up} / {down}"


def _energy(rows: Sequence[Row]) -> str:
    sources = sorted({row["energy_source"] for row in rows if row.get("energy_source")} - {"rapl"})
    of = f" ({', '.join(sources)})" * bool(sources)
    return _mean(rows, "energy_joules", lambda joules: f"{_rounded(joules)} J{of}")


def _early_stopped(rows: Sequence[Row]) -> str:
    newest = [
        {found["node"]: found["early_stopped"] for found in row["judgements"]} for row in rows if "judgements" in row
    ]
    if not any(newest):
        return DASH
    stopped = statistics.fmean(sum(nodes.values()) for nodes in newest)
    return f"{stopped:.1f} of {statistics.fmean(map(len, newest)):.3g}"


_COLUMNS: tuple[tuple[str, Cells], ...] = (
    ("seeds", _seeds),
    ("accuracy before", lambda rows: spread(_values(rows, "accuracy_before"))),
    ("accuracy", lambda rows: spread(_values(rows, "accuracy"))),
    ("own mix", lambda rows: spread(_values(rows, "own_mix_mean"))),
    ("own mix, least", lambda rows: spread(_values(rows, "own_mix_min"))),
    ("loss", lambda rows: spread(_values(rows, "loss"))),
    ("passes", lambda rows: _mean(rows, "forward_passes", "{:,.0f}".format)),
    ("CPU s", lambda rows: _mean(rows, "cpu_seconds", _rounded)),
    ("bytes up / down", _bytes),
    ("peak memory", lambda rows: _mean(rows, "peak_memory_mib", "{:,.0f} MiB".format)),
    ("energy", _energy),
)
_SOMETIMES: tuple[tuple[str, str, Cells], ...] = (  # where a row has the key, and more than 0
    ("refused", "refused", lambda rows: _mean(rows, "refused", "{:,.1f}".format)),
    ("early-stopped", "judgements", _early_stopped),
)
_WHERE_KNOWN: tuple[tuple[str, str, Cells], ...] = (  # where a row has the key
    ("balanced before", "balanced_accuracy_before", lambda rows: spread(_values(rows, "balanced_accuracy_before"))),
    ("balanced accuracy", "balanced_accuracy", lambda rows: spread(_values(rows, "balanced_accuracy"))),
    ("perplexity before", "perplexity_before", lambda rows: spread(_values(rows, "perplexity_before"), 2)),
    ("perplexity", "perplexity", lambda rows: spread(_values(rows, "perplexity"), 2)),
    ("tokens right", "token_accuracy", lambda rows: spread(_values(rows, "token_accuracy"))),
    ("exact matches", "exact_match", lambda rows: spread(_values(rows, "exact_match"))),
)
