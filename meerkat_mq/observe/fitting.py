"""Tables that fit their terminal: numbers stay whole, words wrap, and the least of the columns go first."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from meerkat_mq.errors import printable, printable_lines

WIDE_GAP, NARROW_GAP = 2, 1
LONGEST_WORD = 20  # a longer one, such as a node's id, may be broken
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Column(Generic[RowT]):
    """A column.

    Attributes:
        cell: what it says of a row.
        left: where its cells stand; those of numbers stand to the right.
        words: may wrap between words, and within a very long one; what is not words, a number, is never broken.
        least: width that it has at least, for tables that come in pages.
        drop: where the terminal is too narrow, columns go in this order, 1 first; 0 stays.
        shown: False of one that has nothing to say in this table.
    """

    head: str
    cell: Callable[[RowT], str]
    left: bool = False
    words: bool = False
    least: int = 0
    drop: int = 0
    shown: bool = True


class FittingTable(Generic[RowT]):
    """A plain table, a line a row, that chooses its columns by the width that there is; names those that it leaves out.

    Args:
        style: rich's style of a row.
        most: rows that are shown; how many more there are stands below them.
        show_header: False where the heads stand above already.
    """

    def __init__(
        self, columns: Sequence[Column[RowT]], rows: Iterable[RowT], *, show_header: bool = True,
        style: Callable[[RowT], str | None] = lambda row: None, most: int | None = None,
    ) -> None:  # fmt: skip
        self._columns = [column for column in columns if column.shown]
        self._show_header = show_header
        rows = list(rows)
        self._left_out = 0 if most is None else max(0, len(rows) - most)
        self._rows = [
            ([printable_lines(column.cell(row)) for column in self._columns], style(row)) for row in rows[:most]
        ]
        self._least = [max(column.least, self._narrowest(index)) for index, column in enumerate(self._columns)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        chosen, gap = self._fit(options.max_width)
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=self._show_header)
        for index in chosen:
            column = self._columns[index]
            table.add_column(
                Text(printable(column.head)),
                justify="left" if column.left or column.words else "right",
                no_wrap=not column.words,
                overflow="fold",
                min_width=self._least[index],
            )
        for cells, style in self._rows:
            table.add_row(*(Text(cells[index]) for index in chosen), style=style)
        yield table
        if self._left_out:
            yield Text(f"… and {self._left_out:,} more")
        left_out = [column.head for index, column in enumerate(self._columns) if index not in chosen]
        if left_out and self._show_header:
            yield Text(f"too narrow for: {', '.join(left_out)}", style="dim")

    def _fit(self, width: int) -> tuple[list[int], int]:
        """The columns, and the gap between them."""
        chosen = list(range(len(self._columns)))

        def fits(gap: int) -> bool:
            return sum(self._least[index] + gap for index in chosen) - gap <= width

        if fits(WIDE_GAP):
            return chosen, WIDE_GAP
        drops = {column.drop: index for index, column in enumerate(self._columns) if column.drop}
        for _, index in sorted(drops.items()):
            if fits(NARROW_GAP):
                break
            chosen.remove(index)
        return chosen, NARROW_GAP

    def _narrowest(self, index: int) -> int:
        """What a column needs: its widest cell, or its widest word where words may wrap."""
        column, cells = self._columns[index], [cells[index] for cells, _ in self._rows]
        if not column.words:
            return max(map(len, [column.head, *cells]))
        words = (min(len(word), LONGEST_WORD) for cell in cells for word in cell.split())
        return max(len(column.head), *words, 0)
