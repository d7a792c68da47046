"""What `compare` prints first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmms_plugin.analysis.comparison import Comparison, GroupChange, Shifted
from lmms_plugin.analysis.findings import p_text, sentences
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.cli.screens.screen import NUMBERS, ScreenTable, labelled, number, screen
from lmms_plugin.metrics.paired import Difference
from lmms_plugin.utils.messages import counted

_SHOWN = ("acc@0.5", "accuracy", "ece", "coverage@0.05", "box_rate", "rejection_auroc")
"""Metrics with a table, in this order."""
_TITLES = {"ece": "ECE", "coverage@0.05": "coverage at 5 % risk", "rejection_auroc": "AUROC of rejection"}


def comparison_screen(
    found: Comparison, labels: Sequence[str], settings: MeasurementSettings, margin: float | None
) -> str:
    """Return the verdict on two runs, and a row for every group of tasks.

    Args:
        found: Comparison.
        labels: Labels of the first and the second run.
        settings: Resamples and level of the comparison.
        margin: Equivalence margin; None where none was stated.
    """
    level = settings.level
    tables = [table for metric in _SHOWN for table in _table(found, metric, level)]
    notes = labelled(("first:  ", "second: "), labels)
    notes.append("p: of no difference, by Holm over the groups of tasks of a metric.")
    if margin is not None:
        notes.append(f"=: equal within ±{margin:g}.")
    groups = len({(one.group, one.condition) for one in found.groups if one.metric == found.groups[0].metric})
    least = 2 * groups / (settings.resamples + 1)
    if least >= 1 - level:
        few = (
            f"With {counted(settings.resamples, 'resample')} and {counted(groups, 'group')} no p gets below {least:.2f}"
        )
        notes.append(f"{few}: nothing can be shown.")
    return screen(sentences(found, level), tables, notes, f"Every task and metric: --all, --json; {NUMBERS}")


def _table(found: Comparison, metric: str, level: float) -> list[ScreenTable]:
    rows: list[tuple[str, ...]] = []
    groups = [one for one in found.groups if one.metric == metric]
    for one in groups:
        rows.append(_group(one))
        rows += [_interaction(lost) for lost in found.shifted if _belongs(lost, one) and lost.metric == metric]
    if all(math.isnan(one.difference.value) for one in groups):
        return []
    headings = (_TITLES.get(metric, metric), "first", "second", f"second - first, {100 * level:g} %", "p")
    return [ScreenTable(headings, rows, "group")]


def _belongs(lost: Shifted, one: GroupChange) -> bool:
    """Return whether an interaction is that of a group of shifted tasks."""
    clean, _, which = lost.task.partition(", ")
    return one.group == clean and one.condition == f"shifted {which}".strip()


def _group(one: GroupChange) -> tuple[str, ...]:
    name = one.group if one.condition == CLEAN else f"  {counted(one.tasks, f'{one.condition} task')}"
    same = " =" if one.difference.equivalent else ""
    values = number(one.first), number(one.second)
    return name, *values, _between(one.difference), f"{_p(one.p_holm)}{same}"


def _interaction(one: Shifted) -> tuple[str, ...]:
    return "    shifted - clean", "", "", _between(one.interaction), _p(one.interaction.p)


def _p(p: float) -> str:
    return "" if math.isnan(p) else p_text(p)


def _between(one: Difference) -> str:
    low = "" if math.isnan(one.low) else f" [{one.low:+z.3f}, {one.high:+z.3f}]"
    return f"{number(one.value, signed=True)}{low}"
