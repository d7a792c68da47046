"""CSV tables that a spreadsheet opens as numbers and text."""

import csv
import io
from collections.abc import Iterable, Sequence

_FORMULAS = ("=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def comma_separated(rows: Iterable[Sequence[object]]) -> str:
    """Format rows as CSV, one line each; a text that a spreadsheet would run as a formula gets an apostrophe in front.

    Numbers stay numbers, also those that are already text (`-0.25`).
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[_inert(cell) for cell in row] for row in rows])
    return out.getvalue()


def _inert(cell: object) -> object:
    # OWASP, "CSV injection"; spreadsheets treat full-width signs like plain ones.
    if not isinstance(cell, str):
        return cell
    # Python's csv does not quote a carriage return, after which a spreadsheet begins a new line.
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{cell}" if cell.startswith(_FORMULAS) and not _is_number(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()
