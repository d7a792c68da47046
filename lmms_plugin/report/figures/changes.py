"""What quantization changed: answers that changed sides, and the weights of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmms_plugin.report.figures import drawing
from lmms_plugin.report.figures.drawing import NARROW, WIDE, DrawnFigure, Floats, Key, Margins, label, short, slug
from lmms_plugin.report.figures.palette import BAD, GOOD, INK, MUTED, looks
from lmms_plugin.report.numbers.results_folder import ReportedRun
from lmms_plugin.report.numbers.summary import Scope, Summary, series
from lmms_plugin.report.numbers.tables import Column, ReportTable, number, rows_of, text

_Shares = dict[Key, tuple[float, float]]


def flips(scope: Scope, summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Answers that changed sides, as bars to both sides."""
    del summary
    found = {condition: shares for condition in scope.conditions if (shares := _shares(scope, condition))}
    if not found:
        return
    name = f"flips-{slug(scope.title)}"
    columns = (
        Column("Model", numeric=False),
        Column("Condition", numeric=False),
        Column("Right \u2192 wrong", better="low"),
        Column("Wrong \u2192 right", better="high"),
    )
    rows = [
        [text(label(key)), text(condition), number(lost), number(won)]
        for condition, shares in found.items()
        for key, (lost, won) in shares.items()
    ]
    yield DrawnFigure(
        name,
        scope.title,
        "Share of answers that changed sides against the unquantized model. Two models of equal accuracy may still"
        " disagree on many answers.",
        _bars(found, across),
        ReportTable(name, f"Answers that changed sides on {scope.title}", columns, rows_of(rows)),
    )


def _shares(scope: Scope, condition: str) -> _Shares:
    """Shares lost and won by method and bits, over all runs."""
    found = {}
    for key, members in series(line for line in scope.under(condition) if line.flips).items():
        told = np.array([line.flips for line in members if line.flips], dtype=np.float64).sum(axis=0)
        found[key] = float(told[0] / told[2]), float(told[1] / told[2])
    return found


def _bars(found: dict[str, _Shares], across: int) -> Any:
    keys = list(dict.fromkeys(key for shares in found.values() for key in shares))
    left = 0.25 + 0.072 * max(len(short(label(key))) for key in keys)
    # Half of a label may stand beyond the last tick.
    margins = Margins(left=left, right=0.28, bottom=0.35, across=0.35)
    width = min(WIDE if across > 2 else NARROW, margins.left + 3.2 * len(found))
    handles = [drawing.bar_handle(BAD, "right \u2192 wrong"), drawing.bar_handle(GOOD, "wrong \u2192 right")]
    figure, grid = drawing.panels(1, len(found), width, 0.21 * len(keys) + 0.1, handles, margins)
    places = np.arange(len(keys))
    for axis, (condition, shares) in zip(grid[0], found.items(), strict=True):
        lost, won = (np.array([100 * shares.get(key, (0.0, 0.0))[k] for key in keys]) for k in (0, 1))
        axis.barh(places, -lost, 0.72, color=BAD)
        axis.barh(places, won, 0.72, color=GOOD)
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set_yticks(places, [short(label(key)) for key in keys], color=INK)
        axis.set(title=condition, ylim=(len(keys) - 0.4, -0.6))
        axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g} %")
        axis.grid(axis="y", visible=False)
    return figure


def layers(summary: Summary, across: int) -> Iterator[DrawnFigure]:
    """Error of every layer's weight, layer by layer."""
    runs = [run for run in summary.runs if run.layers]
    for model in dict.fromkeys(run.axes.config.model for run in runs):
        members: dict[Key, list[ReportedRun]] = {}
        for run in runs:
            if run.axes.config.model == model:
                members.setdefault((run.axes.config.method, run.axes.config.bits), []).append(run)
        names = list(dict.fromkeys(layer.name for same in members.values() for run in same for layer in run.layers))
        errors = {key: _errors(same, names) for key, same in members.items()}
        chosen = drawing.keys_by_bits(errors)
        styles = looks(method for method, _ in errors)
        xlabel = f"layer, 1 to {len(names)}"
        figure, axes = drawing.small_multiples(chosen, styles, across, xlabel, "error of the weight")
        for axis, keys in zip(axes, chosen.values(), strict=True):
            for key in keys:
                look = styles[key[0]]
                places = np.arange(1, len(names) + 1)
                axis.plot(places, errors[key], color=look.colour, marker=look.mark, markersize=2.8, linewidth=1.0)
        axes[0].set_ylim(0, 1.05 * max(float(np.nanmax(row)) for row in errors.values()))
        title = f"layers-{slug(model)}"
        columns = (Column("Layer", numeric=False), *(Column(label(key)) for key in errors))
        rows = [[text(name), *(number(float(row[k])) for row in errors.values())] for k, name in enumerate(names)]
        yield DrawnFigure(
            title,
            model,
            "\u2016W \u2212 \u0174\u2016 / \u2016W\u2016 of every quantized layer in the model's order, mean over runs."
            " A calibrated method may have a larger error of the weight and a smaller one of what the layer puts out.",
            figure,
            ReportTable(title, f"Relative error of every layer's weight, {model}", columns, rows_of(rows)),
        )


def _errors(runs: Sequence[ReportedRun], names: Sequence[str]) -> Floats:
    """Mean error of each layer over runs, NaN where none quantized it."""
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for run in runs:
        for layer in run.layers:
            sums[layer.name] += layer.relative_error
            counts[layer.name] += 1
    return np.array([sums[name] / counts[name] if counts[name] else math.nan for name in names])
