"""Confidence estimators beside one another, from the log of one run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmms_plugin import metrics
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import MeasurementSettings, drawn, known, together
from lmms_plugin.analysis.records import TaskRecords, Texts
from lmms_plugin.metrics.bootstrap import Interval, Statistic
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.intervals import between
from lmms_plugin.metrics.ranked import Ranked


class RankedEstimator(NamedTuple):
    """How one estimator does on one task.

    Attributes:
        task: Name of the task.
        estimator: Name of the estimator.
        records: How many reported records it has a value for.
        missing: How many it has none for, left out of what follows.
        accuracy: Of the records with a value.
        auroc: Of telling right from wrong answers; NaN where all are one or the other.
        aurc: Area under the risk-coverage curve.
        ece: Expected calibration error.
        auroc_interval: Over images.
        aurc_interval: Over images.
        ece_interval: Over images.
        ece_floor: The ECE that a perfectly calibrated model would have, on average, with these confidences.
    """

    task: str
    estimator: str
    records: int
    missing: int
    accuracy: float
    auroc: float
    aurc: float
    ece: float
    auroc_interval: Interval
    aurc_interval: Interval
    ece_interval: Interval
    ece_floor: float


def judge(run: LoggedRun, settings: MeasurementSettings) -> list[RankedEstimator]:
    """Every estimator that a run logged, by task, best AURC first.

    Raises:
        ValueError: If no task of the run logged any confidence.
    """
    names = {one.task: family.names for family in together(run.tasks.values(), settings) for one in family.tasks}
    judged = [
        _judge(records, name, names.get(records.task, records.names), settings)
        for records in run.tasks.values()
        for name in records.confidence
        if not np.isnan(records.confidence[name][records.reported]).all()
    ]
    if not judged:
        raise ValueError(f"expected confidences in the logs of samples of {run.file}, got none")
    places = {task: place for place, task in enumerate(run.tasks)}
    return sorted(judged, key=lambda one: (places[one.task], one.aurc, one.estimator))


def _judge(records: TaskRecords, name: str, names: Texts, settings: MeasurementSettings) -> RankedEstimator:
    keep, confidence, outcome, clusters = known(records, name, names)
    statistics: list[Statistic] = [Ranked(confidence, outcome, clusters, ("auroc", "aurc"))]
    statistics.append(Binned(confidence, outcome, clusters))
    ranked, binned = drawn(statistics, names.size, settings)
    auroc, aurc, ece = ranked.of("auroc"), ranked.of("aurc"), binned.of("ece")
    return RankedEstimator(
        records.task,
        name,
        records=confidence.size,
        missing=int(records.reported.sum() - keep.sum()),
        accuracy=float(outcome.mean()),
        auroc=auroc[0],
        aurc=aurc[0],
        ece=ece[0],
        auroc_interval=between("auroc", *auroc, settings.level),
        aurc_interval=between("aurc", *aurc, settings.level),
        ece_interval=between("ece", *ece, settings.level),
        ece_floor=metrics.ece_floor(confidence, seed=settings.seed)[0],
    )
