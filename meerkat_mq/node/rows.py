"""A node's rows, read again when its files have changed."""

from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from meerkat_mq.config import NodeConfig
from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError, within
from meerkat_mq.tasks.data import no_rows, read_rows
from meerkat_mq.tasks.sources import FileRow, data_files, records
from meerkat_mq.wire.descriptor import Task

_TOY_REMEDY = 'give JSON lines such as {"seed": 7}'

Stamp = tuple[tuple[str, int, int], ...]


class LocalRows:
    """The rows of a node's files, for a task; for the toy engine without one.

    Attributes:
        rows: as last read; at least one.
        left_out: how many more there were, which cannot be prepared.

    Raises:
        DataError: they cannot be read.
    """

    def __init__(self, config: NodeConfig, task: Task | None) -> None:
        self._source = config.data
        self._task = task
        self._stamp = _stamp(self._source)
        self._usable: Callable[[Sequence[Row]], list[Row]] = list
        self.left_out = 0
        with within("data"):
            self.rows = self._read()

    def check(self, usable: Callable[[Sequence[Row]], list[Row]]) -> None:
        """Keep the rows that can be prepared, now and after each change of the files.

        Args:
            usable: those of some rows; it names the others.

        Raises:
            DataError: there are none.
        """
        self._usable = usable
        with within("data"):
            self.rows = self._checked(self.rows)

    def _checked(self, rows: list[Row]) -> list[Row]:
        kept = self._usable(rows)
        self.left_out = len(rows) - len(kept)
        return kept

    def refresh(self) -> None:
        """Read the files again if one came, went or changed; what cannot be read is a warning, and the rows stay."""
        stamp = _stamp(self._source)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.rows = self._checked(self._read())
        except DataError as error:
            structlog.get_logger().warning("data refused, the rows before it stay", problem=str(error))
            return
        structlog.get_logger().info("data read again", rows=len(self.rows), left_out=self.left_out)

    def _read(self) -> list[Row]:
        return _toy_rows(self._source) if self._task is None else read_rows(self._source, self._task)


def _stamp(source: Path | str) -> Stamp:
    """Name, size and time of change of each file; () of a data set, and of what is not there."""
    if isinstance(source, str):
        return ()
    try:
        found = [(file, file.stat()) for file in data_files(source)]
    except (DataError, OSError):
        return ()
    return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file, stat in found)


def _toy_rows(source: Path | str) -> list[Row]:
    try:
        rows: list[Row] = [_toy_row(row) for row in records(source, ("seed",), "seed")]
    except DataError as error:
        raise DataError(error.where, error.problem, _TOY_REMEDY) from error
    if not rows:
        raise no_rows(source, _TOY_REMEDY)
    return rows


def _toy_row(row: FileRow) -> FileRow:
    if type(row.get("seed")) is not int or not 0 <= row["seed"] < 2**64:
        raise DataError(row.where, "has no integer seed from 0 to 2**64 - 1", _TOY_REMEDY)
    return row
