"""The numbers of a run to look at first: accuracy, calibration beside its floor, selective prediction.

They are those of `lmms_plugin.analysis.groups` (equal to `lmms_plugin.analysis.measure` for fewer metrics), so nothing
is defined here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmms_plugin.analysis import groups
from lmms_plugin.analysis.groups import MeasuredRun
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import MeasurementSettings, MetricValue, calibration_floor, expect_images, rejection
from lmms_plugin.analysis.records import CLEAN, REJECTION

FIRST = ("accuracy", "ece", "aurc", "coverage@0.05")
"""Metrics of an overview, named as in `lmms_plugin.analysis.groups`."""


class Estimate(NamedTuple):
    """A value with its interval.

    Attributes:
        value: Value; NaN where undefined.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end of its interval.
    """

    value: float
    low: float
    high: float


class OverviewRow(NamedTuple):
    """Numbers of one task, or means over a group of tasks on the same documents.

    Attributes:
        name: Name of the task, or of the clean task that a group belongs to.
        condition: `clean`, `shifted` (images), `shifted language` or `shifted image and language`.
        tasks: Number of tasks.
        accuracy: Share of right answers, mean score of soft ones.
        ece: Expected calibration error.
        ece_floor: Mean ECE of a perfectly calibrated model with these confidences, mean over the tasks.
        aurc: Area under the risk-coverage curve.
        coverage: Coverage at 5 % risk.
        records: Number of records of all tasks.
        images: Number of images.
    """

    name: str
    condition: str
    tasks: int
    accuracy: Estimate
    ece: Estimate
    ece_floor: float
    aurc: Estimate
    coverage: Estimate
    records: int
    images: int


class Overview(NamedTuple):
    """What to look at first.

    Attributes:
        tasks: Rows of the tasks, in the order of the run.
        groups: Rows of the groups of tasks: clean ones, and means over those that are shifted alike.
        rejection: Numbers of the rejection tasks.
    """

    tasks: list[OverviewRow]
    groups: list[OverviewRow]
    rejection: list[MetricValue]


def overview(run: LoggedRun, settings: MeasurementSettings) -> Overview:
    """Measure what to look at first.

    Args:
        run: Run to measure.
        settings: Estimator, intervals and held-out share.

    Raises:
        ValueError: The run has no task of ours, or a task has fewer than 2 images.
    """
    expect_images(run)
    measured = groups.measure(run.tasks.values(), settings)
    judged = [records for records in run.tasks.values() if records.kind is not REJECTION]
    floors = {records.task: _floor(calibration_floor(records, settings)) for records in judged}
    tasks = [_of_task(measured.tasks[records.task], floors[records.task]) for records in judged]
    told = [number for one in run.tasks.values() if one.kind is REJECTION for number in rejection(one, settings)]
    return Overview(tasks, list(_groups(measured, floors)), told)


def _of_task(one: groups.Task, floor: float) -> OverviewRow:
    places = [groups.METRICS.index(name) for name in FIRST]
    accuracy, ece, aurc, coverage = (Estimate(*(float(x[k]) for x in (one.value, one.low, one.high))) for k in places)
    return OverviewRow(one.task, one.place.condition, 1, accuracy, ece, floor, aurc, coverage, one.records, one.images)


def _groups(measured: MeasuredRun, floors: dict[str, float]) -> Sequence[OverviewRow]:
    rows: list[OverviewRow] = []
    for (family, condition), group in measured.groups.items():
        if "severity" in condition:
            continue
        clean = measured.groups.get((family, CLEAN))
        name = group.tasks[0] if clean is None else clean.tasks[0]
        found = [Estimate(group.of(metric), *group.interval(metric)) for metric in FIRST]
        accuracy, ece, aurc, coverage = found
        floor = float(np.mean([floors[task] for task in group.tasks]))
        size = group.records, group.images
        rows.append(OverviewRow(name, condition, len(group.tasks), accuracy, ece, floor, aurc, coverage, *size))
    return rows


def _floor(numbers: Sequence[MetricValue]) -> float:
    return next((one.value for one in numbers if one.metric == "ece_floor"), math.nan)
