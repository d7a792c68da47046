"""Tables of the report: for the page and as CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.utils.spreadsheets import comma_separated

NOTHING = "\u2013"


class TableCell(NamedTuple):
    """One entry.

    Attributes:
        text: As people read it.
        value: What it is sorted by and written to CSV as; None for nothing.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end.
        note: Small print below.
    """

    text: str
    value: float | str | None
    low: float = math.nan
    high: float = math.nan
    note: str = ""


class Column(NamedTuple):
    """One column.

    Attributes:
        title: Its heading.
        meaning: What it holds, in a sentence.
        numeric: Whether its entries are numbers.
        better: `high`, `low`, or "" where neither is better.
    """

    title: str
    meaning: str = ""
    numeric: bool = True
    better: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Attributes:
        name: For files and anchors.
        caption: What it shows.
        columns: Its columns; the first holds the headings of the rows.
        rows: Its rows, one cell per column.
        attributes: Per row what filters ask for; empty without filters.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    attributes: tuple[Mapping[str, str], ...] = field(default=())

    def csv(self) -> str:
        """Comma-separated, intervals in columns of their own."""
        ranged = [any(not math.isnan(row[k].low) for row in self.rows) for k in range(len(self.columns))]
        heads = zip(self.columns, ranged, strict=True)
        lines: list[list[object]] = [
            [name for c, r in heads for name in ((c.title, f"{c.title} low", f"{c.title} high") if r else (c.title,))]
        ]
        for row in self.rows:
            written: list[object] = []
            for cell, has in zip(row, ranged, strict=True):
                written.append(_plain(cell))
                written += [_number(cell.low), _number(cell.high)] if has else []
            lines.append(written)
        return comma_separated(lines)


def number(
    value: float | None, interval: Interval | None = None, *, digits: int = 3, signed: bool = False
) -> TableCell:
    """A cell of a number, with its interval if there is one."""
    if value is None or math.isnan(value):
        return TableCell(NOTHING, None)
    low, high = interval or (math.nan, math.nan)
    form = f"{'+' if signed else ''}.{digits}f"
    # A dash between two numbers of which one may have a minus sign would be hard to read.
    between = " to " if signed else "\u2013"
    note = "" if math.isnan(low) else f"{shown(low, form)}{between}{shown(high, form)}"
    return TableCell(shown(value, form), value, low, high, note)


def shown(value: float, form: str) -> str:
    """A number with a true minus sign, and none before zero."""
    return (
        f"{value:z{form}}".replace("-", "\u2212") if "+" not in form else f"{value:+z{form[1:]}}".replace("-", "\u2212")
    )


def text(value: str, note: str = "") -> TableCell:
    """A cell of text."""
    return TableCell(value, value, note=note)


def whole(value: int | None) -> TableCell:
    """A cell of a count."""
    return TableCell(NOTHING, None) if value is None else TableCell(f"{value:,}".replace(",", "\u202f"), float(value))


def rows_of(rows: Sequence[Sequence[TableCell]]) -> tuple[tuple[TableCell, ...], ...]:
    """Rows as a table keeps them."""
    return tuple(tuple(row) for row in rows)


def _plain(cell: TableCell) -> object:
    if isinstance(cell.value, float | int):
        return _number(cell.value)
    return f"{cell.value or ''}{f' ({cell.note})' if cell.note else ''}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
