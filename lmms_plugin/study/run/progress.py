"""Progress of a study, and the time left by the times of the cells that have ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


def duration(seconds: float) -> str:
    """Format seconds for people: `45 s`, `12 min`, `3 h 5 min`, and `1,234 h` from 100 hours on."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 6000 else f"{minutes / 60:,.0f} h"


@dataclass
class StudyProgress:
    """Cells done, running and failed, and the time left.

    Attributes:
        expected: Cell to run → expected time in seconds; None if unknown.
        before: Cells that were finished before.
        jobs: Number of cells at a time.
        clock: Function that returns the time in seconds.
        running: Cell → its start time.
        over: Cell → its time in seconds; None if it failed, or another runner did it.
        failed: Failed cells.
    """

    expected: dict[str, float | None]
    before: int
    jobs: int
    clock: Callable[[], float] = time.monotonic
    running: dict[str, float] = field(default_factory=dict)
    over: dict[str, float | None] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def started(self, cell: str) -> None:
        """Record that a cell has started."""
        self.running[cell] = self.clock()

    def ended(self, cell: str, seconds: float | None, *, failed: bool = False) -> None:
        """Record that a cell has ended after that many seconds; None if its time is no basis for estimates."""
        self.running.pop(cell, None)
        self.over[cell] = seconds
        if failed:
            self.failed.add(cell)

    def waiting(self, cell: str) -> None:
        """Record that a started cell is postponed."""
        self.running.pop(cell, None)

    @property
    def total(self) -> int:
        """Number of cells."""
        return self.before + len(self.expected)

    @property
    def completed(self) -> int:
        """Number of cells that have ended, failed ones included."""
        return self.before + len(self.over)

    @property
    def left(self) -> float | None:
        """Return the seconds left, if cells take as long, beside what is expected, as those before; None if unknown."""
        took = {cell: seconds for cell, seconds in self.over.items() if seconds is not None}
        mean = sum(took.values()) / len(took) if took else None
        known = {cell: seconds for cell, seconds in self.expected.items() if seconds}
        judged = took.keys() & known
        pace = sum(took[cell] for cell in judged) / sum(known[cell] for cell in judged) if judged else 1.0
        still = [pace * known[cell] if cell in known else mean for cell in self.expected if cell not in self.over]
        if any(seconds is None for seconds in still):
            return None
        spent = sum(self.clock() - since for since in self.running.values())
        return max(0.0, sum(seconds or 0.0 for seconds in still) - spent) / self.jobs

    def state(self) -> str:
        """Summarise the progress in one line."""
        left = "unknown" if self.left is None else duration(self.left)
        ok = self.completed - len(self.failed)
        return f"done {ok} · running {len(self.running)} · failed {len(self.failed)} · time left {left}"
