"""Display of `lmms-plugin demo`: progress of its runs, and a table of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmms_plugin.cli.terminal import InPlace
from lmms_plugin.demo.pace import Pace, seconds_left
from lmms_plugin.study.run.progress import duration
from lmms_plugin.utils.messages import command_line

_UNLIMITED = 1000
QUIET_SECONDS = 15.0
"""Minimum time in seconds between two progress lines where lines cannot be redrawn in place."""


def show(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Print the table of the demo's runs.

    Args:
        headings: Headings of the columns; the last word of each is on a line of its own.
        rows: Rows with one cell per heading.
        caption: Text below the table.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in headings:
        first, _, last = heading.rpartition(" ")
        shown = "\n".join((first, last)) if first else last
        table.add_column(shown, justify="right" if first else "left", vertical="bottom", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # On a terminal that is narrower than the table, plain lines wrap; rich would cut them.
    needed = Console(width=_UNLIMITED).measure(table).maximum
    console.print("Embedded demo: unquantized model against quantized language model", highlight=False)
    Console(width=max(console.width, needed)).print(table)
    console.print(caption, highlight=False)


@dataclass
class DemoProgress(InPlace):
    """Progress line with the current run and the time left: redrawn in place on a terminal, else printed at times.

    Attributes:
        total: Number of runs.
        console: Console to write to.
        clock: Function that returns the time in seconds.
    """

    total: int
    console: Console = field(default_factory=Console)
    clock: Callable[[], float] = time.monotonic
    wiped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._runs: list[Pace] = []
        self._said = self.clock()

    def start(self, name: str, command: Sequence[str]) -> Pace:
        """Show the command of a run that starts."""
        self.say(f"$ {command_line(command)}")
        self._runs.append(Pace(name, self.clock()))
        return self._runs[-1]

    def see(self, run: Pace, share: float | None) -> None:
        """Record the progress of a run, as `Pace.see` does."""
        run.see(share, self.clock())

    def end(self, run: Pace) -> None:
        """Print how long a run took."""
        run.ended = self.clock()
        self.say(f"{run.name}: done in {duration(run.ended - run.started)}")

    def tick(self) -> None:
        """Print the progress line if the last one is old; a terminal redraws it by itself."""
        if not self.console.is_terminal and self.clock() - self._said >= QUIET_SECONDS:
            self.say(self.line())

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._said = self.clock()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.console.file.flush()

    def line(self) -> str:
        """Return the progress line: current run and time left."""
        running = [one for one in self._runs if one.ended is None]
        over = len(self._runs) - len(running)
        states = [f"{one.name} {f'{100 * one.share:.0f} %' if one.working else 'starting'}" for one in running]
        left = seconds_left(self._runs, self.total - len(self._runs), self.clock())
        told = "time left not known yet" if left is None else f"about {duration(left)} left"
        return "; ".join([f"{over} of {self.total} done", *([", ".join(states)] if states else []), told])

    def drawn(self) -> Text:
        """Return the progress line for drawing in place."""
        return Text(self.line())
