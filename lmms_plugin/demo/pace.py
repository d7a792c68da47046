"""Progress of the demo's runs, and their remaining time by the time they have taken so far."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self


@dataclass
class Pace:
    """One run of lmms-eval, running or finished. Times are seconds on one clock.

    Attributes:
        name: Name of the model.
        started: Start time.
        working: Time of its first answers, and the share of its work done by then; None before.
        share: Share of its work done, from 0 to 1.
        ended: End time; None before.
    """

    name: str
    started: float
    working: tuple[float, float] | None = None
    share: float = 0.0
    ended: float | None = None

    def see(self, share: float | None, now: float) -> None:
        """Record the share of its work that is done; None before the first request is answered."""
        if share is not None:
            self.working = self.working or (now, share)
            self.share = max(self.share, share)

    def whole(self, now: float) -> float | None:
        """Return the seconds from start to end, measured or estimated; None while unknown."""
        if self.ended is not None:
            return self.ended - self.started
        if self.working is None or self.share <= self.working[1]:
            return None
        since, before = self.working
        return since - self.started + (now - since) * (1.0 - before) / (self.share - before)


class DemoWatcher(AbstractContextManager["DemoWatcher"], Protocol):
    """Context manager that receives and shows the progress of the runs."""

    def __enter__(self) -> Self:
        """Start to show progress."""

    def start(self, name: str, command: Sequence[str]) -> Pace:
        """Record the start of a run."""

    def see(self, run: Pace, share: float | None) -> None:
        """Record the share of a run's work that is done, as `Pace.see`."""

    def end(self, run: Pace) -> None:
        """Record the end of a run."""

    def tick(self) -> None:
        """Update the display; called at intervals."""


def seconds_left(runs: Sequence[Pace], waiting: int, now: float) -> float | None:
    """Return the seconds until all runs end, assuming that unknown runs take as long as the others.

    Args:
        runs: Started runs; a waiting run starts when one of them ends.
        waiting: Number of runs that have not started.
        now: Current time.

    Returns:
        Seconds; None while unknown.
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
