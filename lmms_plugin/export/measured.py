"""A run with everything that exports say of it: its answers scored anew, and every metric with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lmms_plugin.analysis.logs import Run, table
from lmms_plugin.analysis.measure import Number, Settings, measure
from lmms_plugin.export.consistency import expect_shifted
from lmms_plugin.export.rescoring import Rescored, rescore
from lmms_plugin.export.whole import expect_whole


class Score(NamedTuple):
    """One metric of one task.

    Attributes:
        value: In the metric's own unit.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end.
        records: Documents it is of.
        images: Images these are of.
    """

    value: float
    low: float
    high: float
    records: int
    images: int


@dataclass(frozen=True, eq=False)
class Measured:
    """A run whose log and table agree.

    Attributes:
        run: As read.
        results: Content of its results file.
        tasks: Task name → answers scored anew.
        scores: Task name → metric → score, of all metrics of lmms-eval's table that are defined on the answers.
        settings: Of the intervals.
    """

    run: Run
    results: Mapping[str, Any]
    tasks: Mapping[str, Rescored]
    scores: Mapping[str, Mapping[str, Score]]
    settings: Settings

    def at(self, settings: Settings) -> Measured:
        """The same with intervals made in another way."""
        if settings == self.settings:
            return self
        return replace(self, scores=_intervals(self.run, self.tasks, settings), settings=settings)


def measured(run: Run, settings: Settings) -> Measured:
    """Score a run's answers anew and make intervals.

    Raises:
        ValueError: If log and table do not agree, the run has no task of this package, or it did not use all documents
            of its tasks.
    """
    results = table(run.file)
    expect_whole(run, results)
    if not run.tasks:
        raise ValueError(f"expected tasks of this package in {run.file}, got {', '.join(run.others) or 'none'}")
    tasks = {task: rescore(run, task) for task in run.tasks}
    expect_shifted(run, {task: rescored.samples for task, rescored in tasks.items()})
    return Measured(run, results, tasks, _intervals(run, tasks, settings), settings)


def _intervals(run: Run, tasks: Mapping[str, Rescored], settings: Settings) -> dict[str, dict[str, Score]]:
    numbers: dict[str, dict[str, Number]] = {task: {} for task in tasks}
    for number in measure(run, settings):
        numbers[number.task][number.metric] = number
    return {task: _scores(rescored, numbers[task]) for task, rescored in tasks.items()}


def _scores(rescored: Rescored, numbers: Mapping[str, Number]) -> dict[str, Score]:
    scores = {}
    for metric, value in rescored.metrics.items():
        number = numbers.get(metric)
        # The same name may stand for another sample elsewhere: an interval is only taken with its own value.
        if number is not None and math.isclose(number.value, value, abs_tol=1e-9):
            scores[metric] = Score(*number[2:])
        elif not math.isnan(value):
            images = rescored.images[metric]
            scores[metric] = Score(value, math.nan, math.nan, len(images), len(set(images)))
    return scores
