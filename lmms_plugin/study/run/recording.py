"""Recording of a cell's outcome, wherever it ran: stored in the study's folder, copied to its storage, and reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.run.attempt import Outcome, about
from lmms_plugin.study.store.folder import Lock, StudyFolder
from lmms_plugin.study.store.storage import Storage


class Watcher(Protocol):
    """Receiver of a study's progress."""

    def started(self, cell: str) -> None:
        """Receive that a cell has started."""

    def done(self, cell: str, seconds: float | None) -> None:
        """Receive that a cell has finished, after that many seconds; None if another runner did it."""

    def failed(self, cell: str, problem: str) -> None:
        """Receive that a cell has failed."""

    def waiting(self, cell: str, reason: str) -> None:
        """Receive that a started cell is postponed."""

    def tick(self) -> None:
        """Receive that time has passed."""


class Taken(Enum):
    """Reason why a cell is not to be run here."""

    ELSEWHERE = "another runner works on it"
    SETTLED = "it is finished, or another runner has just failed at it"


@dataclass(frozen=True)
class Recorder:
    """Recorder of the outcomes of cells.

    Attributes:
        folder: Folder of the study.
        watcher: Receiver of progress.
        storage: Storage to which finished cells are copied; None for none.
    """

    folder: StudyFolder
    watcher: Watcher
    storage: Storage | None = None
    _failures: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    def claim(self, cell: str) -> Lock | Taken:
        """Lock a cell for work, or return why it is not to be run here."""
        before = self.folder.failure(cell)
        lock = self.folder.lock(cell)
        if lock is None:
            self._failures.setdefault(cell, before)
            return Taken.ELSEWHERE
        failure = self.folder.failure(cell)
        failed_elsewhere = failure is not None and failure != self._failures.get(cell, failure)
        if failed_elsewhere or self._has(cell):
            lock.release()
            if failure is not None and failed_elsewhere:
                self.watcher.failed(cell, failure["problem"])
            else:
                self.watcher.done(cell, None)
            return Taken.SETTLED
        return lock

    def _has(self, cell: str) -> bool:
        """Return whether a cell is finished, here or in the storage."""
        if self.folder.is_done(cell):
            return True
        fetched = self.storage is not None and self.storage.fetch(cell, self.folder)
        return fetched or self.folder.restore(cell)

    def record(self, keyed: Keyed, outcome: Outcome, gpus: int) -> None:
        """Store the outcome of a cell whose lock the caller holds."""
        said = about(keyed, gpus)
        if outcome.problem is None:
            self.folder.finish(keyed.id, said, outcome.done)
            if self.storage is not None:
                self.storage.put(keyed.id, self.folder)
            self.watcher.done(keyed.id, outcome.done["seconds"])
            return
        failed = {"problem": outcome.problem, "returncode": outcome.returncode, "tail": outcome.tail, **outcome.done}
        self.folder.fail(keyed.id, said, failed)
        self.watcher.failed(keyed.id, outcome.problem)
