"""The figure that carries the verdict: what quantization loses in accuracy, reliability and guarantee."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_plugin.report.figures import drawing
from lmms_plugin.report.figures.drawing import NARROW, WIDE, DrawnFigure, Margins, handle, short, slug
from lmms_plugin.report.figures.palette import INK, MUTED, looks
from lmms_plugin.report.numbers.lost_numbers import LOSSES, Loss, Lost, lost
from lmms_plugin.report.numbers.summary import Scope, Summary
from lmms_plugin.report.numbers.tables import Column, ReportTable, number, rows_of, text

MOST = 24
"""Configurations that are drawn; those with the largest losses come first."""
_ROW = 0.3
"""Height of a configuration, in inches."""


def draw(scope: Scope, summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Draw what every configuration loses against the unquantized model, clean and shifted, with intervals."""
    found = lost(scope)
    if not found:
        return
    named = {summary.name(config): of for config, of in found.items()}
    shown = dict(list(named.items())[:MOST])
    conditions = list(dict.fromkeys(one for of in found.values() for one in of))
    name = f"lost-{slug(scope.title)}"
    left = "" if len(found) <= MOST else f" The {MOST} of {len(found)} that lose most accuracy are drawn."
    yield DrawnFigure(
        name,
        scope.title,
        "Difference from the unquantized model in points, paired by image, with"
        f" {100 * summary.level:g} % intervals: left of the line it is worse.{left}",
        _figure(shown, conditions, across),
        _table(name, scope, named),
    )


def _figure(shown: Mapping[str, Mapping[str, Lost]], conditions: Sequence[str], across: int) -> Any:
    wide = across > 2
    tones = looks(conditions)
    handles = [handle(tones[one].colour, tones[one].mark, one, line=False) for one in conditions]
    left = 0.25 + 0.072 * max(len(short(name)) for name in shown)
    rows, columns = (1, len(LOSSES)) if wide else (len(LOSSES), 1)
    height = max(1.2, _ROW * len(shown) + 0.3)
    margins = Margins(left=left, across=0.3, down=0.7)
    size = WIDE if wide else NARROW
    figure, grid = drawing.panels(rows, columns, size, height * rows, handles, margins, sharex=False, sharey=True)
    for axis, loss in zip(grid.ravel(), LOSSES, strict=True):
        _panel(axis, shown, conditions, loss, tones)
    return figure


def _panel(
    axis: Any, shown: Mapping[str, Mapping[str, Lost]], conditions: Sequence[str], loss: Loss, tones: Mapping[str, Any]
) -> None:
    step = 0.6 / max(len(conditions), 1)
    for place, of in enumerate(shown.values()):
        for k, condition in enumerate(conditions):
            one = of[condition].of(loss) if condition in of else None
            if one is None:
                continue
            sign = -100.0 if loss.high_is_bad else 100.0
            at, look = place + step * (k - (len(conditions) - 1) / 2), tones[condition]
            ends = [sign * end for end in one.interval]
            if not math.isnan(ends[0]):
                axis.plot(ends, [at, at], color=look.colour, alpha=0.55, linewidth=1.6, zorder=2)
            axis.plot(sign * one.value, at, look.mark, color=look.colour, zorder=3)
    axis.axvline(0.0, color=INK, linewidth=0.9, alpha=0.6, zorder=1)
    axis.set_yticks(range(len(shown)), [short(name) for name in shown])
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_title(loss.title)
    axis.set_xlabel(f"{loss.label}, points", color=MUTED)
    axis.margins(x=0.08)


def _table(name: str, scope: Scope, found: Mapping[str, Mapping[str, Lost]]) -> ReportTable:
    columns = (
        Column("Model", numeric=False),
        Column("Condition", numeric=False),
        *(Column(loss.column, better="low" if loss.high_is_bad else "high") for loss in LOSSES),
    )
    rows = []
    for config, of in found.items():
        for condition, values in of.items():
            cells = [values.of(loss) for loss in LOSSES]
            numbers = (number(one.value, one.interval, signed=True) if one else number(None) for one in cells)
            rows.append([text(config), text(condition), *numbers])
    return ReportTable(name, f"Differences from the unquantized model on {scope.title}", columns, rows_of(rows))
