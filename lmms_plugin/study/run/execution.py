"""Runs a study: what is missing of it, and nothing else."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from lmms_plugin.study.file.grid import gpus_needed
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.run import on_ray
from lmms_plugin.study.run.local import LocalRunner, visible_gpus
from lmms_plugin.study.run.planning import Plan, PlannedCell, keys, plan
from lmms_plugin.study.run.recording import Recorder, Watcher
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.store.storage import Storage
from lmms_plugin.study.verdicts import judging
from lmms_plugin.study.verdicts.conclusions import Conclusion


class Watch(Protocol):
    """Makes whoever is told how a study goes."""

    def __call__(self, expected: dict[str, float | None], before: int, jobs: int) -> AbstractContextManager[Watcher]:
        """Begin to watch.

        Args:
            expected: Cell → seconds it is expected to take; None where nothing tells. Cells that are to be run.
            before: Cells that were finished before.
            jobs: Cells at a time.
        """


class Finished(NamedTuple):
    """A study after a run.

    Attributes:
        plan: Its cells, with what became of them.
        problems: Cell that failed → why.
        conclusions: What the analysis that the file asks for says; None without one, or while cells are missing.
    """

    plan: Plan
    problems: dict[str, str]
    conclusions: list[Conclusion] | None = None

    @property
    def complete(self) -> bool:
        """Whether every cell is finished."""
        return all(one.state == "done" for one in self.plan.cells)


def run(
    file: Path,
    output: Path,
    watch: Watch,
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
        watch: Makes whoever is told how it goes.
        jobs: Cells at a time on this machine.
        retry_failed: Whether cells that failed before are tried again.
        ray: Address of a Ray cluster to run them on; None for this machine.
        storage: Any place that fsspec knows, into which finished cells are copied and out of which they are taken.

    Raises:
        ValueError: If something in the file cannot be done, before anything is run, or the folder is of something else.
        ImportError: If Ray is asked for and not installed; names the command.
    """
    study = read(file)
    cluster = None if ray is None else on_ray.connect(ray)
    gpus = len(visible_gpus()) if cluster is None else cluster.gpus
    before = plan(study, output, gpus)
    folder, shared = StudyFolder(output), None if storage is None else Storage.at(storage)
    folder.open(file)
    if shared is not None:
        shared.put_study(folder)
    wanted = [one for one in before.cells if _wanted(one, retry_failed)]
    if wanted:
        judging.withdraw(output)
    expected = {one.keyed.id: one.seconds.value for one in wanted}
    cells = [one.keyed.cell for one in wanted]
    at_once = jobs if cluster is None else cluster.at_once(cells)
    with watch(expected, len(before.cells) - len(wanted), at_once) as watcher:
        for one in wanted:
            if one.damage is not None:
                watcher.waiting(one.keyed.id, one.damage)
        recorder = Recorder(folder, watcher, shared)
        if cluster is None:
            LocalRunner(recorder, jobs, visible_gpus(), keys(gpus)).run(cells)
        else:
            on_ray.RayRunner(recorder, keys(gpus), lambda cell: gpus_needed(cell, gpus)).run(cells)
    after = plan(study, output, gpus)
    failures = {one.keyed.id: folder.failure(one.keyed.id) for one in after.cells}
    problems = {cell: failure["problem"] for cell, failure in failures.items() if failure is not None}
    finished = Finished(after, problems)
    if study.analysis is None or not finished.complete:
        return finished
    only = [one.keyed.id for one in after.cells]
    said = judging.conclude(folder.path, study.analysis, only, workers=os.cpu_count() or 1)
    return finished._replace(conclusions=said)


def _wanted(one: PlannedCell, retry_failed: bool) -> bool:
    return one.state in ("missing", "running") or (one.state == "failed" and retry_failed)
