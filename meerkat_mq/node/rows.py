"""A node's rows, read again when its files have changed."""

import json
from pathlib import Path

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError, within
from meerkat_mq.model.data import data_files, read_rows
from meerkat_mq.wire.descriptor import Task

_TOY_REMEDY = 'give JSON lines such as {"seed": 7}'

Stamp = tuple[tuple[str, int, int], ...]


class LocalRows:
    """The rows of a node's files, for a task; for the toy engine without one.

    Attributes:
        rows: as last read; at least one.

    Raises:
        DataError: they cannot be read.
    """

    def __init__(self, config: NodeConfig, task: Task | None) -> None:
        self._source = config.data
        self._task = task
        self._stamp = _stamp(self._source)
        with within("data"):
            self.rows = self._read()

    def refresh(self) -> None:
        """Read the files again if one came, went or changed; what cannot be read is a warning, and the rows stay."""
        stamp = _stamp(self._source)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.rows = self._read()
        except DataError as error:
            structlog.get_logger().warning("data refused, the rows before it stay", problem=str(error))
            return
        structlog.get_logger().info("data read again", rows=len(self.rows))

    def _read(self) -> list[Row]:
        return _toy_rows(Path(self._source)) if self._task is None else read_rows(self._source, self._task)


def _stamp(source: Path | str) -> Stamp:
    """Name, size and time of change of each file; () of a data set, and of what is not there."""
    if isinstance(source, str):
        return ()
    try:
        found = [(file, file.stat()) for file in data_files(source)]
    except (DataError, OSError):
        return ()
    return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file, stat in found)


def _toy_rows(source: Path) -> list[Row]:
    rows = [row for file in data_files(source) for row in _toy_file(file)]
    if not rows:
        raise DataError(str(source), "holds no rows", _TOY_REMEDY)
    return rows


def _toy_file(file: Path) -> list[Row]:
    try:
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(file), f"cannot be read ({error})", _TOY_REMEDY) from error
    return [_toy_row(line, f"{file}:{number}") for number, line in lines if line.strip()]


def _toy_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"is not JSON ({error})", _TOY_REMEDY) from error
    if not isinstance(row, dict) or type(row.get("seed")) is not int or not 0 <= row["seed"] < 2**64:
        raise DataError(where, "has no integer seed from 0 to 2**64 - 1", _TOY_REMEDY)
    return row
