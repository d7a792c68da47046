"""What the commands of studies show: a plan as a table, and how a study goes, live in a terminal, else line by line."""

from __future__ import annotations

import time
from typing import Literal

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from lmms_plugin.cli.terminal import InPlace
from lmms_plugin.cli.terminal import console as standard_output
from lmms_plugin.study.run.planning import Plan
from lmms_plugin.study.run.progress import StudyProgress, duration

_HEADINGS: dict[str, Literal["left", "right"]] = {
    "cell": "left",
    "tasks": "left",
    "state": "left",
    "seconds": "right",
    "weights, MiB": "right",
}


def plan_table(found: Plan) -> Table:
    """A plan for people."""
    shown = Table(title=found.study.name)
    for heading, justify in _HEADINGS.items():
        shown.add_column(heading, justify=justify, overflow="fold")
    for one in found.cells:
        seconds = "unknown" if one.seconds.value is None else f"{one.seconds.value:.0f}"
        weights = "unknown" if one.size.bytes is None else f"{one.size.bytes / 2**20:,.1f}"
        shown.add_row(one.keyed.id, ", ".join(one.keyed.cell.tasks), one.state, seconds, weights)
    return shown


class Display(InPlace):
    """Shows cells done, running and failed, and the time left.

    Args:
        expected: Cell → seconds it is expected to take; None where nothing tells. Cells that are to be run.
        before: Cells that were finished before.
        jobs: Cells at a time.
        console: Where to; standard output by default.
    """

    def __init__(
        self, expected: dict[str, float | None], before: int, jobs: int, console: Console | None = None
    ) -> None:
        self.progress = StudyProgress(expected, before, jobs)
        self.console = standard_output() if console is None else console
        self._bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=self.console)
        self._task = self._bar.add_task("cells", total=self.progress.total, completed=before)

    def started(self, cell: str) -> None:
        """A cell is being worked on."""
        self.progress.started(cell)
        if not self.console.is_terminal:
            self._say(f"start  {cell}")

    def done(self, cell: str, seconds: float | None) -> None:
        """A cell is finished."""
        self._end(cell, seconds)
        took = "by another runner or earlier" if seconds is None else f"{seconds:.0f} s"
        self._say(f"done   {cell} ({took})")

    def failed(self, cell: str, problem: str) -> None:
        """A cell failed."""
        self._end(cell, None, failed=True)
        self._say(f"FAILED {cell}: {' '.join(problem.split())}")

    def waiting(self, cell: str, reason: str) -> None:
        """A cell has to be done later."""
        self.progress.waiting(cell)
        self._say(f"again  {cell}: {reason}")

    def tick(self) -> None:
        """Nothing to do: the live display draws itself."""

    def _end(self, cell: str, seconds: float | None, *, failed: bool = False) -> None:
        self.progress.ended(cell, seconds, failed=failed)
        self._bar.update(self._task, completed=self.progress.completed)

    def _say(self, line: str) -> None:
        if self.console.is_terminal:
            self.console.print(line, highlight=False, markup=False)
            return
        over = f"[{self.progress.completed}/{self.progress.total}]"
        left = "" if self.progress.left is None else f", {duration(self.progress.left)} left"
        print(f"{time.strftime('%H:%M:%S')} {over} {line}{left}", flush=True, file=self.console.file)

    def drawn(self) -> Group:
        """Bar, counts and running cells, which terminals get in place."""
        rows = Table.grid(padding=(0, 2))
        for cell, since in self.progress.running.items():
            rows.add_row(Text(cell), Text(duration(self.progress.clock() - since)))
        return Group(self._bar, Text(self.progress.state()), rows)
