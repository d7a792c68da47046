"""What `study plan` prints first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from lmms_plugin.cli.screens.screen import ScreenTable, screen
from lmms_plugin.metrics.power import POWER
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.run import planning
from lmms_plugin.study.run.design import DIFFERENCES, Design, PlannedComparison
from lmms_plugin.study.run.planning import Plan, PlannedCell
from lmms_plugin.study.run.progress import duration
from lmms_plugin.study.run.reference_design import ReferenceDesign
from lmms_plugin.study.verdicts.decisions import INTERACTION, UNDER_SHIFT
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.messages import counted

_REST = "Every cell: --all; with commands and keys: --json. Costs: docs/studies.md"
_MOST_VALUES = 12
_VALUES = 62
"""Columns of the values of an axis."""


def plan_screen(found: Plan, made: Design | ReferenceDesign | str | None = None, *, chosen: bool = False) -> str:
    """Return a plan: what it will show, cells and hours of every arm, which is a method with one model, and its axes.

    Args:
        found: Plan of a study.
        made: Its design, or why there is none; None to say nothing of it.
        chosen: Whether images and seeds were chosen for it, so that the study file has others.
    """
    answer, notes = [f"{planning.summary(found)}."], [f"study: {found.study.name}"]
    axes = ScreenTable(("axis", "values"), _axes(found.cells, images=not isinstance(made, Design)), "line", texts=(1,))
    arms = ScreenTable(("arm", *_STATES, "time left", "MiB"), _arms(found), "arm")
    if isinstance(made, str):
        notes.append(f"power: not told: {made}")
    if isinstance(made, ReferenceDesign):
        answer.append(_power_of_changes(made))
        return screen(answer, [_changes(made), axes, arms], notes, _REST)
    if not isinstance(made, Design):
        return screen(answer, [axes, arms], notes, _REST)
    answer.append(_power(made))
    if chosen:
        notes.append(f"in the study file: images: {made.images}; seeds: the first {made.seeds}")
    return screen(answer, [_contrasts(made), _until_decided(made), arms, axes], notes, _REST)


_ASKED = (UNDER_SHIFT, INTERACTION)


def _power(made: Design) -> str:
    """Return the smallest differences and what they rest on."""
    counts = made.assumed.counts
    of_all = "all" if made.images == counts.images else f"{made.images:,} of"
    told = " and ".join(f"{_points(made.smallest(asked))} {_WORDS[asked]}" for asked in _ASKED)
    measured = sum(one.variance.basis.startswith("measured") for one in made.shown)
    basis = "all" if measured == len(made.shown) else f"{measured} of {len(made.shown)}" if measured else "none"
    return (
        f"With {of_all} {counts.images:,} images (about {made.documents:,} documents a task) and"
        f" {counted(made.seeds, 'seed')} it finds differences of {told}, in points, {100 * POWER:.0f} times in 100"
        f" ({counted(made.assumed.tests, 'test')} by Holm; variances measured: {basis})."
    )


_WORDS = {UNDER_SHIFT: "under shift", INTERACTION: "of the interaction"}


def _contrasts(made: Design) -> ScreenTable:
    """Return, for every contrast, its smallest differences at the bits and model where they are largest."""
    margin = f"within ±{100 * made.assumed.question.margin:g}"
    rows = []
    for pair in made.assumed.question.contrasts:
        row = [" against ".join(pair)]
        for asked in _ASKED:
            same = [one for one in made.shown if _is_of(one, pair, asked)]
            row += [_points(max(one.smallest for one in same)), f"{100 * min(one.equivalent for one in same):.0f} %"]
        rows.append(tuple(row))
    headings = ("contrast", "under shift", margin, "interaction", margin)
    return ScreenTable(headings, rows, "contrast", "smallest difference found, points; how often equality is shown")


def _is_of(one: PlannedComparison, pair: tuple[str, str], asked: str) -> bool:
    return (one.comparison.first, one.comparison.second, one.comparison.asked) == (*pair, asked)


def _until_decided(made: Design) -> ScreenTable:
    """Return after how many images a run until decided has decided differences of some sizes, and equality."""
    equal = f"none (±{100 * made.assumed.question.margin:g})"
    names = [equal if one is None else f"{100 * one:g} points" for one in DIFFERENCES]
    rows = []
    for asked in _ASKED:
        stages = [made.stages_until_decided(asked, one) for one in DIFFERENCES]
        told = ("undecided" if one is None else f"{one[1]:,} ({one[0]})" for one in stages)
        rows.append((asked, *told, f"{made.stages[-1]:,} ({len(made.stages)})"))
    return ScreenTable(
        ("true difference", *names, "at worst"),
        rows,
        "question",
        "images (stages) after which --until-decided would have decided",
    )


def _power_of_changes(made: ReferenceDesign) -> str:
    """Return the smallest changes of each metric and what they rest on."""
    largest = {name: made.largest(name) for name in made.question.metrics}
    told = [f"{_points(value)} in {name}" for name, value in largest.items() if value is not None]
    measured = sum(one.variance is not None and one.variance.basis.startswith("measured") for one in made.shown)
    basis = f"{measured} of {len(made.shown)}" if measured else "none"
    if not told:
        return "What changes it finds is not known before some cells are finished (--output)."
    said = (
        f"It finds changes of {', '.join(told)}, in points, on every task that has it, {100 * POWER:.0f} times in 100"
        f" ({counted(made.tests, 'test')} of a metric by Holm; variances measured: {basis})."
    )
    unknown = [name for name, value in largest.items() if value is None]
    if unknown:
        said += f" Of {', '.join(unknown)} that is not known before some cells are finished (--output)."
    return said


def _changes(made: ReferenceDesign) -> ScreenTable:
    """Return, for every task, its images and the smallest change of each metric; without what no task tells."""
    names = [name for name in made.question.metrics if made.largest(name) is not None]
    rows = []
    for task in dict.fromkeys(one.task for one in made.shown if one.metric in names):
        own = {one.metric: one for one in made.shown if one.task == task}
        counts = next(((one.images, one.documents) for one in own.values() if one.images), (None, None))
        sizes = ("" if count is None else f"{count:,}" for count in counts)
        found = (
            "" if one is None else "unknown" if one.smallest is None else _points(one.smallest)
            for one in map(own.get, names)
        )
        rows.append((task, *sizes, *found))
    title = "smallest change found, points; unknown ones need finished cells (--output)"
    return ScreenTable(("task", "images", "documents", *names), rows, "task", title)


def _points(share: float) -> str:
    # No two arms differ by more; a handful of images shows nothing at all.
    return "over 100" if share > 1.0 else f"{100 * share:.1f}"


_STATES = ("cells", "done", "failed", "running")


def _axes(cells: Sequence[PlannedCell], *, images: bool) -> list[tuple[str, str]]:
    """Return every axis that has values, with those; tasks are an axis, too, and on demand images."""
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
    slices = dict.fromkeys(one.keyed.cell.images for one in cells if one.keyed.cell.images is not None)
    if images and slices:
        asked = map(ImageSlice.parse, slices)
        rows.append(("images", _listed([f"{one.stop - one.start:,} at random" for one in asked])))
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
