"""A run with everything that exports say of it: its answers scored anew, and every metric with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lmms_plugin.analysis.logs import LoggedRun, table
from lmms_plugin.analysis.measure import MeasurementSettings, MetricValue, measure
from lmms_plugin.export.consistency import expect_shifted
from lmms_plugin.export.rescoring import Rescored, rescore
from lmms_plugin.export.whole import expect_whole


class VerifiedScore(NamedTuple):
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
class VerifiedRun:
    """A run whose log and table agree.

    Attributes:
        run: As read.
        results: Content of its results file.
        tasks: Task name → answers scored anew.
        scores: Task name → metric → score, of all metrics of lmms-eval's table that are defined on the answers.
        settings: Of the intervals.
    """

    run: LoggedRun
    results: Mapping[str, Any]
    tasks: Mapping[str, Rescored]
    scores: Mapping[str, Mapping[str, VerifiedScore]]
    settings: MeasurementSettings

    def at(self, settings: MeasurementSettings) -> VerifiedRun:
        """The same with intervals made in another way."""
        if settings == self.settings:
            return self
        return replace(self, scores=_intervals(self.run, self.tasks, settings), settings=settings)


def measured(run: LoggedRun, settings: MeasurementSettings) -> VerifiedRun:
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
    return VerifiedRun(run, results, tasks, _intervals(run, tasks, settings), settings)


def _intervals(
    run: LoggedRun, tasks: Mapping[str, Rescored], settings: MeasurementSettings
) -> dict[str, dict[str, VerifiedScore]]:
    numbers: dict[str, dict[str, MetricValue]] = {task: {} for task in tasks}
    for number in measure(run, settings):
        numbers[number.task][number.metric] = number
    return {task: _scores(rescored, numbers[task]) for task, rescored in tasks.items()}


def _scores(rescored: Rescored, numbers: Mapping[str, MetricValue]) -> dict[str, VerifiedScore]:
    scores = {}
    for metric, value in rescored.metrics.items():
        number = numbers.get(metric)
        # The same name may stand for another sample elsewhere: an interval is only taken with its own value.
        if number is not None and math.isclose(number.value, value, abs_tol=1e-9):
            scores[metric] = VerifiedScore(*number[2:])
        elif not math.isnan(value):
            images = rescored.images[metric]
            scores[metric] = VerifiedScore(value, math.nan, math.nan, len(images), len(set(images)))
    return scores
