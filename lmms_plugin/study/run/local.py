"""Local runner: several processes at a time, one polling loop, no threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from lmms_plugin.quant_backends import SERVED
from lmms_plugin.study.file import identity
from lmms_plugin.study.file.grid import Cell, gpus_needed
from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.run.attempt import Attempt
from lmms_plugin.study.run.recording import Recorder, Taken
from lmms_plugin.study.run.shared_libraries import LOG, SharedLibraries
from lmms_plugin.study.run.shared_servers import FOLDER, SharedServers
from lmms_plugin.study.store.folder import Lock

POLL_SECONDS = 0.2
ELSEWHERE_SECONDS = 2.0
KEPT = ".kept"
"""Name of the folder of answers of servers to cells that are not finished, in the folder of the study."""
SHARED = ".shared"
"""Name of the folder of what cells of one unquantized model share, in the folder of the study."""
_MOST_CHANGES = 3
_FREEZE = "To run a study from a copy that stays as it is: docs/studies.md"


@dataclass
class _LocalWork:
    attempt: Attempt
    lock: Lock
    gpus: tuple[str, ...]


@dataclass
class LocalRunner:
    """Runner of cells on this machine.

    Attributes:
        recorder: Recorder of the study.
        jobs: Number of cells at a time.
        gpus: GPUs of this machine, as CUDA counts them.
        key: Function that computes the key of a cell from the current state of this machine.
    """

    recorder: Recorder
    jobs: int
    gpus: list[str]
    key: Callable[[Cell], Keyed]
    _servers: SharedServers = field(init=False)
    _libraries: SharedLibraries = field(init=False)
    _working: list[_LocalWork] = field(default_factory=list)
    _changes: dict[tuple[object, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._servers = SharedServers(self.recorder.folder.path / FOLDER)
        self._libraries = SharedLibraries(self.recorder.folder.path / LOG)

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all cells until they are finished or failed; an interruption stops all processes first.

        Raises:
            ValueError: A cell needs more GPUs than there are.
        """
        most = max((gpus_needed(cell, len(self.gpus)) for cell in cells), default=0)
        if most > len(self.gpus):
            raise ValueError(f"expected {most} GPUs for each cell, got {len(self.gpus)} on this machine")
        # A single cell imports as much by itself.
        self._libraries.wanted &= len(cells) > 1
        waiting, elsewhere = deque(cells), deque[Cell]()
        asked = time.monotonic()
        try:
            while waiting or elsewhere or self._working:
                self._fill(waiting, elsewhere)
                self._settle(waiting)
                self._servers.end_unused([*waiting, *(work.attempt.keyed.cell for work in self._working)])
                if elsewhere and not waiting and time.monotonic() - asked > ELSEWHERE_SECONDS:
                    waiting, elsewhere, asked = elsewhere, deque(), time.monotonic()
                self.recorder.watcher.tick()
                time.sleep(POLL_SECONDS if self._working or elsewhere else 0)
        finally:
            # Its copies end with it, also those that wait for its imports.
            self._libraries.end()
            for work in self._working:
                work.attempt.end()
                self.recorder.folder.discard(work.attempt.keyed.id)
                work.lock.release()
            self._servers.end_unused(())

    def _fill(self, waiting: deque[Cell], elsewhere: deque[Cell]) -> None:
        while waiting and len(self._working) < self.jobs:
            working = [work.attempt.keyed.cell for work in self._working]
            cell = next_of(waiting, working, lambda one: self._servers.gpus_of(one) is not None)
            if self._servers.gpus_of(cell) is None and gpus_needed(cell, len(self.gpus)) > len(self._free()):
                return
            waiting.remove(cell)
            identity.forget()
            keyed = self.key(cell)
            claim = self.recorder.claim(keyed.id)
            if claim is Taken.ELSEWHERE:
                elsewhere.append(cell)
            elif isinstance(claim, Lock):
                self._working.append(self._start(keyed, claim))

    def _free(self) -> tuple[str, ...]:
        taken = self._servers.gpus.union(*(work.gpus for work in self._working))
        return tuple(gpu for gpu in self.gpus if gpu not in taken)

    def _start(self, keyed: Keyed, lock: Lock) -> _LocalWork:
        gpus = self._servers.gpus_of(keyed.cell)
        if gpus is None:
            gpus = self._free()[: gpus_needed(keyed.cell, len(self.gpus))]
        threads = (
            max(1, (os.cpu_count() or 1) // (self.jobs * keyed.cell.resources.processes)) if self.jobs > 1 else None
        )
        work = self.recorder.folder.begin(keyed.id)
        attempt = Attempt.start(
            keyed,
            work,
            gpus=gpus,
            threads=threads,
            inherited=(lock.descriptor,),
            environment=self._servers.lend(keyed.cell, gpus),
            kept=self._kept(keyed) if keyed.cell.backend == SERVED else None,
            libraries=self._libraries,
            shared=self.recorder.folder.path / SHARED,
        )
        self.recorder.watcher.started(keyed.id)
        return _LocalWork(attempt, lock, gpus)

    def _kept(self, keyed: Keyed) -> Path:
        return self.recorder.folder.path / KEPT / keyed.id

    def _settle(self, waiting: deque[Cell]) -> None:
        for work in self._working:
            work.attempt.expire()
        for work in [work for work in self._working if work.attempt.over]:
            self._record(work, waiting)
            self._working.remove(work)
            work.lock.release()

    def _record(self, work: _LocalWork, waiting: deque[Cell]) -> None:
        keyed, outcome = work.attempt.keyed, work.attempt.outcome()
        if outcome.problem is None or outcome.changed:
            shutil.rmtree(self._kept(keyed), ignore_errors=True)
        again = self._changes.get(keyed.cell.question, 0)
        if outcome.changed and again < _MOST_CHANGES:
            self._changes[keyed.cell.question] = again + 1
            self.recorder.folder.discard(keyed.id)
            self.recorder.watcher.waiting(keyed.id, f"{outcome.problem}. {_FREEZE}")
            waiting.append(keyed.cell)
            return
        if work.attempt.crashed:
            self._libraries.leave_alone(keyed)
            self.recorder.folder.discard(keyed.id)
            self.recorder.watcher.waiting(keyed.id, f"{outcome.problem}: once more, with libraries of its own")
            waiting.appendleft(keyed.cell)
            return
        self.recorder.record(keyed, outcome, len(work.gpus))


def next_of(waiting: Sequence[Cell], working: Sequence[Cell], is_served: Callable[[Cell], bool]) -> Cell:
    """Return the cell to start next.

    Args:
        waiting: Cells that wait, at least one, in their order.
        working: Cells that run.
        is_served: Function that tells whether a running server answers for a cell.
    """
    # Cells of a running server need no further GPU, and go first, so that it ends and gives its own back.
    of_servers = (one for one in waiting if is_served(one))
    # A cell takes from others what they have computed in calibration; at the same time, each would compute it.
    busy = {cell.calibrated_on for cell in working} - {None}
    apart = (one for one in waiting if one.calibrated_on not in busy)
    return next(chain(of_servers, apart, waiting))


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine that this process may use, as CUDA counts or names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())] if listed.returncode == 0 else []
