"""How a study goes: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lmms_plugin.cli.terminal import InPlace, console


def duration(seconds: float) -> str:
    """Seconds as people read them: `45 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class Display(InPlace):
    """Shows cells done, running and failed, and the time left.

    Attributes:
        expected: Cell → seconds it is expected to take; None where nothing tells. Cells that are to be run.
        before: Cells that were finished before.
        jobs: Cells at a time.
        console: Where to.
    """

    expected: dict[str, float | None]
    before: int
    jobs: int
    console: Console = field(default_factory=console)

    def __post_init__(self) -> None:
        self._running: dict[str, float] = {}
        self._over: dict[str, float | None] = {}
        self._failed: dict[str, str] = {}
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=self.console)
        self._task = self._bar.add_task("cells", total=len(self.expected) + self.before, completed=self.before)

    def started(self, cell: str) -> None:
        """A cell is being worked on."""
        self._running[cell] = time.monotonic()
        if not self.console.is_terminal:
            self._say(f"start  {cell}")

    def done(self, cell: str, seconds: float | None) -> None:
        """A cell is finished."""
        self._end(cell, seconds)
        took = "by another runner or earlier" if seconds is None else f"{seconds:.0f} s"
        self._say(f"done   {cell} ({took})")

    def failed(self, cell: str, problem: str) -> None:
        """A cell failed."""
        self._failed[cell] = problem
        self._end(cell, None)
        self._say(f"FAILED {cell}: {' '.join(problem.split())}")

    def waiting(self, cell: str, reason: str) -> None:
        """A cell has to be done later."""
        self._running.pop(cell, None)
        self._say(f"again  {cell}: {reason}")

    def tick(self) -> None:
        """Nothing to do: the live display draws itself."""

    @property
    def left(self) -> float | None:
        """Seconds left, if cells take as long as those before; None while nothing tells."""
        took = [seconds for seconds in self._over.values() if seconds is not None]
        mean = sum(took) / len(took) if took else None
        still = [self.expected[cell] or mean for cell in self.expected if cell not in self._over]
        if any(seconds is None for seconds in still):
            return None
        spent = sum(time.monotonic() - since for since in self._running.values())
        return max(0.0, sum(seconds or 0.0 for seconds in still) - spent) / self.jobs

    def _end(self, cell: str, seconds: float | None) -> None:
        self._running.pop(cell, None)
        self._over[cell] = seconds
        self._bar.update(self._task, completed=self.before + len(self._over))

    def _say(self, line: str) -> None:
        if self.console.is_terminal:
            self.console.print(line, highlight=False, markup=False)
            return
        over = f"[{self.before + len(self._over)}/{len(self.expected) + self.before}]"
        left = "" if self.left is None else f", {duration(self.left)} left"
        print(f"{time.strftime('%H:%M:%S')} {over} {line}{left}", flush=True, file=self.console.file)

    def drawn(self) -> Group:
        """Bar, counts and running cells, which terminals get in place."""
        left = "unknown" if self.left is None else duration(self.left)
        ok = self.before + len(self._over) - len(self._failed)
        state = f"done {ok} · running {len(self._running)} · failed {len(self._failed)} · time left {left}"
        rows = Table.grid(padding=(0, 2))
        for cell, since in self._running.items():
            rows.add_row(Text(cell), Text(duration(time.monotonic() - since)))
        return Group(self._bar, Text(state), rows)
