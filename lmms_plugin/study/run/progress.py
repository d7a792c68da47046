"""How far a study is, and how long it will still take by what it has taken so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class StudyProgress:
    """Cells done, running and failed, and the time left.

    Attributes:
        expected: Cell → seconds it is expected to take; None where nothing tells. Cells that are to be run.
        before: Cells that were finished before.
        jobs: Cells at a time.
        clock: Tells seconds.
        running: Cell → when work on it began.
        over: Cell → seconds it took; None where it failed, or another runner did it.
        failed: Cells that failed.
    """

    expected: dict[str, float | None]
    before: int
    jobs: int
    clock: Callable[[], float] = time.monotonic
    running: dict[str, float] = field(default_factory=dict)
    over: dict[str, float | None] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def started(self, cell: str) -> None:
        """A cell is being worked on."""
        self.running[cell] = self.clock()

    def ended(self, cell: str, seconds: float | None, *, failed: bool = False) -> None:
        """A cell is over, after that many seconds; None where nothing is to be learnt from them."""
        self.running.pop(cell, None)
        self.over[cell] = seconds
        if failed:
            self.failed.add(cell)

    def waiting(self, cell: str) -> None:
        """A cell that was started has to be done later."""
        self.running.pop(cell, None)

    @property
    def total(self) -> int:
        """Number of cells."""
        return self.before + len(self.expected)

    @property
    def completed(self) -> int:
        """Number of cells that are over, those that failed included."""
        return self.before + len(self.over)

    @property
    def left(self) -> float | None:
        """Seconds left, if cells take as long as those before; None while nothing tells."""
        took = [seconds for seconds in self.over.values() if seconds is not None]
        mean = sum(took) / len(took) if took else None
        still = [self.expected[cell] or mean for cell in self.expected if cell not in self.over]
        if any(seconds is None for seconds in still):
            return None
        spent = sum(self.clock() - since for since in self.running.values())
        return max(0.0, sum(seconds or 0.0 for seconds in still) - spent) / self.jobs

    def state(self) -> str:
        """All of it in a line."""
        left = "unknown" if self.left is None else duration(self.left)
        ok = self.completed - len(self.failed)
        return f"done {ok} · running {len(self.running)} · failed {len(self.failed)} · time left {left}"
