"""Cells on this machine: several processes at a time, one polling loop, no threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmms_plugin.study.file import identity
from lmms_plugin.study.file.grid import Cell, gpus_needed
from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.run.attempt import Attempt
from lmms_plugin.study.run.recording import Recorder, Taken
from lmms_plugin.study.store.folder import Lock

POLL_SECONDS = 0.2
ELSEWHERE_SECONDS = 2.0
_MOST_CHANGES = 3
_FREEZE = "To run a study from a copy that stays as it is: docs/studies.md"


@dataclass
class _LocalWork:
    attempt: Attempt
    lock: Lock
    gpus: tuple[str, ...]


@dataclass
class LocalRunner:
    """Runs the cells of a study.

    Attributes:
        recorder: Of the study.
        jobs: Cells at a time.
        gpus: Of this machine, as CUDA counts them.
        key: Computes the key of a cell from what lies here now.
    """

    recorder: Recorder
    jobs: int
    gpus: list[str]
    key: Callable[[Cell], Keyed]
    _working: list[_LocalWork] = field(default_factory=list)
    _changes: dict[tuple[object, ...], int] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> None:
        """Bring all cells to an end, finished or failed; an interruption ends all processes first.

        Raises:
            ValueError: If a cell needs more GPUs than there are.
        """
        most = max((gpus_needed(cell, len(self.gpus)) for cell in cells), default=0)
        if most > len(self.gpus):
            raise ValueError(f"expected {most} GPUs for each cell, got {len(self.gpus)} on this machine")
        waiting, elsewhere = deque(cells), deque[Cell]()
        asked = time.monotonic()
        try:
            while waiting or elsewhere or self._working:
                self._fill(waiting, elsewhere)
                self._settle(waiting)
                if elsewhere and not waiting and time.monotonic() - asked > ELSEWHERE_SECONDS:
                    waiting, elsewhere, asked = elsewhere, deque(), time.monotonic()
                self.recorder.watcher.tick()
                time.sleep(POLL_SECONDS if self._working or elsewhere else 0)
        finally:
            for work in self._working:
                work.attempt.end()
                self.recorder.folder.discard(work.attempt.keyed.id)
                work.lock.release()

    def _fill(self, waiting: deque[Cell], elsewhere: deque[Cell]) -> None:
        while waiting and len(self._working) < self.jobs:
            cell = waiting.popleft()
            if gpus_needed(cell, len(self.gpus)) > len(self.gpus) - sum(len(work.gpus) for work in self._working):
                waiting.appendleft(cell)
                return
            identity.forget()
            keyed = self.key(cell)
            claim = self.recorder.claim(keyed.id)
            if claim is Taken.ELSEWHERE:
                elsewhere.append(cell)
            elif isinstance(claim, Lock):
                self._working.append(self._start(keyed, claim))

    def _start(self, keyed: Keyed, lock: Lock) -> _LocalWork:
        taken = {gpu for work in self._working for gpu in work.gpus}
        gpus = tuple(gpu for gpu in self.gpus if gpu not in taken)[: gpus_needed(keyed.cell, len(self.gpus))]
        threads = (
            max(1, (os.cpu_count() or 1) // (self.jobs * keyed.cell.resources.processes)) if self.jobs > 1 else None
        )
        work = self.recorder.folder.begin(keyed.id)
        attempt = Attempt.start(keyed, work, gpus=gpus, threads=threads, inherited=(lock.descriptor,))
        self.recorder.watcher.started(keyed.id)
        return _LocalWork(attempt, lock, gpus)

    def _settle(self, waiting: deque[Cell]) -> None:
        for work in self._working:
            work.attempt.expire()
        for work in [work for work in self._working if work.attempt.over]:
            self._record(work, waiting)
            self._working.remove(work)
            work.lock.release()

    def _record(self, work: _LocalWork, waiting: deque[Cell]) -> None:
        keyed, outcome = work.attempt.keyed, work.attempt.outcome()
        again = self._changes.get(keyed.cell.question, 0)
        if outcome.changed and again < _MOST_CHANGES:
            self._changes[keyed.cell.question] = again + 1
            self.recorder.folder.discard(keyed.id)
            self.recorder.watcher.waiting(keyed.id, f"{outcome.problem}. {_FREEZE}")
            waiting.append(keyed.cell)
            return
        self.recorder.record(keyed, outcome, len(work.gpus))


def visible_gpus() -> list[str]:
    """GPUs of this machine that this process may use, as CUDA counts or names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())] if listed.returncode == 0 else []
