"""What `lmms-plugin demo` shows: how far its runs are, and a table."""

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
"""Least time between two lines where they cannot be drawn over one another."""


def show(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Print the table of the demo's runs.

    Args:
        headings: of its columns; the last word stands in a line of its own.
        rows: one cell per heading.
        caption: what stands below.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in headings:
        first, _, last = heading.rpartition(" ")
        shown = "\n".join((first, last)) if first else last
        table.add_column(shown, justify="right" if first else "left", vertical="bottom", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A terminal that is narrower than the table wraps it; rich would cut it.
    needed = Console(width=_UNLIMITED).measure(table).maximum
    console.print("Embedded demo: unquantized model against quantized language model", highlight=False)
    Console(width=max(console.width, needed)).print(table)
    console.print(caption, highlight=False)


@dataclass
class DemoProgress(InPlace):
    """One line on what runs and how long is left: drawn in place on a terminal, said now and then elsewhere.

    Attributes:
        total: Number of runs.
        console: Where to.
        clock: Tells seconds.
    """

    total: int
    console: Console = field(default_factory=Console)
    clock: Callable[[], float] = time.monotonic
    wiped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._runs: list[Pace] = []
        self._said = self.clock()

    def start(self, name: str, command: Sequence[str]) -> Pace:
        """Show the command of a run that begins."""
        self.say(f"$ {command_line(command)}")
        self._runs.append(Pace(name, self.clock()))
        return self._runs[-1]

    def see(self, run: Pace, share: float | None) -> None:
        """Take note of how far a run is, as `Pace.see`."""
        run.see(share, self.clock())

    def end(self, run: Pace) -> None:
        """Say how long a run took."""
        run.ended = self.clock()
        self.say(f"{run.name}: done in {duration(run.ended - run.started)}")

    def tick(self) -> None:
        """Say where things stand if that was long ago; the live line draws itself."""
        if not self.console.is_terminal and self.clock() - self._said >= QUIET_SECONDS:
            self.say(self.line())

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._said = self.clock()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.console.file.flush()

    def line(self) -> str:
        """What runs and how long is left."""
        running = [one for one in self._runs if one.ended is None]
        over = len(self._runs) - len(running)
        states = [f"{one.name} {f'{100 * one.share:.0f} %' if one.working else 'starting'}" for one in running]
        left = seconds_left(self._runs, self.total - len(self._runs), self.clock())
        told = "time left not known yet" if left is None else f"about {duration(left)} left"
        return "; ".join([f"{over} of {self.total} done", *([", ".join(states)] if states else []), told])

    def drawn(self) -> Text:
        """The line, which terminals get in place."""
        return Text(self.line())
