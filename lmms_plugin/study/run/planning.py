"""The plan of a study: its cells, which of them are done, and the estimated cost of the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.study.file.asked import located
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import Cell, gpus_needed
from lmms_plugin.study.file.identity import Keyed, keyed
from lmms_plugin.study.file.schema import Study
from lmms_plugin.study.file.task_images import expect_sliced
from lmms_plugin.study.file.tasks import known
from lmms_plugin.study.run import cost
from lmms_plugin.study.run.attempt import command
from lmms_plugin.study.run.local import visible_gpus
from lmms_plugin.study.run.progress import duration
from lmms_plugin.study.run.weights import Size, size
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.verdicts import judging
from lmms_plugin.utils.messages import command_line, counted


class PlannedCell(NamedTuple):
    """A cell of a plan.

    Attributes:
        keyed: Cell with its key.
        state: `done`, `failed`, `running` or `missing`.
        seconds: Time it took, or estimated time.
        size: Size of its model.
        gpus: Number of GPUs it runs on.
        damage: Change to its files since it finished, for which it is run again; None if there is none.
    """

    keyed: Keyed
    state: str
    seconds: cost.Seconds
    size: Size
    gpus: int
    damage: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as `study plan --json` prints it."""
        cell = self.keyed.cell
        return {
            "id": self.keyed.id,
            "key": self.keyed.key,
            "model": cell.model,
            "model_args": dict(cell.arguments),
            "tasks": list(cell.tasks),
            "limit": cell.limit,
            "images": cell.images,
            "axes": cell.axes.to_dict(),
            "state": self.state,
            "damage": self.damage,
            "seconds": self.seconds.value,
            "seconds_from": self.seconds.basis,
            "parameters": self.size.parameters,
            "weight_bytes": self.size.bytes,
            "weight_bytes_from": self.size.basis,
            "gpus": self.gpus,
            "command": list(command(cell, self.gpus)),
        }


class Plan(NamedTuple):
    """A study with its cells.

    Attributes:
        study: Study as its file states it.
        cells: Cells in the order of the file.
        others: Finished cells of the folder that are not in this plan.
    """

    study: Study
    cells: tuple[PlannedCell, ...]
    others: tuple[str, ...]

    @property
    def seconds_left(self) -> float | None:
        """Return the estimated time of the unfinished cells one after the other; None if unknown."""
        left = [one.seconds.value for one in self.cells if one.state != "done"]
        return None if None in left else sum(value or 0.0 for value in left)

    def counts(self) -> dict[str, int]:
        """Count cells by state."""
        return {
            state: sum(one.state == state for one in self.cells) for state in ("done", "failed", "running", "missing")
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as `study plan --json` prints it."""
        return {
            "study": self.study.name,
            "file": self.study.file,
            "cells": [one.to_dict() for one in self.cells],
            "counts": self.counts(),
            "seconds_left": self.seconds_left,
            "others": list(self.others),
            "analysis": self.study.analysis,
        }


def keys(gpus: int) -> Callable[[Cell], Keyed]:
    """Return the function that computes keys, given the number of GPUs."""
    return lambda cell: keyed(cell, cuda=gpus_needed(cell, gpus) > 0)


def plan(study: Study, output: Path | None = None, gpus: int | None = None, only: Sequence[Cell] | None = None) -> Plan:
    """Plan a study.

    Args:
        study: Study as its file states it.
        output: Folder of the study; None to take no cell as done.
        gpus: Number of GPUs; None to count those of this machine.
        only: Cells to plan, of a study that was planned before; None for all of its file.

    Raises:
        ValueError: An entry of the file is impossible.
    """
    folder = StudyFolder(output) if output is not None and output.is_dir() else None
    past, there = cost.past(folder), len(visible_gpus()) if gpus is None else gpus
    shared = cost.SharedCosts()
    key = keys(there)
    found = []
    planned = checked_cells(study) if only is None else only
    for cell in planned:
        one = key(cell)
        damage = None if folder is None else folder.damage(one.id)
        measured = None if folder is None or damage else _measured(folder, one.id)
        state = "done" if measured else "missing" if folder is None else _state(folder, one.id)
        needed = gpus_needed(cell, there)
        large = size(cell, cuda=needed > 0)
        estimated = cost.seconds(cell, past, large.parameters, cuda=needed > 0, shared=shared)
        took = measured or estimated
        found.append(PlannedCell(one, state, took, large, needed, damage))
    ids = {one.keyed.id for one in found}
    others = () if folder is None else tuple(one for one in folder.finished() if one not in ids)
    return Plan(study, tuple(found), others)


def checked_cells(study: Study) -> Sequence[Cell]:
    """Return all cells of a study, checked together with its tasks and its analysis.

    Raises:
        ValueError: An entry of the file is impossible.
    """
    planned = cells(study)
    _expect_tasks(study)
    _expect_what_is_asked(study, planned)
    return planned


def _expect_tasks(study: Study) -> None:
    """Refuse tasks that are not known here or cannot take part of their images, with their place in the file."""
    for tasks, images in ((tasks, grid.images) for grid, _ in study.grids for tasks in grid.tasks):
        try:
            known(tasks.value)
            if images is not None:
                expect_sliced(tasks.value)
        except ValueError as error:
            raise ValueError(f"{tasks.where}: {error}") from error


def _expect_what_is_asked(study: Study, planned: Sequence[Cell]) -> None:
    """Refuse an analysis for which these cells are not enough, with its place in the file."""
    if study.asked is None:
        return
    try:
        judging.expect(study.asked.plain(), planned)
    except ValueError as error:
        raise located(error, study.asked) from error


def _measured(folder: StudyFolder, cell: str) -> cost.Seconds | None:
    """Return the time of a finished cell; None if it is not finished, or another runner has just moved it away."""
    with suppress(FileNotFoundError):
        return cost.Seconds(folder.done(cell)["seconds"], "measured")
    return None


def _state(folder: StudyFolder, cell: str) -> str:
    if folder.is_running(cell):
        return "running"
    return "failed" if folder.has_failed(cell) else "missing"


def damages(found: Plan) -> list[str]:
    """Return one line for every finished cell whose files have changed, so that it has to be run again."""
    return [f"not whole, to be run again: {one.keyed.id}: {one.damage}" for one in found.cells if one.damage]


def remarks(found: Plan, output: Path | None) -> list[str]:
    """Return lines about the folder of a study: cells that are not whole, or that it holds no cell of any study."""
    if output is None or found.others or any(one.state != "missing" or one.damage for one in found.cells):
        return damages(found)
    return [f"--output: nothing of a study is in {output}: every cell counts as missing"]


def summary(found: Plan) -> str:
    """Summarise a plan in one line."""
    counts = ", ".join(f"{number} {state}" for state, number in found.counts().items() if number)
    costs = [one.seconds for one in found.cells if one.state != "done"]
    left = f"; time left, one at a time: {_time_left(costs)}" if costs else ""
    verb = "is" if len(found.others) == 1 else "are"
    others = (
        f"; {counted(len(found.others), 'finished cell')} in the folder {verb} not of this plan" if found.others else ""
    )
    return f"{counted(len(found.cells), 'cell')}: {counts}{left}{others}"


def _time_left(costs: Sequence[cost.Seconds]) -> str:
    """Return the time of unfinished cells; where that of some is unknown, that of the others and how many these are."""
    known = [one.value for one in costs if one.value is not None]
    if not known:
        return "unknown (no finished cell tells)"
    stated = any(one.value is not None and one.basis.startswith(cost.STATED) for one in costs)
    told = duration(sum(known)) + (" (by parameters and documents, not measured)" if stated else "")
    unknown = len(costs) - len(known)
    return f"{told}, and unknown for {counted(unknown, 'cell')}" if unknown else told


def on_one_page(output: Path) -> str:
    """Return the line that names the command that shows a finished study."""
    return f"All cells on one page: {command_line(('lmms-plugin', 'report', output, '-o', 'report.html'))}"


def without_analysis(found: Plan, output: Path) -> str:
    """Return why a study that was run has no analysis, and how to get one."""
    counts = found.counts()
    left = ", ".join(f"{counts[state]} {state}" for state in ("failed", "running", "missing") if counts[state])
    return (
        f"The analysis was not made: of {counted(len(found.cells), 'cell')} {left}. Without them:"
        f" {command_line(('lmms-plugin', 'study', 'analyse', output, '--partial'))}"
    )
