"""What `metrics` and `estimators` print first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from types import MappingProxyType

import numpy as np

from lmms_plugin.analysis.estimator_ranking import RankedEstimator
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import MetricValue
from lmms_plugin.analysis.overview import Estimate, Overview, OverviewRow
from lmms_plugin.analysis.records import CLEAN, REJECTION, SHIFTED, EvaluationSet
from lmms_plugin.cli.screens.screen import NUMBERS, ScreenTable, ends, number, screen
from lmms_plugin.utils.messages import counted

MOST_TASKS = 14
"""More tasks than that are shown as groups of tasks."""
_REST = f"Every task and metric: --all, --json; {NUMBERS}"
_REJECTION = MappingProxyType(
    {
        "box_rate_true": "boxes",
        "rejection_auroc": "AUROC",
        "rejection_fpr@0.95": "FPR@0.95",
        "confidence_falls": "falls",
    }
)
"""Metric of rejection tasks → its heading."""
_HEADINGS = ("accuracy", "ECE", "floor", "AURC", "C@5%")


def metrics_screen(found: Sequence[tuple[LoggedRun, Overview]], level: float, notes: Sequence[str]) -> str:
    """Return the numbers of runs to look at first.

    Args:
        found: Runs with their overviews.
        level: Confidence level of the intervals.
        notes: What an option changes that is not on this screen.
    """
    run, first = found[0]
    answer = _answer(first, level)
    if len(found) > 1:
        answer = [f"{counted(len(found), 'run')} were measured; the first is {run.model or 'a run'}.", *answer]
    few = sum(len(one.tasks) for _, one in found) <= MOST_TASKS
    tables = [table for run, one in found for table in _tables(run, one, named=len(found) > 1, few=few)]
    between = f"Second lines: {100 * level:g} % intervals over images. Floor: ECE of a calibrated model."
    labels = [run.title] if len(found) == 1 else []
    return screen(answer, tables, [*labels, between, *notes], _REST)


def _answer(found: Overview, level: float) -> list[str]:
    said = []
    clean = [row for row in found.groups if row.condition == CLEAN]
    for row in clean[:1] or found.groups[:1]:
        interval = _within(row.accuracy, level)
        said.append(f"On {_where(row)} the share of right answers is {row.accuracy.value:.3f}{interval}.")
        said += _confident(row)
    for row in [row for row in found.groups if row.condition != CLEAN][: 2 if clean else 0]:
        said.append(f"On {_where(row)} it is {row.accuracy.value:.3f}{_within(row.accuracy, level)}.")
    if not said:
        told = [one for one in found.rejection if one.metric == "rejection_auroc"][:1]
        said = [f"On {one.task} confidence tells what is not there with an AUROC of {one.value:.3f}." for one in told]
    return said or ["Nothing was answered with a confidence."]


def _within(one: Estimate, level: float) -> str:
    return "" if math.isnan(one.low) else f" ({100 * level:g} % interval {ends(one.low, one.high)})"


def _confident(row: OverviewRow) -> list[str]:
    if math.isnan(row.ece.value):
        return ["No confidence was logged, so calibration is unknown."]
    said = f"Its confidence is off by {row.ece.value:.3f} on average (ECE; {row.ece_floor:.3f} if it were calibrated)"
    if math.isnan(row.coverage.value):
        return [f"{said}."]
    return [f"{said}, and {100 * row.coverage.value:.0f} % can be answered at a risk of 5 %."]


def _where(row: OverviewRow) -> str:
    return row.name if row.condition == CLEAN else f"{counted(row.tasks, f'{row.condition} task')} of {row.name}"


def _tables(run: LoggedRun, found: Overview, *, named: bool, few: bool) -> list[ScreenTable]:
    title = run.title if named else ""
    grouped = not few and len(found.groups) < len(found.tasks)
    rows = [_row(row, grouped=grouped) for row in (found.groups if grouped else found.tasks)]
    tables = [
        ScreenTable(("group of tasks" if grouped else "task", *_HEADINGS), rows, "group" if grouped else "task", title)
    ]
    return [*tables, *_of_rejection(found.rejection, "" if rows else title)]


def _row(row: OverviewRow, *, grouped: bool) -> tuple[str, ...]:
    name = row.name
    if grouped and row.condition != CLEAN:
        name = f"  {counted(row.tasks, f'{row.condition} task')}\n  of {row.name}"
    accuracy, ece, aurc, coverage = map(_two_lines, (row.accuracy, row.ece, row.aurc, row.coverage))
    return name, accuracy, ece, number(row.ece_floor), aurc, coverage


def _two_lines(one: Estimate) -> str:
    return f"{number(one.value) or 'undefined'}\n{ends(one.low, one.high)}"


def _of_rejection(numbers: Sequence[MetricValue], title: str) -> list[ScreenTable]:
    """Return the table of rejection tasks: one row each."""
    tasks = dict.fromkeys(one.task for one in numbers)
    of = {(one.task, one.metric): one for one in numbers}
    names = [name for name in _REJECTION if any((task, name) in of for task in tasks)]
    empty = MetricValue("", "", math.nan, math.nan, math.nan, 0, 0)
    rows = []
    for task in tasks:
        cells = [of.get((task, name), empty) for name in names]
        rows.append((task, *(f"{number(one.value)}\n{ends(one.low, one.high)}" for one in cells)))
    headings = ("rejection task", *(_REJECTION[name] for name in names))
    return [ScreenTable(headings, rows, "task", title)] if rows else []


def estimators_screen(found: Sequence[tuple[LoggedRun, list[RankedEstimator]]], level: float) -> str:
    """Return the best estimators of runs.

    Args:
        found: Runs with their estimators, as `estimator_ranking.judge` gives them.
        level: Confidence level of the intervals.
    """
    tables, answer = [], []
    for run, judged in found:
        for name, rows in _by_group(run, judged).items():
            best = _ranked(rows)
            answer += _best(name, best)
            title = f"{name} ({run.title})" if len(found) > 1 else name
            shown = [_of_estimator(estimator, of) for estimator, of in best]
            tables.append(ScreenTable(("estimator", "AURC", "AUROC", "ECE", "missing"), shown, "estimator", title))
    note = f"Best mean AURC first; second lines, of single tasks: {100 * level:g} % intervals."
    labels = [found[0][0].title] if len(found) == 1 else []
    return screen(answer[:3], tables, [*labels, note], f"All estimators of all tasks: --all, --json; {NUMBERS}")


def _by_group(run: LoggedRun, judged: Sequence[RankedEstimator]) -> dict[str, list[RankedEstimator]]:
    """Group estimators: every clean task by itself, then the tasks of a split that are shifted alike."""
    clean: dict[tuple[str, EvaluationSet], list[str]] = {}
    shifted: dict[tuple[tuple[str, EvaluationSet], str], list[RankedEstimator]] = {}
    named: dict[str, list[RankedEstimator]] = {}
    for one in judged:
        records = run.tasks[one.task]
        split = records.kind.record, records.place._replace(shift=None, severity=None, shifts=SHIFTED[0])
        if records.place.condition == CLEAN:
            clean.setdefault(split, []).append(one.task)
            named.setdefault(one.task, []).append(one)
        else:
            shifted.setdefault((split, records.place.condition), []).append(one)
    for (split, condition), rows in shifted.items():
        of = sorted(set(clean.get(split, [])))
        size = len({one.task for one in rows})
        named[f"{counted(size, f'{condition} task')} of {of[0] if len(of) == 1 else split[1].dataset}"] = rows
    # What can be right or wrong comes first; the order is otherwise that of the run.
    return dict(sorted(named.items(), key=lambda item: run.tasks[item[1][0].task].kind is REJECTION))


def _ranked(rows: Sequence[RankedEstimator]) -> list[tuple[str, list[RankedEstimator]]]:
    """Return every estimator with its rows, best mean AURC first; those that some task lacks come last."""
    of: dict[str, list[RankedEstimator]] = {}
    for one in rows:
        of.setdefault(one.estimator, []).append(one)
    most = max(map(len, of.values()))
    return sorted(of.items(), key=lambda item: (len(item[1]) < most, _mean(item[1], "aurc"), item[0]))


def _best(name: str, ranked: Sequence[tuple[str, list[RankedEstimator]]]) -> list[str]:
    estimator, rows = ranked[0]
    said = f"On {name}, {estimator} ranks answers best (AURC {_mean(rows, 'aurc'):.4f}"
    said += f", AUROC {number(_mean(rows, 'auroc')) or 'undefined'})"
    # What the printed digits do not tell apart is not called better.
    first = f"{_mean(rows, 'aurc'):.4f}"
    alike = [other for other, of in takewhile(lambda one: f"{_mean(one[1], 'aurc'):.4f}" == first, ranked[1:])]
    if alike:
        said += f", as well as {' and '.join(alike) if len(alike) < 3 else counted(len(alike), 'other')}"
    if beaten := ranked[1 + len(alike) :]:
        said += f", before {beaten[0][0]} ({_mean(beaten[0][1], 'aurc'):.4f})"
    return [f"{said}."]


def _of_estimator(name: str, rows: Sequence[RankedEstimator]) -> tuple[str, ...]:
    cells = []
    for metric, digits in (("aurc", 4), ("auroc", 3), ("ece", 3)):
        low, high = getattr(rows[0], f"{metric}_interval")
        between = f"\n{ends(low, high, digits)}" if len(rows) == 1 else ""
        cells.append(f"{number(_mean(rows, metric), digits) or 'undefined'}{between}")
    return name, *cells, str(sum(one.missing for one in rows))


def _mean(rows: Sequence[RankedEstimator], metric: str) -> float:
    return float(np.mean([getattr(one, metric) for one in rows]))
