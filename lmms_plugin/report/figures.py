"""The figures of the report, drawn with matplotlib; each says in words what it shows and holds its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lmms_plugin.report.contents import not_dominated
from lmms_plugin.report.measuring import CLEAN, GRID, mean_bins
from lmms_plugin.report.palette import BAD, BAND_ALPHA, DENSE, GOOD, INK, MUTED, RULE, Look, looks
from lmms_plugin.report.summary import Line, Scope, Summary, series, spread, tasks_of
from lmms_plugin.report.tables import Cell, Column, Table, number, rows_of, text, whole

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "semibold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
}
PANELS_AT_FIRST = 12
_PANEL = 2.35


class Drawn(NamedTuple):
    """A figure.

    Attributes:
        name: For files and anchors.
        title: In a line.
        says: What it shows and how to read it.
        figure: The drawing.
        table: Its numbers.
        more: Whether it belongs to what is folded away at first.
    """

    name: str
    title: str
    says: str
    figure: Figure
    table: Table
    more: bool = False


def every(summary: Summary, across: int = 4) -> dict[str, list[Drawn]]:
    """All figures by section, those with nothing to show left out.

    Args:
        summary: What to draw.
        across: Panels side by side: 4 for a page, 2 for a phone.
    """
    makers: dict[str, Callable[[Scope, Summary, int], Iterator[Drawn]]] = {
        "pareto": pareto,
        "reliability": reliability,
        "risk": risk_coverage,
        "severity": severity,
        "heat": heat,
        "flips": flips,
    }
    with rc_context(STYLE):
        found = {
            section: [drawn for scope in summary.scopes for drawn in maker(scope, summary, across)]
            for section, maker in makers.items()
        }
        found["layers"] = list(layers(summary, across))
    return found


def pareto(scope: Scope, summary: Summary, across: int) -> Iterator[Drawn]:
    """Accuracy and reliability against memory and speed."""
    for condition in scope.conditions:
        lines = scope.under(condition)
        costs = [
            ("bytes", "weights, MB", 1e-6, False),
            ("tokens_per_second", "tokens per second", 1.0, True),
        ]
        costs = [cost for cost in costs if sum(getattr(line.cost, cost[0]) is not None for line in lines) > 1]
        if not costs:
            continue
        styles = looks(line.config.method for line in lines)
        side = 3.9 if across > 2 else 2.5
        figure = Figure(figsize=(side * len(costs), 5.6), layout="constrained")
        axes = figure.subplots(2, len(costs), squeeze=False, sharey="row", sharex="col")
        goals = (("accuracy", "accuracy", True), ("aurc", "AURC (low is good)", False))
        for row, (metric, label, high) in enumerate(goals):
            for column, (field, axis_label, factor, more) in enumerate(costs):
                axis = axes[row][column]
                _scatter(axis, lines, metric, field, factor, styles, (high, more), summary.level)
                if row == 1:
                    axis.set_xlabel(axis_label)
                if column == 0:
                    axis.set_ylabel(label)
        axes[0][0].set_title("up and left is better" if costs[0][0] == "bytes" else "up and right is better")
        _legend(figure, styles, marks_only=True)
        best = not_dominated(lines)
        says = (
            f"Each mark is one configuration, labelled with its bits; a line joins those that nothing beats in both of"
            f" the panel's measures. Not beaten in all four at once: {_listed(line.config.label for line in best)}."
        )
        yield Drawn(
            f"pareto-{_slug(scope.title)}-{_slug(condition)}",
            f"{scope.title}, {condition}",
            says,
            figure,
            _cost_table(scope, condition, lines, summary),
            more=condition != scope.conditions[0] and len(scope.conditions) > 2,
        )


def _scatter(
    axis: Any,
    lines: Sequence[Line],
    metric: str,
    field: str,
    factor: float,
    styles: dict[str, Look],
    wanted: tuple[bool, bool],
    level: float,
) -> None:
    points = []
    for line in lines:
        cost, value = getattr(line.cost, field), line.group.of(metric)
        if cost is None or math.isnan(value):
            continue
        look = styles[line.config.method]
        low, high = line.group.interval(metric, level)
        if not math.isnan(low):
            axis.plot([cost * factor] * 2, [low, high], color=look.colour, alpha=0.35, linewidth=1.0, zorder=2)
        axis.plot(cost * factor, value, look.mark, color=look.colour, zorder=3)
        points.append((cost * factor, value, line))
    if len(points) <= 40:
        for x, y, line in points:
            name = "16" if line.config.dense else str(line.config.bits or "")
            axis.annotate(name, (x, y), (4, 3), textcoords="offset points", fontsize=7, color=MUTED)
    front = _front([(x, y) for x, y, _ in points], wanted)
    if len(front) > 1:
        axis.plot(*zip(*front, strict=True), color=INK, linewidth=0.9, alpha=0.6, zorder=1)


def _front(points: Sequence[tuple[float, float]], wanted: tuple[bool, bool]) -> list[tuple[float, float]]:
    """Points that no other beats in both, by x; `wanted`: whether y, and whether x, should be high."""
    high, more = wanted
    kept: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (-p[0] if more else p[0], -p[1] if high else p[1])):
        if not kept or (y > kept[-1][1] if high else y < kept[-1][1]):
            kept.append((x, y))
    return sorted(kept)


def _cost_table(scope: Scope, condition: str, lines: Sequence[Line], summary: Summary) -> Table:
    columns = (Column("Model", numeric=False), Column("Accuracy"), Column("AURC"), Column("MB"), Column("Tokens/s"))
    rows = [
        [
            Cell(line.config.label, line.config.label, note=line.config.details),
            *(number(line.group.of(m), line.group.interval(m, summary.level)) for m in ("accuracy", "aurc")),
            number(None if line.cost.bytes is None else line.cost.bytes / 1e6, digits=2),
            number(line.cost.tokens_per_second, digits=0),
        ]
        for line in lines
    ]
    name = f"pareto-{_slug(scope.title)}-{_slug(condition)}"
    return Table(name, f"Accuracy, reliability and cost on {scope.title}, {condition}", columns, rows_of(rows))


def reliability(scope: Scope, summary: Summary, across: int) -> Iterator[Drawn]:
    """Reliability diagrams, one panel per method and bits, clean and shifted in one."""
    groups = [
        (key, members)
        for key, members in series(line for line in scope.lines if line.condition in scope.conditions).items()
        if any(not math.isnan(line.group.of("ece")) for line in members)
    ]
    for start in range(0, len(groups), PANELS_AT_FIRST):
        chosen = groups[start : start + PANELS_AT_FIRST]
        part = f"-{start // PANELS_AT_FIRST + 1}" if start else ""
        name = f"reliability-{_slug(scope.title)}{part}"
        yield Drawn(
            name,
            scope.title if not start else f"{scope.title}, {start + 1} to {start + len(chosen)}",
            "Observed accuracy against stated confidence: on the diagonal a model is as often right as it says, below"
            " it is overconfident. The size of a point is the number of answers in its bin; the bars below count them.",
            _reliability(chosen, across),
            _bins_table(name, scope, chosen),
            more=start > 0,
        )


_CONDITION_TONES = (("clean", GOOD, "o"), ("shifted", BAD, "s"))


def _reliability(groups: Sequence[tuple[tuple[str, int | None], list[Line]]], across: int) -> Figure:
    columns = min(across, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(_PANEL * columns, (_PANEL + 1.0) * rows + 0.35), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3.2, 1.0] * rows)
    for k, (_, members) in enumerate(groups):
        row, column = divmod(k, columns)
        axis = figure.add_subplot(grid[2 * row, column])
        counts = figure.add_subplot(grid[2 * row + 1, column], sharex=axis)
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for place, (condition, colour, mark) in enumerate(_CONDITION_TONES):
            lines = [line for line in members if line.condition == condition]
            if not lines:
                continue
            records, confidence, outcome = mean_bins(tasks_of(lines))
            filled = records > 0
            sizes = 6 + 60 * records[filled] / max(records.max(), 1)
            axis.plot(confidence[filled], outcome[filled], color=colour, linewidth=1.0, alpha=0.8)
            axis.scatter(confidence[filled], outcome[filled], s=sizes, color=colour, marker=mark, alpha=0.85)
            width = 1 / records.size
            edges = np.arange(records.size) * width
            counts.bar(edges + width * (0.27 + 0.46 * place), records, width * 0.42, color=colour)
        axis.set(xlim=(0, 1), ylim=(0, 1), title=members[0].config.label, aspect="auto")
        axis.tick_params(labelbottom=False, labelleft=column == 0)
        counts.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        counts.tick_params(labelsize=7)
        counts.yaxis.set_major_locator(_few_ticks())
        counts.grid(visible=False)
        eces = [
            f"{line.group.of('ece'):.3f}"
            for name, _, _ in _CONDITION_TONES
            for line in members
            if line.condition == name
        ]
        axis.annotate(f"ECE {' / '.join(eces[:2])}", (0.04, 0.93), xycoords="axes fraction", fontsize=7.5, color=MUTED)
        if column == 0:
            axis.set_ylabel("accuracy")
            counts.set_ylabel("answers")
        if row == rows - 1:
            counts.set_xlabel("confidence")
    shown = {line.condition for _, members in groups for line in members}
    handles = [_handle(colour, mark, name) for name, colour, mark in _CONDITION_TONES if name in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def _bins_table(name: str, scope: Scope, groups: Sequence[tuple[tuple[str, int | None], list[Line]]]) -> Table:
    columns = (
        Column("Model", numeric=False),
        Column("Condition", numeric=False),
        Column("Bin", numeric=False),
        Column("Answers"),
        Column("Confidence"),
        Column("Accuracy"),
    )
    rows = []
    for _, members in groups:
        for condition in dict.fromkeys(line.condition for line in members):
            bins = mean_bins(tasks_of([line for line in members if line.condition == condition]))
            count = bins.shape[1]
            rows += [
                [
                    text(members[0].config.label),
                    text(condition),
                    text(f"{k / count:.2f} to {(k + 1) / count:.2f}"),
                    whole(int(records)),
                    number(confidence),
                    number(outcome),
                ]
                for k, (records, confidence, outcome) in enumerate(bins.T)
                if records
            ]
    return Table(name, f"Reliability bins on {scope.title}", columns, rows_of(rows))


def risk_coverage(scope: Scope, summary: Summary, across: int) -> Iterator[Drawn]:
    """Risk–coverage curves: one panel per number of bits, rows for conditions."""
    del summary
    for condition in scope.conditions:
        lines = [line for line in scope.under(condition) if not math.isnan(line.group.of("aurc"))]
        panels = _by_bits(lines)
        if not panels:
            continue
        styles = looks(line.config.method for line in lines)
        curves = {key: _curves(members) for key, members in series(lines).items()}
        figure = _row_of(panels, styles, partial(_risk_panel, curves=curves, styles=styles), across)
        figure.axes[0].set_ylabel("risk of what is answered")
        figure.supxlabel("coverage: share of questions answered", fontsize=9, color=MUTED)
        name = f"risk-{_slug(scope.title)}-{_slug(condition)}"
        yield Drawn(
            name,
            f"{scope.title}, {condition}",
            "Answering only where confidence is high: the further a curve stays down to the right, the better the"
            f" confidence tells right from wrong. {_BAND}",
            figure,
            _curve_table(name, scope, condition, curves),
        )


_BAND = "A band reaches from the lowest to the highest run where a line is the mean of several."


def _curves(lines: Sequence[Line]) -> np.ndarray:
    """Risk at each coverage, one row per run: the mean over its tasks."""
    runs = [
        np.mean(
            [run.measured.tasks[name].risk for name in run.measured.groups[line.family, line.condition].tasks], axis=0
        )
        for line in lines
        for run in line.runs
    ]
    return np.stack(runs)


def _risk_panel(
    axis: Any,
    chosen: Sequence[tuple[str, int | None]],
    curves: dict[tuple[str, int | None], np.ndarray],
    styles: dict[str, Look],
) -> None:
    for key in chosen:
        look, runs = styles[key[0]], curves[key]
        axis.plot(GRID, runs.mean(axis=0), color=look.colour, linewidth=1.2 if key[0] == DENSE else 1.6)
        axis.plot(GRID[9::30], runs.mean(axis=0)[9::30], look.mark, color=look.colour, linestyle="none")
        if len(runs) > 1:
            axis.fill_between(
                GRID, runs.min(axis=0), runs.max(axis=0), color=look.colour, alpha=BAND_ALPHA, linewidth=0
            )
    axis.set(xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _curve_table(name: str, scope: Scope, condition: str, curves: dict[tuple[str, int | None], np.ndarray]) -> Table:
    shown = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    columns = (Column("Model", numeric=False), *(Column(f"{percent} %") for percent in shown))
    rows = [
        [text(_label(key)), *(number(float(runs.mean(axis=0)[percent - 1])) for percent in shown)]
        for key, runs in curves.items()
    ]
    return Table(name, f"Risk at each coverage on {scope.title}, {condition}", columns, rows_of(rows))


def severity(scope: Scope, summary: Summary, across: int) -> Iterator[Drawn]:
    """Accuracy and ECE by severity of the shift."""
    for which in scope.conditions:
        steps = scope.severities(which)
        if which == CLEAN or not steps:
            continue
        conditions = {0: CLEAN} | steps if scope.under(CLEAN) else steps
        if len(conditions) < 2:
            continue
        for metric, label in (("accuracy", "accuracy"), ("ece", "ECE")):
            drawn = _severity(scope, summary, which, conditions, metric, label, across)
            if drawn:
                yield drawn


def _severity(
    scope: Scope, summary: Summary, which: str, conditions: dict[int, str], metric: str, label: str, across: int
) -> Drawn | None:
    lines = [line for condition in conditions.values() for line in scope.under(condition)]
    lines = [line for line in lines if not math.isnan(line.group.of(metric))]
    panels = _by_bits(lines)
    if not panels:
        return None
    styles = looks(line.config.method for line in lines)
    values = {
        key: {
            step: spread([m for m in members if m.condition == name], metric, summary.level)
            for step, name in conditions.items()
        }
        for key, members in series(lines).items()
    }

    def panel(axis: Any, chosen: Sequence[tuple[str, int | None]]) -> None:
        for key in chosen:
            look = styles[key[0]]
            steps = [step for step in conditions if not math.isnan(values[key][step][0])]
            mean, low, high = (np.array([values[key][step][k] for step in steps]) for k in range(3))
            axis.plot(steps, mean, color=look.colour, marker=look.mark)
            axis.fill_between(steps, low, high, color=look.colour, alpha=BAND_ALPHA, linewidth=0)
        axis.set_xticks(list(conditions))

    figure = _row_of(panels, styles, panel, across)
    figure.axes[0].set_ylabel(label)
    figure.supxlabel("severity (0: clean)", fontsize=9, color=MUTED)
    name = f"severity-{_slug(scope.title)}-{_slug(which)}-{metric}"
    columns = (Column("Model", numeric=False), *(Column("clean" if not s else f"severity {s}") for s in conditions))
    rows = [
        [text(_label(key)), *(number(m, _interval(lo, hi)) for m, lo, hi in steps.values())]
        for key, steps in values.items()
    ]
    return Drawn(
        name,
        f"{label} by severity: {scope.title}, {which}",
        f"The mean over all shifts at each severity. {_BAND} For a single run it is the interval over images.",
        figure,
        Table(name, f"{label} by severity on {scope.title}, {which}", columns, rows_of(rows)),
    )


def _interval(low: float, high: float) -> Any:
    from lmms_plugin.metrics.bootstrap import Interval

    return Interval(low, high)


def heat(scope: Scope, summary: Summary, across: int) -> Iterator[Drawn]:
    """What each quantizer loses under each shift against the 16-bit model."""
    del summary, across
    cells: dict[tuple[str, int | None], dict[str, list[float]]] = {}
    records: dict[str, int] = {}
    for line in scope.lines:
        if line.condition not in scope.conditions or line.config.dense:
            continue
        dense = next((other for other in scope.under(line.condition) if other.config.dense), None)
        if dense is None:
            continue
        base = {task.task: task for task in tasks_of([dense])}
        for task in tasks_of([line]):
            if task.task in base:
                shift = task.place.shift or CLEAN
                lost = float(task.value[0] - base[task.task].value[0])
                cells.setdefault((line.config.method, line.config.bits), {}).setdefault(shift, []).append(lost)
                records[shift] = task.records
    shifts = sorted(records, key=lambda name: (name != CLEAN, name))
    if not cells or len(shifts) < 2:
        return
    values = np.array([[np.mean(row.get(shift, [math.nan])) for shift in shifts] for row in cells.values()])
    labels = [_label(key) for key in cells]
    name = f"heat-{_slug(scope.title)}"
    columns = (Column("Model", numeric=False), *(Column(shift.replace("_", " ")) for shift in shifts))
    rows = [
        [text(label), *(number(float(v), signed=True) for v in row)] for label, row in zip(labels, values, strict=True)
    ]
    yield Drawn(
        name,
        scope.title,
        "Accuracy less that of the 16-bit model on the same task, in percentage points, averaged over severities and"
        " runs. Orange: lost, blue: gained.",
        _heat(values, labels, [shift.replace("_", " ") for shift in shifts]),
        Table(name, f"Accuracy less that of the 16-bit model on {scope.title}", columns, rows_of(rows)),
    )


def _heat(values: np.ndarray, labels: Sequence[str], shifts: Sequence[str]) -> Figure:
    from matplotlib.patches import Rectangle

    rows, columns = values.shape
    figure = Figure(figsize=(1.5 + max(0.52 * columns, 2.2), 1.5 + 0.27 * rows), layout="constrained")
    axis = figure.subplots()
    strongest = max(np.nanmax(np.abs(values)), 0.01)
    for row in range(rows):
        for column in range(columns):
            value = values[row, column]
            if math.isnan(value):
                continue
            alpha = 0.85 * abs(value) / strongest
            face = BAD if value < 0 else GOOD
            axis.add_patch(Rectangle((column, row), 0.96, 0.92, facecolor=face, alpha=alpha, linewidth=0))
            shown = f"{100 * value:+z.0f}".replace("-", "\u2212").replace("+0", "0")
            axis.text(column + 0.48, row + 0.48, shown, ha="center", va="center", fontsize=7.5)
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    axis.set_yticks(np.arange(rows) + 0.48, labels, color=INK)
    axis.set_xticks(np.arange(columns) + 0.48, shifts, rotation=40, ha="left", color=INK)
    axis.xaxis.tick_top()
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure


def flips(scope: Scope, summary: Summary, across: int) -> Iterator[Drawn]:
    """Answers that changed sides, as bars to both sides."""
    del summary
    found: dict[str, dict[tuple[str, int | None], tuple[float, float]]] = {}
    for condition in scope.conditions:
        for key, members in series(line for line in scope.under(condition) if line.flips).items():
            told = [line.flips for line in members if line.flips]
            total = sum(one.records for one in told)
            found.setdefault(condition, {})[key] = (
                sum(one.lost for one in told) / total,
                sum(one.won for one in told) / total,
            )
    if not found:
        return
    keys = list(dict.fromkeys(key for rows in found.values() for key in rows))
    side = 3.0 if across > 2 else 1.9
    figure = Figure(figsize=(1.3 + side * len(found), 0.9 + 0.24 * len(keys)), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True, sharex=True)[0]
    for axis, (condition, rows) in zip(axes, found.items(), strict=True):
        lost, won = (np.array([100 * rows.get(key, (0, 0))[k] for key in keys]) for k in (0, 1))
        places = np.arange(len(keys))
        axis.barh(places, -lost, 0.72, color=BAD)
        axis.barh(places, won, 0.72, color=GOOD)
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set_yticks(places, [_label(key) for key in keys], color=INK)
        axis.set(title=condition, ylim=(len(keys) - 0.4, -0.6))
        axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g} %")
        axis.grid(axis="y", visible=False)
    figure.legend(handles=[_bar(BAD, "right → wrong"), _bar(GOOD, "wrong → right")], loc="outside upper left", ncols=2)
    name = f"flips-{_slug(scope.title)}"
    columns = (
        Column("Model", numeric=False),
        Column("Condition", numeric=False),
        Column("Right → wrong"),
        Column("Wrong → right"),
    )
    rows_ = [
        [text(_label(key)), text(condition), number(lost), number(won)]
        for condition, rows in found.items()
        for key, (lost, won) in rows.items()
    ]
    yield Drawn(
        name,
        scope.title,
        "Share of answers that changed sides against the 16-bit model. Two models of equal accuracy may still disagree"
        " on many answers.",
        figure,
        Table(name, f"Answers that changed sides on {scope.title}", columns, rows_of(rows_)),
    )


def layers(summary: Summary, across: int) -> Iterator[Drawn]:
    """Error of every layer's weight, layer by layer."""
    runs = [run for run in summary.runs if run.layers]
    for model in dict.fromkeys(run.axes.config.model for run in runs):
        chosen = [run for run in runs if run.axes.config.model == model]
        keys: dict[tuple[str, int | None], list[Any]] = {}
        for run in chosen:
            keys.setdefault((run.axes.config.method, run.axes.config.bits), []).append(run)
        names = list(dict.fromkeys(layer.name for run in chosen for layer in run.layers))
        styles = looks(method for method, _ in keys)
        panels: dict[int | None, list[tuple[str, int | None]]] = {}
        for key in sorted(keys, key=lambda key: -(key[1] or 0)):
            panels.setdefault(key[1], []).append(key)
        errors = {key: _layer_errors(members, names) for key, members in keys.items()}

        def panel(
            axis: Any, shown: Sequence[tuple[str, int | None]], styles: Any = styles, errors: Any = errors
        ) -> None:
            for key in shown:
                mean = np.nanmean(errors[key], axis=0)
                axis.plot(mean, color=styles[key[0]].colour, marker=styles[key[0]].mark, markersize=3, linewidth=1.0)
            axis.set_ylim(bottom=0)

        figure = _row_of(panels, styles, panel, across)
        figure.axes[0].set_ylabel("relative error of the weight")
        figure.supxlabel(f"layer, 1 to {len(names)} in the model's order", fontsize=9, color=MUTED)
        columns = (Column("Layer", numeric=False), *(Column(_label(key)) for key in keys))
        rows = [
            [text(name), *(number(float(np.nanmean(errors[key][:, k]))) for key in keys)]
            for k, name in enumerate(names)
        ]
        title = f"layers-{_slug(model)}"
        yield Drawn(
            title,
            model,
            "‖W \u2212 Ŵ‖ / ‖W‖ of every quantized layer, mean over runs. Calibrated methods may have a larger error of the"
            " weight and a smaller one of what the layer puts out.",
            figure,
            Table(title, f"Relative error of every layer's weight, {model}", columns, rows_of(rows)),
        )


def _layer_errors(runs: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    rows = [{layer.name: layer.relative_error for layer in run.layers} for run in runs]
    return np.array([[row.get(name, math.nan) for name in names] for row in rows])


def _by_bits(lines: Sequence[Line]) -> dict[int | None, list[tuple[str, int | None]]]:
    """Number of bits → series of its panel, the 16-bit model in each."""
    dense = [key for key in series(lines) if key[0] == DENSE]
    quantized = sorted((key for key in series(lines) if key[0] != DENSE), key=lambda key: -(key[1] or 0))
    panels: dict[int | None, list[tuple[str, int | None]]] = {}
    for key in quantized:
        panels.setdefault(key[1], list(dense)).append(key)
    return panels or ({16: dense} if dense else {})


def _row_of(
    panels: dict[int | None, list[tuple[str, int | None]]],
    styles: dict[str, Look],
    panel: Callable[..., None],
    across: int,
) -> Figure:
    columns = min(across, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(_PANEL * columns, 4.2) + 0.4, 2.3 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, (bits, chosen) in zip(axes, panels.items(), strict=False):
        panel(axis, chosen)
        axis.set_title(f"{bits} bits" if bits is not None else "quantized")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _legend(figure, styles)
    return figure


def _legend(figure: Figure, styles: dict[str, Look], *, marks_only: bool = False) -> None:
    handles = [
        _handle(look.colour, look.mark, "16 bit" if method == DENSE else method, line=not marks_only)
        for method, look in styles.items()
    ]
    width = figure.get_size_inches()[0]
    figure.legend(handles=handles, loc="outside upper left", ncols=max(2, int(width / 1.15)), handlelength=1.4)


def _handle(colour: str, mark: str, label: str, *, line: bool = True) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=mark, label=label, linestyle="-" if line else "none")


def _bar(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(2, integer=True)


def _label(key: tuple[str, int | None]) -> str:
    method, bits = key
    return "16 bit" if method == DENSE else f"{method} {bits}".removesuffix(" None")


def _listed(names: Any) -> str:
    found = list(dict.fromkeys(names))
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _slug(words: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())
