"""What a study comes to: its cells, what is done of them, and what the rest will cost."""

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
        keyed: The cell.
        state: `done`, `failed`, `running` or `missing`.
        seconds: It took, or what it will take.
        size: Of its model.
        gpus: It runs on.
        damage: What became of its files since it was finished, for which it is run again; None if nothing did.
    """

    keyed: Keyed
    state: str
    seconds: cost.Seconds
    size: Size
    gpus: int
    damage: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `study plan --json` prints it."""
        cell = self.keyed.cell
        return {
            "id": self.keyed.id,
            "key": self.keyed.key,
            "model": cell.model,
            "model_args": dict(cell.arguments),
            "tasks": list(cell.tasks),
            "limit": cell.limit,
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
        study: As its file says.
        cells: In the order of the file.
        others: Finished cells of the folder that are not of this plan.
    """

    study: Study
    cells: tuple[PlannedCell, ...]
    others: tuple[str, ...]

    @property
    def seconds_left(self) -> float | None:
        """What the cells that are not done will take one after the other; None where nothing tells."""
        left = [one.seconds.value for one in self.cells if one.state != "done"]
        return None if None in left else sum(value or 0.0 for value in left)

    def counts(self) -> dict[str, int]:
        """State → number of cells."""
        return {
            state: sum(one.state == state for one in self.cells) for state in ("done", "failed", "running", "missing")
        }

    def to_dict(self) -> dict[str, Any]:
        """As `study plan --json` prints it."""
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
    """How keys are computed where there are so many GPUs."""
    return lambda cell: keyed(cell, cuda=gpus_needed(cell, gpus) > 0)


def plan(study: Study, output: Path | None = None, gpus: int | None = None) -> Plan:
    """Plan a study.

    Args:
        study: As its file says.
        output: Its folder; None to take nothing for done.
        gpus: GPUs that there are; None to look on this machine.

    Raises:
        ValueError: If something in the file cannot be done.
    """
    folder = StudyFolder(output) if output is not None and output.is_dir() else None
    past, there = cost.past(folder), len(visible_gpus()) if gpus is None else gpus
    key = keys(there)
    found = []
    planned = cells(study)
    _expect_tasks(study)
    _expect_what_is_asked(study, planned)
    for cell in planned:
        one = key(cell)
        damage = None if folder is None else folder.damage(one.id)
        measured = None if folder is None or damage else _measured(folder, one.id)
        state = "done" if measured else "missing" if folder is None else _state(folder, one.id)
        needed = gpus_needed(cell, there)
        large = size(cell, cuda=needed > 0)
        took = measured or cost.seconds(cell, past, large.parameters, cuda=needed > 0)
        found.append(PlannedCell(one, state, took, large, needed, damage))
    ids = {one.keyed.id for one in found}
    others = () if folder is None else tuple(one for one in folder.finished() if one not in ids)
    return Plan(study, tuple(found), others)


def _expect_tasks(study: Study) -> None:
    """Refuse tasks that are not known here, at their place in the file."""
    for tasks in (tasks for grid, _ in study.grids for tasks in grid.tasks):
        try:
            known(tasks.value)
        except ValueError as error:
            raise ValueError(f"{tasks.where}: {error}") from error


def _expect_what_is_asked(study: Study, planned: Sequence[Cell]) -> None:
    """Refuse an analysis that these cells would not be enough for, at its place in the file."""
    if study.asked is None:
        return
    try:
        judging.expect(study.asked.plain(), planned)
    except ValueError as error:
        raise located(error, study.asked) from error


def _measured(folder: StudyFolder, cell: str) -> cost.Seconds | None:
    """What a finished cell took; None where it is not finished, or another runner has just put it aside."""
    with suppress(FileNotFoundError):
        return cost.Seconds(folder.done(cell)["seconds"], "measured")
    return None


def _state(folder: StudyFolder, cell: str) -> str:
    if folder.is_running(cell):
        return "running"
    return "failed" if folder.has_failed(cell) else "missing"


def damages(found: Plan) -> list[str]:
    """A line on every cell that was finished and has to be run again, for its files are not as they were."""
    return [f"not whole, to be run again: {one.keyed.id}: {one.damage}" for one in found.cells if one.damage]


def summary(found: Plan) -> str:
    """A plan in one line."""
    counts = ", ".join(f"{number} {state}" for state, number in found.counts().items() if number)
    left = "unknown (no finished cell tells)" if found.seconds_left is None else duration(found.seconds_left)
    if any(one.state != "done" and one.seconds.basis.startswith(cost.STATED) for one in found.cells):
        left += " (by parameters and documents, not measured)"
    verb = "is" if len(found.others) == 1 else "are"
    others = (
        f"; {counted(len(found.others), 'finished cell')} in the folder {verb} not of this plan" if found.others else ""
    )
    return f"{counted(len(found.cells), 'cell')}: {counts}; time left, one at a time: {left}{others}"


def without_analysis(found: Plan, output: Path) -> str:
    """Why a study that was run has no analysis, and how to get one all the same."""
    counts = found.counts()
    left = ", ".join(f"{counts[state]} {state}" for state in ("failed", "running", "missing") if counts[state])
    return (
        f"The analysis was not made: of {counted(len(found.cells), 'cell')} {left}. Without them:"
        f" {command_line(('lmms-plugin', 'study', 'analyse', output, '--partial'))}"
    )
