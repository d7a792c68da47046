"""How far the runs of the demo are and how long they will still take, by what they have taken so far."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self


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


class DemoWatcher(AbstractContextManager["DemoWatcher"], Protocol):
    """Is told how far the runs are, within its context, and shows it in whatever way."""

    def __enter__(self) -> Self:
        """Begin."""

    def start(self, name: str, command: Sequence[str]) -> Pace:
        """Take note of a run that begins."""

    def see(self, run: Pace, share: float | None) -> None:
        """Take note of the share of its work that is done, as `Pace.see`."""

    def end(self, run: Pace) -> None:
        """Take note that a run is over."""

    def tick(self) -> None:
        """Be asked now and then, whether anything happened or not."""


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
