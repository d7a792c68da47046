"""Cells on this machine: several processes at a time, one polling loop, no threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lmms_plugin.study import identity
from lmms_plugin.study.attempt import Attempt, about
from lmms_plugin.study.folder import Lock, StudyFolder
from lmms_plugin.study.grid import Cell
from lmms_plugin.study.identity import Keyed

POLL_SECONDS = 0.2
ELSEWHERE_SECONDS = 2.0
_MOST_CHANGES = 3


class Watcher(Protocol):
    """Whoever is told how a study goes."""

    def started(self, cell: str) -> None:
        """A cell is being worked on."""

    def done(self, cell: str, seconds: float | None) -> None:
        """A cell is finished, after that many seconds; None if another runner did it."""

    def failed(self, cell: str, problem: str) -> None:
        """A cell failed."""

    def waiting(self, cell: str, reason: str) -> None:
        """A cell that was started has to be done later."""

    def tick(self) -> None:
        """Time has passed."""


@dataclass
class _Work:
    attempt: Attempt
    lock: Lock
    gpus: tuple[str, ...]


@dataclass
class LocalRunner:
    """Runs the cells of a study.

    Attributes:
        folder: Of the study.
        watcher: Is told about everything.
        jobs: Cells at a time.
        gpus: Of this machine, as CUDA counts them.
        key: Computes the key of a cell from what lies here now.
    """

    folder: StudyFolder
    watcher: Watcher
    jobs: int
    gpus: list[str]
    key: Callable[[Cell], Keyed]
    _working: list[_Work] = field(default_factory=list)
    _changes: dict[tuple[object, ...], int] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> None:
        """Bring all cells to an end, finished or failed; an interruption ends all processes first.

        Raises:
            ValueError: If a cell needs more GPUs than there are.
        """
        for cell in cells:
            if self.needed(cell) > len(self.gpus):
                raise ValueError(
                    f"expected {self.needed(cell)} GPUs for each cell, got {len(self.gpus)} on this machine"
                )
        waiting, elsewhere = deque(cells), deque[Cell]()
        asked = time.monotonic()
        try:
            while waiting or elsewhere or self._working:
                self._fill(waiting, elsewhere)
                self._settle(waiting)
                if elsewhere and not waiting and time.monotonic() - asked > ELSEWHERE_SECONDS:
                    waiting, elsewhere, asked = elsewhere, deque(), time.monotonic()
                self.watcher.tick()
                time.sleep(POLL_SECONDS if self._working or elsewhere else 0)
        finally:
            for work in self._working:
                work.attempt.end()
                self.folder.discard(work.attempt.keyed.id)
                work.lock.release()

    def needed(self, cell: Cell) -> int:
        """GPUs that a cell takes."""
        return min(1, len(self.gpus)) * cell.resources.processes if cell.resources.gpus is None else cell.resources.gpus

    def _fill(self, waiting: deque[Cell], elsewhere: deque[Cell]) -> None:
        while waiting and len(self._working) < self.jobs:
            cell = waiting.popleft()
            if self.needed(cell) > len(self.gpus) - sum(len(work.gpus) for work in self._working):
                waiting.appendleft(cell)
                return
            keyed = self.key(cell)
            lock = self.folder.lock(keyed.id)
            if lock is None:
                elsewhere.append(cell)
            elif self.folder.is_done(keyed.id) or self.folder.restore(keyed.id):
                self.watcher.done(keyed.id, None)
                lock.release()
            else:
                self._working.append(self._start(keyed, lock))

    def _start(self, keyed: Keyed, lock: Lock) -> _Work:
        taken = {gpu for work in self._working for gpu in work.gpus}
        gpus = tuple(gpu for gpu in self.gpus if gpu not in taken)[: self.needed(keyed.cell)]
        threads = (
            max(1, (os.cpu_count() or 1) // (self.jobs * keyed.cell.resources.processes)) if self.jobs > 1 else None
        )
        work = self.folder.begin(keyed.id)
        attempt = Attempt.start(keyed, work, gpus=gpus, threads=threads, inherited=(lock.descriptor,))
        self.watcher.started(keyed.id)
        return _Work(attempt, lock, gpus)

    def _settle(self, waiting: deque[Cell]) -> None:
        for work in [work for work in self._working if work.attempt.over]:
            self._record(work, waiting)
            self._working.remove(work)
            work.lock.release()

    def _record(self, work: _Work, waiting: deque[Cell]) -> None:
        attempt, keyed = work.attempt, work.attempt.keyed
        outcome = attempt.outcome()
        said = about(keyed, len(work.gpus))
        identity.forget()
        changed = keyed.differences(self.key(keyed.cell).parts)
        if changed and self._changes.get(keyed.cell.question, 0) < _MOST_CHANGES:
            self._changes[keyed.cell.question] = self._changes.get(keyed.cell.question, 0) + 1
            self.folder.discard(keyed.id)
            self.watcher.waiting(keyed.id, f"{' and '.join(changed)} changed while it ran")
            waiting.append(keyed.cell)
            return
        problem = f"{' and '.join(changed)} changed while it ran" if changed else outcome.problem
        if problem is None:
            self.folder.finish(keyed.id, said, outcome.done)
            self.watcher.done(keyed.id, outcome.done["seconds"])
            return
        failed = {"problem": problem, "returncode": outcome.returncode, "tail": attempt.tail(), **outcome.done}
        self.folder.fail(keyed.id, said, failed)
        self.watcher.failed(keyed.id, problem)


def visible_gpus() -> list[str]:
    """GPUs of this machine that this process may use, as CUDA counts or names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())] if listed.returncode == 0 else []
