"""What becomes of a cell, wherever it ran: kept in the study's folder, copied to its storage, and told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from lmms_plugin.study.file.identity import Keyed
from lmms_plugin.study.run.attempt import Outcome, about
from lmms_plugin.study.store.folder import Lock, StudyFolder
from lmms_plugin.study.store.storage import Storage


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


class Taken(Enum):
    """Why a cell is not to be worked on here."""

    ELSEWHERE = "another runner works on it"
    SETTLED = "it is finished, or another runner has just failed at it"


@dataclass(frozen=True)
class Recorder:
    """Keeps what cells come to.

    Attributes:
        folder: Of the study.
        watcher: Is told about everything.
        storage: Where finished cells are copied to; None for nowhere.
    """

    folder: StudyFolder
    watcher: Watcher
    storage: Storage | None = None
    _failures: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    def claim(self, cell: str) -> Lock | Taken:
        """Take the right to work on a cell, unless that is not to be done here."""
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
        """Whether a cell is finished, here or in the storage."""
        if self.folder.is_done(cell):
            return True
        fetched = self.storage is not None and self.storage.fetch(cell, self.folder)
        return fetched or self.folder.restore(cell)

    def record(self, keyed: Keyed, outcome: Outcome, gpus: int) -> None:
        """Keep what the work on a cell, whose lock the caller has, came to."""
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
