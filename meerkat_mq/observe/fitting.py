"""Tables that fit their terminal: numbers stay whole, words wrap, and the least of the columns go first."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from meerkat_mq.errors import printable

WIDE_GAP, NARROW_GAP = 2, 1
LONGEST_WORD = 20  # a longer one, such as a node's id, may be broken


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        right: numbers stand to the right.
        words: may wrap between words, and within a very long one; what is not words, a number, is never broken.
        least: width that it has at least, for tables that come in pages.
        drop: where the terminal is too narrow, columns go in this order, 1 first; 0 stays.
    """

    head: str
    right: bool = False
    words: bool = False
    least: int = 0
    drop: int = 0


@dataclass
class FittingTable:
    """A plain table that chooses its columns by the width that there is; names those that it leaves out."""

    columns: Sequence[Column]
    show_header: bool = True
    _rows: list[tuple[tuple[str, ...], str | None]] = field(default_factory=list)

    def add(self, *cells: str, style: str | None = None) -> None:
        """A row, a cell a column."""
        self._rows.append((tuple("\n".join(map(printable, cell.split("\n"))) for cell in cells), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        chosen, gap = self._fit(options.max_width)
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=self.show_header)
        for index in chosen:
            column = self.columns[index]
            table.add_column(
                Text(column.head),
                justify="right" if column.right else "left",
                no_wrap=not column.words,
                overflow="fold",
                min_width=max(column.least, self._narrowest(index)),
            )
        for cells, style in self._rows:
            table.add_row(*(Text(cells[index]) for index in chosen), style=style)
        yield table
        left_out = [column.head for index, column in enumerate(self.columns) if index not in chosen]
        if left_out and self.show_header:
            yield Text(f"too narrow for: {', '.join(left_out)}", style="dim")

    def _fit(self, width: int) -> tuple[list[int], int]:
        """The columns, and the gap between them."""
        chosen = list(range(len(self.columns)))
        if self._width(chosen, WIDE_GAP) <= width:
            return chosen, WIDE_GAP
        expendable = sorted((index for index in chosen if self.columns[index].drop), key=lambda i: self.columns[i].drop)
        for index in expendable:
            if self._width(chosen, NARROW_GAP) <= width:
                break
            chosen.remove(index)
        return chosen, NARROW_GAP

    def _width(self, chosen: Sequence[int], gap: int) -> int:
        return sum(max(self.columns[index].least, self._narrowest(index)) for index in chosen) + gap * (len(chosen) - 1)

    def _narrowest(self, index: int) -> int:
        """What a column needs: its widest cell, or its widest word where words may wrap."""
        column, cells = self.columns[index], [cells[index] for cells, _ in self._rows]
        if not column.words:
            return max(map(len, [column.head, *cells]))
        words = (min(len(word), LONGEST_WORD) for cell in cells for word in cell.split())
        return max(len(column.head), *words, 0)
