"""What `study plan` prints first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from lmms_plugin.cli.screens.screen import ScreenTable, screen
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.run import planning
from lmms_plugin.study.run.planning import Plan, PlannedCell
from lmms_plugin.study.run.progress import duration

_REST = "Every cell: --all; with commands and keys: --json. Costs: docs/studies.md"
_MOST_VALUES = 12
_VALUES = 62
"""Columns of the values of an axis."""


def plan_screen(found: Plan) -> str:
    """Return a plan: its axes, and cells and hours of every arm, which is a method with one model."""
    answer = [f"{planning.summary(found)}."]
    axes = ScreenTable(("axis", "values"), _axes(found.cells), "axis", texts=(1,))
    arms = ScreenTable(("arm", *_STATES, "time left", "MiB"), _arms(found), "arm")
    return screen(answer, [axes, arms], [f"study: {found.study.name}"], _REST)


_STATES = ("cells", "done", "failed", "running")


def _axes(cells: Sequence[PlannedCell]) -> list[tuple[str, str]]:
    """Return every axis that has values, with those; tasks are an axis, too."""
    names = {field.name: _of_axes(field.name) for field in fields(CellAxes)}
    rows = []
    for name, value in names.items():
        found = dict.fromkeys(value(one) for one in cells)
        told = [str(one) for one in found if one is not None]
        if told:
            rows.append((name, _listed(told)))
    tasks = dict.fromkeys(task for one in cells for task in one.keyed.cell.tasks)
    rows.append(("task", _listed(list(tasks))))
    if limits := sorted({one.keyed.cell.limit for one in cells if one.keyed.cell.limit is not None}):
        rows.append(("limit", _listed([str(one) for one in limits])))
    return rows


def _of_axes(name: str) -> Callable[[PlannedCell], Any]:
    return lambda one: getattr(one.keyed.cell.axes, name)


def _listed(values: Sequence[str]) -> str:
    """Return the number of values and as many of them as two lines hold."""
    head = f"{len(values)}: " if len(values) > 1 else ""
    lines, left = [head], list(values)
    while left:
        word = left[0] + (", " if len(left) > 1 else "")
        if len(lines[-1]) + len(word) > _VALUES - 9 and lines[-1].strip():
            if len(lines) == 2:
                return "\n".join([*lines[:-1], f"{lines[-1]}+ {len(left)}"])
            lines.append("")
        lines[-1] += word
        left.pop(0)
    return "\n".join(line.rstrip() for line in lines)


def _arms(found: Plan) -> list[tuple[str, ...]]:
    """Return cells by state, hours that are left and the largest weights of every model and method."""
    models = {one.keyed.cell.axes.model for one in found.cells}
    arms: dict[str, list[PlannedCell]] = {}
    for one in found.cells:
        axes = one.keyed.cell.axes
        arms.setdefault(axes.method if len(models) == 1 else f"{axes.method}, {axes.model}", []).append(one)
    return [(name, *_counts(cells), _hours(cells), _weights(cells)) for name, cells in arms.items()]


def _counts(cells: Sequence[PlannedCell]) -> list[str]:
    states = [sum(one.state == state for one in cells) for state in _STATES[1:]]
    return [str(len(cells)), *(str(count) if count else "" for count in states)]


def _hours(cells: Sequence[PlannedCell]) -> str:
    left = [one.seconds.value for one in cells if one.state != "done"]
    known = [seconds for seconds in left if seconds is not None]
    return "unknown" if len(known) < len(left) else duration(sum(known)) if left else "none left"


def _weights(cells: Sequence[PlannedCell]) -> str:
    sizes = [one.size.bytes for one in cells]
    known = [size for size in sizes if size is not None]
    return f"{max(known) / 2**20:,.0f}" if len(known) == len(sizes) else "unknown"
