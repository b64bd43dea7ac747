"""A node's rows, read again when its files have changed."""

from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from meerkat_mq.core.step import Row
from meerkat_mq.errors import DataError, within
from meerkat_mq.tasks.sources import data_files

Stamp = tuple[tuple[str, int, int], ...]


class LocalRows:
    """The rows of a node's files.

    Args:
        source: file, folder, or `hf:…`.
        read: reads and checks its rows.

    Attributes:
        rows: as last read; at least one.
        left_out: how many more there were, which cannot be prepared.

    Raises:
        DataError: they cannot be read.
    """

    def __init__(self, source: Path | str, read: Callable[[Path | str], list[Row]]) -> None:
        self._source = source
        self._read = read
        self._stamp = _stamp(self._source)
        self._usable: Callable[[Sequence[Row]], list[Row]] = list
        self.left_out = 0
        with within("data"):
            self.rows = self._read(source)

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
            self.rows = self._checked(self._read(self._source))
        except DataError as error:
            structlog.get_logger().warning("data refused, the rows before it stay", problem=str(error))
            return
        structlog.get_logger().info("data read again", rows=len(self.rows), left_out=self.left_out)


def _stamp(source: Path | str) -> Stamp:
    """Name, size and time of change of each file; () of a data set, and of what is not there."""
    if isinstance(source, str):
        return ()
    try:
        found = [(file, file.stat()) for file in data_files(source)]
    except (DataError, OSError):
        return ()
    return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file, stat in found)
