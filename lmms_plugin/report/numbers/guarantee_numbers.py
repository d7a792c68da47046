"""The section of the report on a guarantee, from what `lmms-plugin guarantee --output` wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.report.numbers import tables
from lmms_plugin.report.numbers.tables import Column, ReportTable, number, text, whole
from lmms_plugin.utils.reading import accounts
from lmms_plugin.utils.reading.accounts import Account

GUARANTEE = "guarantee.json"
"""File of a guarantee, in the folder of the results."""
_Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class _ToldCell(Account):
    """Schema of a judged task in `guarantee.json`."""

    run: str
    task: str
    verdict: str
    risk: _Share | None
    low: _Share
    high: _Share
    coverage: _Share | None
    flipped_high: _Share | None = None
    documents: int
    images: int


class _ToldGuarantee(Account):
    """Schema of `guarantee.json`."""

    sentences: list[str]
    cells: list[_ToldCell]


@dataclass(frozen=True)
class ReportedGuarantee:
    """A guarantee for the report.

    Attributes:
        sentences: What is promised, and where it is kept.
        table: Every judged task.
    """

    sentences: tuple[str, ...]
    table: ReportTable


def read(path: Path) -> ReportedGuarantee | None:
    """Read the guarantee of a folder of results; None where there is none.

    Raises:
        ValueError: The file is damaged.
    """
    file = (path if path.is_dir() else path.parent) / GUARANTEE
    if not file.is_file():
        return None
    told = _ToldGuarantee.model_validate(accounts.read(file, _ToldGuarantee))
    columns = (
        Column("Run", "Run that the threshold is judged on", numeric=False),
        Column("Task", numeric=False),
        Column("Guarantee", "Shown to hold, shown to be broken (by Holm over all tasks), or open", numeric=False),
        Column(
            "Risk", "Loss of what is accepted, with bounds that each hold with the stated probability", better="low"
        ),
        Column("Accepted", "Share of the answers that the threshold accepts", better="high"),
        Column("Flipped", "Upper bound of the share that is accepted, and lost to quantization", better="low"),
        Column("Judged", "Answers, and below them images"),
    )
    rows = [
        [
            text(cell.run),
            text(cell.task),
            text(cell.verdict),
            number(math.nan if cell.risk is None else cell.risk, Interval(cell.low, cell.high)),
            number(math.nan if cell.coverage is None else cell.coverage),
            number(math.nan if cell.flipped_high is None else cell.flipped_high),
            whole(cell.documents)._replace(note=f"{cell.images} images"),
        ]
        for cell in told.cells
    ]
    table = ReportTable("guarantee", "Every judged task", columns, tables.rows_of(rows))
    return ReportedGuarantee(tuple(told.sentences), table)
