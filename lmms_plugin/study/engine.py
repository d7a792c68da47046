"""Runs a study: what is missing of it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.study import on_ray
from lmms_plugin.study.folder import StudyFolder
from lmms_plugin.study.grid import gpus_needed
from lmms_plugin.study.local import LocalRunner, visible_gpus
from lmms_plugin.study.planning import Plan, Planned, keys, plan
from lmms_plugin.study.progress import Display
from lmms_plugin.study.reading import read
from lmms_plugin.study.recording import Recorder
from lmms_plugin.study.storage import Storage


class Finished(NamedTuple):
    """A study after a run.

    Attributes:
        plan: Its cells, with what became of them.
        problems: Cell that failed → why.
        analysis: What the analysis made of it; None without one, or while cells are missing.
    """

    plan: Plan
    problems: dict[str, str]
    analysis: Any = None

    @property
    def complete(self) -> bool:
        """Whether every cell is finished."""
        return all(one.state == "done" for one in self.plan.cells)


def run(
    file: Path,
    output: Path,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    ray: str | None = None,
    storage: str | None = None,
) -> Finished:
    """Run the cells of a study that are not finished.

    Args:
        file: Study file.
        output: Folder of the study.
        jobs: Cells at a time on this machine.
        retry_failed: Whether cells that failed before are tried again.
        ray: Address of a Ray cluster to run them on; None for this machine.
        storage: Any place that fsspec knows, into which finished cells are copied and out of which they are taken.

    Raises:
        ValueError: If something in the file cannot be done, before anything is run, or the folder is of something else.
        ImportError: If Ray is asked for and not installed; names the command.
    """
    study = read(file)
    gpus = len(visible_gpus()) if ray is None else on_ray.connect(ray)
    before = plan(study, output, gpus)
    folder, shared = StudyFolder(output), None if storage is None else Storage.at(storage)
    folder.open(file)
    if shared is not None:
        shared.put_study(folder)
    wanted = [one for one in before.cells if _wanted(one, retry_failed)]
    expected = {one.keyed.id: one.seconds.value for one in wanted}
    with Display(expected, len(before.cells) - len(wanted), jobs) as display:
        recorder, cells = Recorder(folder, display, shared), [one.keyed.cell for one in wanted]
        if ray is None:
            LocalRunner(recorder, jobs, visible_gpus(), keys(gpus)).run(cells)
        else:
            on_ray.RayRunner(recorder, keys(gpus), lambda cell: gpus_needed(cell, gpus)).run(cells)
    after = plan(study, output, gpus)
    failures = {one.keyed.id: folder.failure(one.keyed.id) for one in after.cells}
    problems = {cell: failure["problem"] for cell, failure in failures.items() if failure is not None}
    return _analysed(Finished(after, problems), folder)


def _wanted(one: Planned, retry_failed: bool) -> bool:
    return one.state in ("missing", "running") or (one.state == "failed" and retry_failed)


def _analysed(finished: Finished, folder: StudyFolder) -> Finished:
    """The one place where the analysis that the file asks for is to be called, once every cell is finished."""
    return finished
