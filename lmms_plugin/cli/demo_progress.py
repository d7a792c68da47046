"""How far the runs of the demo are and how long they will still take, by what they have taken so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from rich.console import Console
from rich.text import Text

from lmms_plugin.cli.study_progress import duration
from lmms_plugin.cli.terminal import InPlace
from lmms_plugin.utils.messages import command_line

QUIET_SECONDS = 15.0
"""Least time between two lines where they cannot be drawn over one another."""


@dataclass
class Pace:
    """One run of lmms-eval under way or over. Moments are seconds on one clock.

    Attributes:
        name: Of the model.
        started: When it was started.
        working: When it had answered its first requests, and the share of its work done by then; None before.
        share: Of its work done, from 0 to 1.
        ended: When it was over; None before.
    """

    name: str
    started: float
    working: tuple[float, float] | None = None
    share: float = 0.0
    ended: float | None = None

    def see(self, share: float | None, now: float) -> None:
        """Take note of the share of its work that is done; None before the first request is answered."""
        if share is not None:
            self.working = self.working or (now, share)
            self.share = max(self.share, share)

    def whole(self, now: float) -> float | None:
        """Seconds from its start to its end, measured or by its pace; None while nothing tells."""
        if self.ended is not None:
            return self.ended - self.started
        if self.working is None or self.share <= self.working[1]:
            return None
        since, before = self.working
        return since - self.started + (now - since) * (1.0 - before) / (self.share - before)


def seconds_left(runs: Sequence[Pace], waiting: int, now: float) -> float | None:
    """Seconds until all runs are over, if those of which nothing is known yet take as long as the others.

    Args:
        runs: That were started; one that waits starts when one of them ends.
        waiting: Number of runs that were not started.
        now: The moment.

    Returns:
        None while nothing tells.
    """
    known = [whole for one in runs if (whole := one.whole(now)) is not None]
    if not known:
        return None
    usual = sum(known) / len(known)
    ends = sorted(
        max(0.0, (usual if (whole := one.whole(now)) is None else whole) - (now - one.started))
        for one in runs
        if one.ended is None
    ) or [0.0]
    for _ in range(waiting):
        ends = sorted([ends[0] + usual, *ends[1:]])
    return ends[-1]


@dataclass
class Progress(InPlace):
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
