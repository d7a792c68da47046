"""What becomes of a cell, wherever it ran: kept in the study's folder, copied to its storage, and told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lmms_plugin.study.attempt import Outcome, about
from lmms_plugin.study.folder import StudyFolder
from lmms_plugin.study.identity import Keyed
from lmms_plugin.study.storage import Storage


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

    def has(self, cell: str) -> bool:
        """Whether a cell, whose lock the caller has, is finished, here or in the storage; then that is told."""
        fetched = self.storage is not None and not self.folder.is_done(cell) and self.storage.fetch(cell, self.folder)
        if not (self.folder.is_done(cell) or fetched or self.folder.restore(cell)):
            return False
        self.watcher.done(cell, None)
        return True

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
