"""Figures of confidence: reliability diagrams with counts, and risk-coverage curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from lmms_plugin.analysis.groups import GRID, mean_bins
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.report.figures import drawing
from lmms_plugin.report.figures.drawing import BAND, NARROW, WIDE, DrawnFigure, Floats, Key, Margins, label, short, slug
from lmms_plugin.report.figures.palette import BAD, BAND_ALPHA, DENSE, GOOD, MUTED, Look, looks
from lmms_plugin.report.numbers.summary import Line, Scope, Summary, series
from lmms_plugin.report.numbers.tables import Column, ReportTable, number, rows_of, text, whole

PANELS_AT_FIRST = 12
_CONDITIONS = ((CLEAN, GOOD, "o"), ("shifted", BAD, "s"))
_Group = tuple[Key, list[Line]]


def reliability(scope: Scope, summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Draw reliability diagrams, one panel per method and bits, with clean and shifted data in one."""
    del summary
    shown = {name for name, _, _ in _CONDITIONS}
    lines = [line for line in scope.lines if line.condition in shown and not math.isnan(line.group.of("ece"))]
    groups = list(series(lines).items())
    for start in range(0, len(groups), PANELS_AT_FIRST):
        chosen = groups[start : start + PANELS_AT_FIRST]
        name = f"reliability-{slug(scope.title)}{f'-{start // PANELS_AT_FIRST + 1}' if start else ''}"
        yield DrawnFigure(
            name,
            scope.title if not start else f"{scope.title}, panels {start + 1} to {start + len(chosen)}",
            "Accuracy observed at each stated confidence: on the diagonal a model is right as often as it says, below"
            " it is overconfident. Larger points hold more answers; the bars below count them.",
            _reliability(chosen, across),
            _bins_table(name, scope, chosen),
            more=start > 0,
        )


def _reliability(groups: Sequence[_Group], across: int) -> Any:
    columns = min(across, len(groups))
    rows = math.ceil(len(groups) / columns)
    full = WIDE if across > 2 else NARROW
    conditions = {line.condition for _, members in groups for line in members}
    handles = [drawing.handle(colour, mark, name) for name, colour, mark in _CONDITIONS if name in conditions]
    width = full if columns == across else Margins().left + (full - Margins().left) * columns / across
    # The second of three rows shows the counts of the first, and the third is space before the next.
    figure, grid = drawing.panels(
        3 * rows,
        columns,
        width,
        2.75 * rows,
        handles,
        Margins(down=0.09, across=0.3, bottom=0.3),
        sharex=True,
        sharey="row",
        ratios=[3.4, 1.0, 0.75] * rows,
    )
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        axis, counts, gap = (grid[3 * row + k][column] for k in range(3))
        gap.set_visible(False)
        if place >= len(groups):
            axis.set_visible(False)
            counts.set_visible(False)
            continue
        _diagram(axis, counts, groups[place][1])
        axis.tick_params(labelbottom=False)
        if column == 0:
            axis.set_ylabel("accuracy")
            counts.set_ylabel("answers")
        if place + columns >= len(groups):
            counts.tick_params(labelbottom=True)
            counts.set_xlabel("confidence")
        else:
            counts.tick_params(labelbottom=False)
    return figure


def _diagram(axis: Any, counts: Any, members: Sequence[Line]) -> None:
    axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    errors = []
    for place, (condition, colour, mark) in enumerate(_CONDITIONS):
        lines = [line for line in members if line.condition == condition]
        if not lines:
            continue
        errors.append(f"{np.mean([line.group.of('ece') for line in lines]):.3f}")
        records, confidence, outcome = mean_bins([task for line in lines for task in line.tasks])
        filled = records > 0
        axis.plot(confidence[filled], outcome[filled], color=colour, linewidth=0.9, alpha=0.8, clip_on=False)
        sizes = 5 + 50 * records[filled] / max(records.max(), 1)
        axis.scatter(confidence[filled], outcome[filled], s=sizes, color=colour, marker=mark, clip_on=False, zorder=3)
        edges = np.arange(records.size) / records.size
        width = 0.42 / records.size
        counts.bar(edges + (0.27 + 0.46 * place) / records.size, records, width, color=colour)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_title(short(label((members[0].config.method, members[0].config.bits))))
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.annotate(
        f"ECE {' / '.join(errors)}", (1.0, 1.04), xycoords="axes fraction", fontsize=7, ha="right", color=MUTED
    )
    counts.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    counts.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    counts.grid(visible=False)


def _bins_table(name: str, scope: Scope, groups: Sequence[_Group]) -> ReportTable:
    columns = (
        Column("Model", numeric=False),
        Column("Condition", numeric=False),
        Column("Bin", "Confidences above the first and up to the second number", numeric=False),
        Column("Answers"),
        Column("Confidence"),
        Column("Accuracy"),
    )
    rows = []
    for key, members in groups:
        for condition in dict.fromkeys(line.condition for line in members):
            bins = mean_bins([task for line in members if line.condition == condition for task in line.tasks])
            count = bins.shape[1]
            rows += [
                [
                    text(label(key)),
                    text(condition),
                    text(f"{k / count:.2f} to {(k + 1) / count:.2f}"),
                    whole(int(records)),
                    number(confidence),
                    number(outcome),
                ]
                for k, (records, confidence, outcome) in enumerate(bins.T)
                if records
            ]
    return ReportTable(name, f"Reliability bins on {scope.title}", columns, rows_of(rows))


def risk_coverage(scope: Scope, summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Draw risk-coverage curves: one panel per number of bits, one figure per condition."""
    del summary
    for condition in scope.conditions:
        lines = [line for line in scope.under(condition) if not math.isnan(line.group.of("aurc"))]
        chosen = drawing.by_bits(lines)
        if not chosen:
            continue
        styles = looks(line.config.method for line in lines)
        curves = {key: _curves(members) for key, members in series(lines).items()}
        figure, axes = drawing.small_multiples(chosen, styles, across, "coverage", "risk")
        for axis, keys in zip(axes, chosen.values(), strict=True):
            _curve_panel(axis, {key: curves[key] for key in keys}, styles)
        axes[0].set_ylim(0, 1.04 * max(float(runs.max()) for runs in curves.values()) or 1.0)
        name = f"risk-{slug(scope.title)}-{slug(condition)}"
        yield DrawnFigure(
            name,
            f"{scope.title}, {condition}",
            "Risk is the share of errors among the questions answered, coverage the share of questions answered, the"
            " most confident first. The longer a curve stays low, the better confidence tells right from wrong; at"
            f" coverage 1 it reaches the error of the whole task. {BAND}",
            figure,
            _curve_table(name, scope, condition, curves),
        )


def _curves(lines: Sequence[Line]) -> Floats:
    """Return risk at each coverage, one row per run: the mean over its tasks."""
    found = []
    for line in lines:
        for run in line.runs:
            found.append(np.mean([run.measured.tasks[name].risk for name in line.group.tasks], axis=0))
    return np.stack(found)


def _curve_panel(axis: Any, curves: Mapping[Key, Floats], styles: Mapping[str, Look]) -> None:
    for key, runs in curves.items():
        look, mean = styles[key[0]], runs.mean(axis=0)
        axis.plot(GRID, mean, color=look.colour, linewidth=1.2 if key[0] == DENSE else 1.6)
        axis.plot(GRID[19::20], mean[19::20], look.mark, color=look.colour, linestyle="none", clip_on=False)
        if len(runs) > 1:
            low, high = runs.min(axis=0), runs.max(axis=0)
            axis.fill_between(GRID, low, high, color=look.colour, alpha=BAND_ALPHA, linewidth=0)
    axis.set(xlim=(0, 1))
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _curve_table(name: str, scope: Scope, condition: str, curves: Mapping[Key, Floats]) -> ReportTable:
    shown = range(10, 101, 10)
    columns = (Column("Model", numeric=False), *(Column(f"{percent} %", "Risk at this coverage") for percent in shown))
    rows = [
        [text(label(key)), *(number(float(runs.mean(axis=0)[percent - 1])) for percent in shown)]
        for key, runs in curves.items()
    ]
    return ReportTable(name, f"Risk by coverage on {scope.title}, {condition}", columns, rows_of(rows))
