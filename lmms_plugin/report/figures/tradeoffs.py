"""Figures of accuracy and reliability against memory and speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmms_plugin.report.figures import drawing
from lmms_plugin.report.figures.drawing import NARROW, WIDE, DrawnFigure, Margins, slug
from lmms_plugin.report.figures.palette import INK, MUTED, Look, looks
from lmms_plugin.report.numbers.contents import costs, not_dominated
from lmms_plugin.report.numbers.summary import Line, Scope, Summary
from lmms_plugin.report.numbers.tables import TableCell, text

_LABELLED = 14
"""Markers per panel up to which each is labelled with its bits; above, only those on the Pareto front."""
_PLAIN = 60
"""Markers per panel from which intervals are left out."""
_BESIDE = ((4, 3), (4, -8), (-9, 3), (-9, -8), (4, 11), (4, -16))
"""Possible offsets of a label from its marker in points, the best first."""
_SAME = 5
"""Distance in points up to which markers with equal labels share one."""
_UP, _DOWN = "\u2191", "\u2193"


class Axis(NamedTuple):
    """Horizontal axis of a panel.

    Attributes:
        field: Field of `Cost`.
        label: Label with its unit.
        factor: Factor from the field's unit.
        more: Whether larger is better.
    """

    field: str
    label: str
    factor: float
    more: bool


class Goal(NamedTuple):
    """Vertical axis of a panel."""

    metric: str
    label: str
    high: bool


_AXES = (
    Axis("bytes", "\u2190 weights (MB)", 1e-6, False),
    Axis("tokens_per_second", "tokens per second \u2192", 1.0, True),
)
_GOALS = (Goal("accuracy", "accuracy", True), Goal("aurc", "AURC", False))


def draw(scope: Scope, summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Draw one figure per model and dataset, clean above shifted."""
    chosen = [(condition, lines) for condition in scope.conditions if (lines := scope.under(condition))]
    axes = [axis for axis in _AXES if sum(_cost(line, axis) is not None for line in chosen[0][1]) > 1]
    if not axes:
        return
    goals = [
        goal for goal in _GOALS if any(not math.isnan(line.group.of(goal.metric)) for _, ls in chosen for line in ls)
    ]
    cases = [(condition, lines, goal, axis) for condition, lines in chosen for axis in axes for goal in goals]
    columns = min(across, len(axes) * len(goals))
    rows = math.ceil(len(cases) / columns)
    styles = looks(line.config.method for line in scope.lines)
    handles = drawing.method_handles(styles, line=False)
    margins = Margins(across=0.55, down=0.72)
    width = WIDE if across > 2 else NARROW
    figure, grid = drawing.panels(rows, columns, width, 1.9 * rows, handles, margins, sharex=False, sharey=False)
    for place, (condition, lines, goal, axis) in enumerate(cases):
        panel = grid.ravel()[place]
        _panel(panel, lines, goal, axis, styles)
        panel.set_title(f"{goal.label} {_UP if goal.high else _DOWN} {condition}", fontsize=9)
    for panel in grid.ravel()[len(cases) :]:
        panel.set_visible(False)
    name = f"pareto-{slug(scope.title)}"
    yield DrawnFigure(
        name,
        scope.title,
        "Each mark is one configuration, with its bits beside it; a line joins those that nothing beats in both of a"
        " panel's measures, a thin bar is the interval over images, arrows point to what is better. "
        f" {unbeaten(chosen)}",
        figure,
        costs(name, f"Accuracy, reliability and cost on {scope.title}", "Condition", _rows(chosen), summary),
    )


def unbeaten(chosen: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """Describe the configurations on the Pareto front; a short sentence if that is all of them."""
    told = []
    for condition, lines in chosen:
        kept = not_dominated(lines)
        if len(kept) < len(lines):
            told.append(f"{condition}: {drawing.listed(line.config.label for line in kept)}")
    if not told:
        return "No configuration is beaten by another one in accuracy, AURC, memory and speed at once."
    rest = "; under the other conditions none is" if len(told) < len(chosen) else ""
    return f"Not beaten in accuracy, AURC, memory and speed at once, {'; '.join(told)}{rest}."


def _panel(panel: Any, lines: Sequence[Line], goal: Goal, axis: Axis, styles: Mapping[str, Look]) -> None:
    points = [
        (cost * axis.factor, line.group.of(goal.metric), line)
        for line in lines
        if (cost := _cost(line, axis)) is not None and not math.isnan(line.group.of(goal.metric))
    ]
    front = _front([(x, y) for x, y, _ in points], high=goal.high, more=axis.more)
    few = len(points) < _PLAIN
    for x, _, line in points if few else ():
        low, high = line.group.interval(goal.metric)
        if not math.isnan(low):
            panel.plot([x, x], [low, high], color=styles[line.config.method].colour, alpha=0.4, linewidth=1.0, zorder=2)
    # One artist for all marks of a method: a study has thousands, and each artist costs a hundred times a mark.
    for method in dict.fromkeys(line.config.method for _, _, line in points):
        look, marks = styles[method], [(x, y) for x, y, line in points if line.config.method == method]
        panel.plot(*zip(*marks, strict=True), look.mark, color=look.colour, zorder=3, alpha=1.0 if few else 0.6)
    if len(front) > 1:
        panel.plot(*zip(*front, strict=True), color=INK, linewidth=0.9, alpha=0.6, zorder=1)
    panel.set_xlabel(axis.label)
    panel.margins(0.1)
    label_marks(panel, [(x, y, _bits(line)) for x, y, line in points if len(points) <= _LABELLED or (x, y) in front])


def _bits(line: Line) -> str:
    """Return the label of a marker; none for the unquantized model, which ran in 16 or 32 bits."""
    return "" if line.config.dense or line.config.bits is None else str(line.config.bits)


def label_marks(panel: Any, marks: Sequence[tuple[float, float, str]]) -> None:
    """Label each marker where no other label is; overlapping markers share a label.

    Args:
        panel: Axes with limits set.
        marks: Data coordinates and text of each marker.
    """
    points = panel.transData.transform([(x, y) for x, y, _ in marks]) * 72 / panel.figure.dpi if marks else []
    placed: list[tuple[float, float]] = []
    labelled: list[tuple[float, float, str]] = []
    for (x, y, written), (left, up) in zip(marks, points, strict=True):
        if not written or any(math.dist((left, up), at) < _SAME and written == said for *at, said in labelled):
            continue
        free = (at for at in _BESIDE if all(abs(left + at[0] - a) > 8 or abs(up + at[1] - b) > 7 for a, b in placed))
        right, above = next(free, _BESIDE[0])
        placed.append((left + right, up + above))
        labelled.append((left, up, written))
        panel.annotate(written, (x, y), (right, above), textcoords="offset points", fontsize=7, color=MUTED)


def _cost(line: Line, axis: Axis) -> float | None:
    value: float | None = getattr(line.cost, axis.field)
    return value


def _front(points: Sequence[tuple[float, float]], *, high: bool, more: bool) -> list[tuple[float, float]]:
    """Return the Pareto front, by x; `high` says whether large y is better, `more` whether large x is."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(
        set(points), key=lambda point: (-point[0] if more else point[0], -point[1] if high else point[1])
    ):
        if not kept or (y > kept[-1][1] if high else y < kept[-1][1]):
            kept.append((x, y))
    return sorted(kept)


def _rows(chosen: Sequence[tuple[str, Sequence[Line]]]) -> list[tuple[TableCell, Line]]:
    return [(text(condition), line) for condition, lines in chosen for line in lines]
