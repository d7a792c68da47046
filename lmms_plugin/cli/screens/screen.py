"""One screen of text: the answer in sentences, tables as far as they fit, and how to see the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import NamedTuple

from lmms_plugin.utils.messages import counted

WIDTH, HEIGHT = 80, 40
"""Columns and lines of a screen: what a terminal has at least."""
NUMBERS = "each number: docs/metrics.md"
"""Where numbers are explained, for the last line."""
_LONGEST_ANSWER = 9
_GAP = 2
_LEAST_NAME = 16


class ScreenTable(NamedTuple):
    """A table on a screen. The first column is text, the others are aligned to the right unless named in `texts`.

    Attributes:
        headings: Headings of the columns.
        rows: Rows, one cell per heading; a cell may have several lines.
        noun: What a row is, for the line that counts those left out.
        title: Line above the headings; "" for none.
        texts: Indices of further columns that are text.
        hidden: Number of rows that were left out before, such as those of parts.
    """

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    noun: str = "row"
    title: str = ""
    texts: tuple[int, ...] = ()
    hidden: int = 0


def screen(answer: Sequence[str], tables: Sequence[ScreenTable], notes: Sequence[str] = (), rest: str = "") -> str:
    """Return at most 40 lines of at most 80 columns.

    Args:
        answer: Sentences that answer the question of the command.
        tables: Tables, the most important first; their rows share the lines that are left.
        notes: Lines below the answer, cut where they are too long.
        rest: Last line: how to see the rest. A line before it counts tables that are left out.
    """
    said = wrapped(" ".join(answer), _LONGEST_ANSWER)
    if notes:
        said += ["", *map(cut, notes)]
    room = HEIGHT - len(said) - (2 if rest else 0)
    full = [_lines(table) for table in tables if table.rows]
    there = [table for table in tables if table.rows]
    named = _titles([table.title for table in there])
    titles = [[*([title] if title else []), head] for title, (head, _) in zip(named, full, strict=True)]
    shown = _tables_that_fit(titles, full, room)
    lines = list(said)
    spare = room - sum(1 + len(title) for title in titles[:shown]) - (shown < len(full))
    shares = _shares([_needed(rows) for _, rows in full[:shown]], spare)
    for table, title, (_, rows), share in zip(there, titles, full, shares, strict=False):
        lines += ["", *title, *_fitted(rows, share, table.noun)]
    if shown < len(full):
        left = "".join(f"; {table.title}" for table in there[shown:] if table.title)
        lines.append(cut(f"... and {counted(len(full) - shown, 'more table')}{left}"))
    return "\n".join([*lines, *(["", cut(rest)] if rest else [])])


def listing(answer: Sequence[str], lines: Sequence[str], noun: str, rest: str = "") -> str:
    """Return an answer and as many of the lines as fit, each cut to the width, with the number of those left out."""
    head = [*wrapped(" ".join(answer), _LONGEST_ANSWER), ""]
    tail = ["", cut(rest)] if rest else []
    rows = [[cut(line)] for line in lines]
    return "\n".join([*head, *_fitted(rows, HEIGHT - len(head) - len(tail), noun), *tail])


def wrapped(text: str, most: int | None = None) -> list[str]:
    """Return text in lines of the screen's width; the last line ends in `…` where there are more than `most`."""
    return wrap(text, WIDTH, max_lines=most, placeholder=" …", break_on_hyphens=False)


def cut(line: str, width: int = WIDTH) -> str:
    """Return a line that is no longer than the width."""
    return line if len(line) <= width else f"{line[: width - 2].rstrip()} …"


def middle_cut(name: str, width: int) -> str:
    """Return a name without its middle where it is too long: names of tasks differ at their ends."""
    if len(name) <= width:
        return name
    end = (width - 1) * 3 // 5
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def cut_apart(names: Sequence[str], width: int) -> list[str]:
    """Return names without their middle where they are too long, so that names that differ read differently.

    What is kept is beginning and end; where that is alike, the names are numbered by their first appearance.
    """
    short = [middle_cut(name, width) for name in names]
    of: dict[str, list[str]] = {}
    for name, one in dict.fromkeys(zip(names, short, strict=True)):
        of.setdefault(one, []).append(name)
    tags = {name: f" ({k})" for alike in of.values() if len(alike) > 1 for k, name in enumerate(alike, start=1)}
    return [
        f"{middle_cut(name, width - len(tags[name]))}{tags[name]}" if name in tags else one
        for name, one in zip(names, short, strict=True)
    ]


def labelled(heads: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return lines of the screen's width with a label each, such as those of two runs, that read differently."""
    width = WIDTH - max(map(len, heads))
    return [f"{head}{label}" for head, label in zip(heads, cut_apart(labels, width), strict=True)]


def _titles(titles: Sequence[str]) -> list[str]:
    """Return titles in a line each: without their ends where that tells them apart, else without their middles."""
    short = [cut(title) for title in titles]
    return short if len(set(short)) == len(set(titles)) else cut_apart(titles, WIDTH)


def number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """Format a number; "" where it is undefined."""
    return "" if math.isnan(value) else f"{value:{'+' if signed else ''}z.{digits}f}"


def ends(low: float, high: float, digits: int = 3) -> str:
    """Format the ends of an interval of a number that is not negative; "" where there is none."""
    return "" if math.isnan(low) else f"{low:z.{digits}f}\N{EN DASH}{high:z.{digits}f}"


def _lines(table: ScreenTable) -> tuple[str, list[list[str]]]:
    """Return the line of headings and the lines of every row."""
    split = [[cell.split("\n") for cell in row] for row in table.rows]
    widths = [
        max(len(heading), *(len(line) for row in split for line in row[k])) for k, heading in enumerate(table.headings)
    ]
    others = sum(widths[1:]) + _GAP * (len(widths) - 1)
    widths[0] = max(min(widths[0], WIDTH - others), _LEAST_NAME)
    heads = _aligned(table.headings, widths, table.texts)
    names = iter(cut_apart([line for row in split for line in row[0]], widths[0]))
    split = [[[next(names) for _ in first], *others] for first, *others in split]
    rows = []
    for row in split:
        height = max(map(len, row))
        cells = [[*cell, *[""] * (height - len(cell))] for cell in row]
        rows.append([_aligned(line, widths, table.texts) for line in zip(*cells, strict=True)])
    return heads, rows


def _aligned(cells: Sequence[str], widths: Sequence[int], texts: Sequence[int]) -> str:
    first = f"{cells[0]:{widths[0]}}"
    others = [
        f"{cell:{'<' if k in texts else '>'}{width}}"
        for k, (cell, width) in enumerate(zip(cells[1:], widths[1:], strict=True), start=1)
    ]
    return cut((" " * _GAP).join([first, *others]).rstrip())


def _needed(rows: Sequence[Sequence[str]]) -> int:
    return sum(map(len, rows))


def _tables_that_fit(titles: Sequence[Sequence[str]], full: Sequence[tuple[str, list[list[str]]]], room: int) -> int:
    """Return how many tables fit with at least one row and the line that counts the others."""
    used = 0
    for k, (title, (_, rows)) in enumerate(zip(titles, full, strict=True)):
        used += 1 + len(title) + len(rows[0]) + (len(rows) > 1)
        if used + (k + 1 < len(full)) > room:
            return k
    return len(full)


def _shares(needed: Sequence[int], room: int) -> list[int]:
    """Deal lines to tables: nobody gets more than is needed, and what is left over goes to those that need more."""
    shares = [0] * len(needed)
    open_ = [k for k, lines in enumerate(needed) if lines]
    while open_ and room >= len(open_):
        each = room // len(open_)
        for k in open_:
            given = min(each, needed[k] - shares[k])
            shares[k] += given
            room -= given
        open_ = [k for k in open_ if shares[k] < needed[k]]
    for k in open_[:room]:
        shares[k] += 1
    return shares


def _fitted(rows: Sequence[Sequence[str]], room: int, noun: str) -> list[str]:
    """Return the lines of the first rows that fit, and a line that counts the others."""
    if _needed(rows) <= room:
        return [line for row in rows for line in row]
    lines: list[str] = []
    for k, row in enumerate(rows):
        if len(lines) + len(row) > room - 1:
            return [*lines, f"... and {counted(len(rows) - k, f'more {noun}')}"]
        lines += row
    return lines
