"""Figures of shift: severity curves, and the loss of each quantizer under each shift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from lmms_plugin.analysis.groups import Task
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.report.figures import drawing
from lmms_plugin.report.figures.drawing import BAND, DrawnFigure, Floats, Key, Margins, label, short, slug
from lmms_plugin.report.figures.palette import BAD, BAND_ALPHA, GOOD, INK, looks
from lmms_plugin.report.numbers.summary import Line, Scope, Summary, series, spread
from lmms_plugin.report.numbers.tables import Column, ReportTable, number, rows_of, text, whole

_MEASURED = (("accuracy", "accuracy"), ("ece", "ECE"), ("aurc", "AURC"))
_STRONGEST = 0.8
_CELL, _ROW = 0.56, 0.25
_ABREAST, _TALL_ROW = 6, 0.27
"""On a phone: number of models side by side, and height of a row in inches."""


def severity(scope: Scope, summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Draw accuracy, ECE and AURC by severity of the shift."""
    for which in scope.conditions:
        steps = scope.severities(which)
        conditions = ({0: CLEAN} if scope.under(CLEAN) else {}) | steps
        if steps and len(conditions) > 1:
            for metric, name in _MEASURED:
                yield from _severity(scope, summary, which, conditions, metric, name, across)


def _severity(
    scope: Scope, summary: Summary, which: str, conditions: Mapping[int, str], metric: str, called: str, across: int
) -> Iterator[DrawnFigure]:
    lines = [line for condition in conditions.values() for line in scope.under(condition)]
    lines = [line for line in lines if not math.isnan(line.group.of(metric))]
    chosen = drawing.by_bits(lines)
    if not chosen:
        return
    styles = looks(line.config.method for line in lines)
    values = {key: _by_severity(members, conditions, metric) for key, members in series(lines).items()}
    figure, axes = drawing.small_multiples(chosen, styles, across, "severity, 0: clean", called)
    for axis, keys in zip(axes, chosen.values(), strict=True):
        for key in keys:
            look, points = styles[key[0]], values[key]
            mean, low, high = np.array(list(points.values())).T
            axis.plot(list(points), mean, color=look.colour, marker=look.mark)
            axis.fill_between(list(points), low, high, color=look.colour, alpha=BAND_ALPHA, linewidth=0)
        axis.set_xticks(list(conditions))
    name = f"severity-{slug(scope.title)}-{slug(which)}-{metric}"
    heads = (Column("clean" if step == 0 else f"severity {step}") for step in conditions)
    nothing = (math.nan, math.nan, math.nan)
    rows = [
        [text(label(key)), *(_ranged(points.get(step, nothing)) for step in conditions)]
        for key, points in values.items()
    ]
    yield DrawnFigure(
        name,
        f"{called} by severity: {scope.title}, {which}",
        f"The mean over all shifts at each severity. {BAND} For a single run it is the 95 % interval over images.",
        figure,
        ReportTable(
            name, f"{called} by severity, {scope.title}", (Column("Model", numeric=False), *heads), rows_of(rows)
        ),
        more=metric == _MEASURED[-1][0],
    )


def _by_severity(
    lines: Sequence[Line], conditions: Mapping[int, str], metric: str
) -> dict[int, tuple[float, float, float]]:
    """Return severity → mean and band; severities without runs are left out."""
    found = {}
    for step, condition in conditions.items():
        members = [line for line in lines if line.condition == condition]
        if members:
            found[step] = spread(members, metric)
    return found


def _ranged(value: tuple[float, float, float]) -> Any:
    return number(value[0], Interval(value[1], value[2]))


def heat(scope: Scope, summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Draw the loss of each quantizer under each shift against the unquantized model."""
    del summary
    losses, sizes = _losses(scope)
    shifts = sorted(sizes, key=lambda name: (name != CLEAN, name))
    if not losses or len(shifts) < 2:
        return
    means = [[np.mean(row[shift]) if shift in row else math.nan for shift in shifts] for row in losses.values()]
    values, labels = np.array(means), [label(key) for key in losses]
    name = f"heat-{slug(scope.title)}"
    words = [shift.replace("_", " ") for shift in shifts]
    counts = [text("answers per run"), *(whole(sizes[shift]) for shift in shifts)]
    rows = [[text(one), *(number(float(v), signed=True) for v in row)] for one, row in zip(labels, values, strict=True)]
    yield DrawnFigure(
        name,
        scope.title,
        "Accuracy less that of the unquantized model on the same task, in percentage points, mean over severities and"
        " runs. Orange cells lost, blue cells gained.",
        (_heat if across > 2 else tall_heat)(values, list(map(short, labels)), list(map(short, words))),
        ReportTable(
            name,
            f"Accuracy less that of the unquantized model on {scope.title}",
            (Column("Model", numeric=False), *map(Column, words)),
            rows_of([*rows, counts]),
        ),
    )


def _losses(scope: Scope) -> tuple[dict[Key, dict[str, list[float]]], dict[str, int]]:
    """Return method and bits → shift → differences of accuracy, one per task and run; and answers per shift."""
    found: dict[Key, dict[str, list[float]]] = {}
    sizes: dict[str, int] = {}
    for condition in scope.conditions:
        answered: dict[str, Task] = {}
        for line in scope.under(condition):
            if line.base is None:
                continue
            dense = {task.task: task for task in line.base.tasks}
            row = found.setdefault((line.config.method, line.config.bits), {})
            for task in line.tasks:
                difference = float(task.value[0] - dense[task.task].value[0])
                row.setdefault(task.place.shift or CLEAN, []).append(difference)
                answered[task.task] = task
        for task in answered.values():
            shift = task.place.shift or CLEAN
            sizes[shift] = sizes.get(shift, 0) + task.records
    return found, sizes


def _heat(values: Floats, labels: Sequence[str], shifts: Sequence[str]) -> Any:
    """Draw the heat map with one row per model and one column per shift."""
    rows, columns = values.shape
    margins = Margins(
        left=0.25 + 0.072 * max(map(len, labels)), right=0.75, top=0.15 + 0.055 * max(map(len, shifts)), bottom=0.1
    )
    width = margins.left + margins.right + _CELL * columns
    figure, grid = drawing.panels(1, 1, width, _ROW * rows, margins=margins)
    _cells(grid[0][0], values, labels, shifts, _strongest(values), 7.5)
    return figure


def tall_heat(values: Floats, labels: Sequence[str], shifts: Sequence[str]) -> Any:
    """Draw the heat map for a phone: one row per shift, a few models side by side, others in blocks below."""
    parts = [slice(k, k + _ABREAST) for k in range(0, len(labels), _ABREAST)]
    top = 0.15 + 0.07 * max(map(len, labels))
    margins = Margins(
        left=0.2 + 0.072 * max(map(len, shifts)),
        right=max(0.2, 0.06 * max(map(len, labels))),
        top=top,
        bottom=0.1,
        down=top + 0.15,
    )
    height = _TALL_ROW * len(shifts) * len(parts)
    figure, grid = drawing.panels(len(parts), 1, drawing.NARROW, height, margins=margins, sharex=False, sharey=False)
    for panel, part in zip(grid.ravel(), parts, strict=True):
        _cells(panel, values[part].T, shifts, labels[part], _strongest(values), 9.0)
        # The last block's cells are as wide as the others'.
        panel.set_xlim(0, min(_ABREAST, len(labels)))
    return figure


def _strongest(values: Floats) -> float:
    return max(float(np.nanmax(np.abs(values))), 0.01)


def _cells(
    axis: Any, values: Floats, down: Sequence[str], across: Sequence[str], strongest: float, size: float
) -> None:
    rows, columns = values.shape
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        face = BAD if value < 0 else GOOD
        # Opacity, so that weak cells fade into the page, light or dark.
        alpha = _STRONGEST * abs(value) / strongest
        axis.add_patch(Rectangle((column + 0.02, row + 0.04), 0.96, 0.92, facecolor=face, alpha=alpha, linewidth=0))
        shown = f"{100 * value:+z.0f}".replace("-", "\u2212")
        written = "0" if shown in ("+0", "\u22120") else shown
        axis.text(column + 0.5, row + 0.5, written, ha="center", va="center_baseline", fontsize=size)
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    axis.set_yticks(np.arange(rows) + 0.5, down, color=INK)
    axis.set_xticks(np.arange(columns) + 0.5, across, rotation=40, ha="left", rotation_mode="anchor", color=INK)
    axis.xaxis.tick_top()
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
