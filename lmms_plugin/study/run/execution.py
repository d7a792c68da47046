"""Execution of a study: runs the missing cells, and nothing else."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from lmms_plugin.analysis.study_files import STAGES
from lmms_plugin.study.file.grid import gpus_needed
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.file.schema import Study
from lmms_plugin.study.run import on_ray
from lmms_plugin.study.run.local import LocalRunner, visible_gpus
from lmms_plugin.study.run.planning import Plan, PlannedCell, keys, plan
from lmms_plugin.study.run.recording import Recorder, Watcher
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.store.storage import Storage
from lmms_plugin.study.verdicts import judging
from lmms_plugin.study.verdicts.conclusions import Conclusion


class Watch(Protocol):
    """Factory of watchers, which are notified of a study's progress."""

    def __call__(self, expected: dict[str, float | None], before: int, jobs: int) -> AbstractContextManager[Watcher]:
        """Start to watch.

        Args:
            expected: Cell to run → expected time in seconds; None if unknown.
            before: Cells that were finished before.
            jobs: Number of cells at a time.
        """


class Finished(NamedTuple):
    """A study after a run.

    Attributes:
        plan: Cells with their states.
        problems: Failed cell → reason.
        conclusions: Results of the analysis that the file asks for; None without one, or while cells are missing.
    """

    plan: Plan
    problems: dict[str, str]
    conclusions: list[Conclusion] | None = None

    @property
    def complete(self) -> bool:
        """Return whether every cell is finished."""
        return all(one.state == "done" for one in self.plan.cells)


@dataclass(frozen=True)
class Work:
    """Where and how the cells of a study are run.

    Attributes:
        folder: Folder of the study.
        watch: Factory of the watcher that is notified of progress.
        jobs: Number of cells at a time on this machine.
        retry_failed: Whether to run failed cells again.
        cluster: Ray cluster to run the cells on; None for this machine.
        gpus: Number of GPUs there.
        storage: Storage of finished cells; None for none.
    """

    folder: StudyFolder
    watch: Watch
    jobs: int
    retry_failed: bool
    cluster: on_ray.Cluster | None
    gpus: int
    storage: Storage | None

    @classmethod
    def on(
        cls,
        output: Path,
        watch: Watch,
        *,
        jobs: int = 1,
        retry_failed: bool = False,
        ray: str | None = None,
        storage: str | None = None,
    ) -> Work:
        """Connect to cluster and storage.

        Args:
            output: Folder of the study.
            watch: Factory of the watchers that are notified of progress.
            jobs: Number of cells at a time on this machine.
            retry_failed: Whether to run failed cells again.
            ray: Address of a Ray cluster to run the cells on; None for this machine.
            storage: URL for fsspec, to which finished cells are copied and from which they are taken.

        Raises:
            ImportError: Ray is requested and not installed; names the command.
        """
        cluster = None if ray is None else on_ray.connect(ray)
        gpus = len(visible_gpus()) if cluster is None else cluster.gpus
        shared = None if storage is None else Storage.at(storage)
        return cls(StudyFolder(output), watch, jobs, retry_failed, cluster, gpus, shared)

    def open(self, file: Path) -> None:
        """Create the folder for a study file.

        Raises:
            ValueError: The folder holds something else.
        """
        self.folder.open(file)
        if self.storage is not None:
            self.storage.put_study(self.folder)

    def wanted(self, before: Plan) -> list[PlannedCell]:
        """Return the cells of a plan that are to be run."""
        return [one for one in before.cells if _wanted(one, self.retry_failed)]

    def run(self, before: Plan) -> None:
        """Run the cells of a plan that are not finished."""
        wanted = self.wanted(before)
        expected = {one.keyed.id: one.seconds.value for one in wanted}
        cells = [one.keyed.cell for one in wanted]
        at_once = self.jobs if self.cluster is None else self.cluster.at_once(cells)
        with self.watch(expected, len(before.cells) - len(wanted), at_once) as watcher:
            for one in wanted:
                if one.damage is not None:
                    watcher.waiting(one.keyed.id, one.damage)
            recorder = Recorder(self.folder, watcher, self.storage)
            if self.cluster is None:
                LocalRunner(recorder, self.jobs, visible_gpus(), keys(self.gpus)).run(cells)
            else:
                on_ray.RayRunner(recorder, keys(self.gpus), lambda cell: gpus_needed(cell, self.gpus)).run(cells)

    def problems(self, after: Plan) -> dict[str, str]:
        """Return the failed cells of a plan, and why each failed."""
        failures = {one.keyed.id: self.folder.failure(one.keyed.id) for one in after.cells}
        return {cell: failure["problem"] for cell, failure in failures.items() if failure is not None}


def run(file: Path, work: Work) -> Finished:
    """Run the cells of a study that are not finished.

    Args:
        file: Study file.
        work: Where and how they are run.

    Raises:
        ValueError: An entry of the file is impossible (found before anything runs), or the folder holds something else.
    """
    study, output = read(file), work.folder.path
    before = plan(study, output, work.gpus)
    work.open(file)
    # Stages are of the verdict that this run replaces.
    if work.wanted(before) or (output / STAGES).exists():
        judging.withdraw(output)
    work.run(before)
    return _finished(study, work)


def _finished(study: Study, work: Work) -> Finished:
    """Return the study after a run; the analysis is made if nothing is missing."""
    after = plan(study, work.folder.path, work.gpus)
    finished = Finished(after, work.problems(after))
    if study.analysis is None or not finished.complete:
        return finished
    only = [one.keyed.id for one in after.cells]
    said = judging.conclude(work.folder.path, study.analysis, only, workers=os.cpu_count() or 1)
    return finished._replace(conclusions=said)


def _wanted(one: PlannedCell, retry_failed: bool) -> bool:
    return one.state in ("missing", "running") or (one.state == "failed" and retry_failed)
