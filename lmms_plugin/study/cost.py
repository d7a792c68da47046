"""What a cell will cost: seconds like those of finished cells, and bytes of weights from the checkpoint's own files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from lmms_plugin.study.folder import StudyFolder
from lmms_plugin.study.grid import Cell


class Seconds(NamedTuple):
    """How long a cell will take.

    Attributes:
        value: Seconds; None where nothing tells.
        basis: What says so, in words.
    """

    value: float | None
    basis: str


class Past(NamedTuple):
    """A finished cell of the same folder.

    Attributes:
        about: Its `cell.json`.
        seconds: It took.
    """

    about: Mapping[str, Any]
    seconds: float


def past(folder: StudyFolder | None) -> list[Past]:
    """Finished cells of a folder; none without a folder."""
    if folder is None:
        return []
    found = folder.finished()
    return [Past(folder.about(folder.done_path(one)), folder.done(one)["seconds"]) for one in found]


def seconds(cell: Cell, finished: Iterable[Past]) -> Seconds:
    """Estimate how long a cell takes: the median of the finished cells that are most like it.

    Cells count as alike by model, tasks and limit; among these the same method and bits are preferred, then the same
    method. There is no estimate from cells of another model, task or limit.
    """
    asked = {"tasks": list(cell.tasks), "limit": cell.limit, "processes": cell.resources.processes}
    alike = [one for one in finished if _named(one, asked) and one.about["axes"]["model"] == cell.axes.model]
    for axes in (("method", "bits", "calibration"), ("method",), ()):
        same = [one for one in alike if all(one.about["axes"][axis] == getattr(cell.axes, axis) for axis in axes)]
        if same:
            what = " and ".join(("model", "tasks", *axes))
            return Seconds(median(one.seconds for one in same), f"median of {len(same)} finished cells of equal {what}")
    return Seconds(None, "unknown: no cell of this model with these tasks is finished")


def _named(one: Past, asked: Mapping[str, Any]) -> bool:
    return all(one.about.get(name) == value for name, value in asked.items())
