"""Every cell of a study against the unquantized model on the same documents, with published numbers beside.

analysis:
kind: against_reference
question: Does quantization cost reliability before it costs accuracy?
metrics: [accuracy, ece, aurc, coverage@0.01]
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis import comparison
from lmms_plugin.analysis.reproduction import published
from lmms_plugin.metrics.paired import Difference, holm
from lmms_plugin.study.file.analyses import AgainstReference
from lmms_plugin.study.file.asked import expect_metrics
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.verdicts.arms import UNTOUCHED, FinishedCell, expect_places, one_reference, read_cells, select
from lmms_plugin.study.verdicts.conclusions import Conclusion, ExpectedCell


class ReferenceRow(NamedTuple):
    """One metric of one task of one cell.

    Attributes:
        axes: Place of the cell in the study.
        change: Change against the unquantized model; p adjusted by Holm over all cells and tasks of the metric.
        published: Published value; None if there is none.
        published_reference: Published value of the unquantized model.
    """

    axes: CellAxes
    change: comparison.Change
    published: published.Published | None
    published_reference: published.Published | None


def expect(question: AgainstReference, cells: Sequence[ExpectedCell]) -> None:
    """Refuse a study that will lack tasks, metrics or the unquantized model of one of its checkpoints.

    Raises:
        ValueError: Something is missing; names it.
    """
    expect_places(cells)
    expect_metrics(question.metrics, question.tasks, [cell.tasks for cell in cells])
    for model in dict.fromkeys(cell.axes.model for cell in cells):
        own = select(cells, {"model": model})
        expected = sorted(one_reference(own).tasks)
        if other := [cell for cell in own if sorted(cell.tasks) != expected]:
            raise ValueError(
                f"analysis: expected the tasks of the unquantized model in every cell ({', '.join(expected)}), got"
                f" {', '.join(other[0].tasks)}"
            )


def conclude(study: Path, question: AgainstReference, only: Collection[str] | None, workers: int) -> list[Conclusion]:
    """Compare every cell with the unquantized model of its checkpoint.

    Raises:
        ValueError: A checkpoint has no cell without quantization, or the tasks or documents of cells differ from its.
    """
    cells = read_cells(study, only)
    models = dict.fromkeys(cell.axes.model for cell in cells)
    return [_of_one_model(select(cells, {"model": model}), question, workers) for model in models]


def _of_one_model(cells: Sequence[FinishedCell], question: AgainstReference, workers: int) -> Conclusion:
    reference = one_reference(cells)
    rows: list[ReferenceRow] = []
    for cell in cells:
        if cell is reference:
            continue
        found = comparison.compare(reference.run, cell.run, question.settings(workers), question.margin)
        asked = [one for one in found.changes if one.metric in question.metrics]
        rows += [_row(cell.axes, one) for one in asked if not question.tasks or one.task in question.tasks]
    if not rows:
        raise ValueError(f"analysis: no task has one of the metrics {', '.join(question.metrics)}")
    rows = _adjusted(rows)
    sources = sorted({row.published.source for row in rows if row.published})
    return Conclusion(
        f"{question.question} {cells[0].axes.model}",
        [
            _told(task, metric, rows, question)
            for task, metric in dict.fromkeys((r.change.task, r.change.metric) for r in rows)
        ],
        [],
        [_table(task, rows, question) for task in dict.fromkeys(row.change.task for row in rows)],
        [
            f"Differences from the unquantized model with {100 * question.level:g} % intervals over images; p adjusted"
            " by Holm over all cells and tasks of a metric.",
            *(f"Published: {source}." for source in sources),
        ],
        {"question": question, "model": cells[0].axes.model, "rows": rows},
    )


def _row(axes: CellAxes, change: comparison.Change) -> ReferenceRow:
    def known(method: str) -> published.Published | None:
        return published.score(axes.model, change.task, method, axes.bits, change.metric, axes.components)

    return ReferenceRow(axes, change, known(axes.method), known(UNTOUCHED))


def _adjusted(rows: Sequence[ReferenceRow]) -> list[ReferenceRow]:
    adjusted = list(rows)
    for metric in {row.change.metric for row in rows}:
        places = [k for k, row in enumerate(rows) if row.change.metric == metric]
        for k, p in zip(places, holm([rows[k].change.difference.p for k in places]), strict=True):
            adjusted[k] = rows[k]._replace(change=rows[k].change._replace(p_holm=float(p)))
    return adjusted


def _told(task: str, metric: str, rows: Sequence[ReferenceRow], question: AgainstReference) -> str:
    of_metric = [row for row in rows if (row.change.task, row.change.metric) == (task, metric)]
    shown = [row for row in of_metric if row.change.p_holm < 1 - question.level]
    none = [row for row in of_metric if row not in shown]
    lines = [f"{_label(row.axes)} {_signed(row.change.difference.value)}" for row in shown]
    told = f"{task}, {metric}: " + (f"changed by {', '.join(lines)}" if lines else "no change was shown")
    if lines and none:
        told += f"; no change was shown for {', '.join(_label(row.axes) for row in none)}"
    return told + "."


def _table(task: str, rows: Sequence[ReferenceRow], question: AgainstReference) -> dict[str, Any]:
    columns = ["method", "metric", "unquantized", "quantized", "difference", "p (Holm)", "records"]
    with_published = any(row.published for row in rows if row.change.task == task)
    if with_published:
        columns += ["published unquantized", "published quantized"]
    body = []
    for row in rows:
        one = row.change
        if one.task != task:
            continue
        cells = [_label(row.axes), one.metric, _number(one.first), _number(one.second)]
        cells += [_with_interval(one.difference), _number(one.p_holm), str(one.records)]
        if with_published:
            cells += [_published(row.published_reference), _published(row.published)]
        body.append(cells)
    return {"title": f"{task}: against the unquantized model", "columns": columns, "rows": body}


def _label(axes: CellAxes) -> str:
    parts = [axes.method, f"{axes.bits} bits", axes.components, axes.calibration]
    parts += [f"seed {axes.seed}"] if axes.seed else []
    return " ".join(str(part) for part in parts if part is not None)


def _with_interval(difference: Difference) -> str:
    inside = "" if math.isnan(difference.low) else f" [{_signed(difference.low)}, {_signed(difference.high)}]"
    return f"{_signed(difference.value)}{inside}"


def _published(found: published.Published | None) -> str:
    return "" if found is None else f"{found.value:.4g}"


def _signed(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:+.4f}"


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"
