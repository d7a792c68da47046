"""Confidence estimators beside one another, from the log of one run."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from rich.table import Table

from lmms_plugin import metrics
from lmms_plugin.analysis.reliability import Settings
from lmms_plugin.analysis.results import Run, TaskRecords, reported
from lmms_plugin.metrics.bootstrap import Clusters, Interval, Statistic, bootstrap, interval
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.intervals import METHODS
from lmms_plugin.metrics.ranked import Ranked


class Judged(NamedTuple):
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


def judge(run: Run, settings: Settings) -> list[Judged]:
    """Every estimator that a run logged, by task, best AURC first.

    Raises:
        ValueError: If no task of the run logged any confidence.
    """
    judged = [
        _judge(records, name, settings)
        for records in run.tasks.values()
        for name in records.confidence
        if not np.isnan(records.confidence[name][reported(records)]).all()
    ]
    if not judged:
        raise ValueError(f"expected confidences in the logs of samples of {run.file}, got none")
    places = {task: place for place, task in enumerate(run.tasks)}
    return sorted(judged, key=lambda one: (places[one.task], one.aurc, one.estimator))


def _judge(records: TaskRecords, name: str, settings: Settings) -> Judged:
    keep = reported(records)
    known = keep & ~np.isnan(records.confidence[name])
    confidence, outcome = records.confidence[name][known], records.outcome[known]
    clusters = Clusters.of(records.images[known])
    statistics: list[Statistic] = [Ranked(confidence, outcome, clusters), Binned(confidence, outcome, clusters)]
    ranked, binned = bootstrap(
        statistics, clusters.count, resamples=settings.resamples, seed=settings.seed, workers=settings.workers
    )
    auroc, aurc, ece = ranked.of("auroc"), ranked.of("aurc"), binned.of("ece")
    return Judged(
        records.task,
        name,
        records=confidence.size,
        missing=int(keep.sum() - known.sum()),
        accuracy=float(outcome.mean()),
        auroc=auroc[0],
        aurc=aurc[0],
        ece=ece[0],
        auroc_interval=interval(*auroc, level=settings.level),
        aurc_interval=interval(*aurc, level=settings.level),
        ece_interval=interval(*ece, level=settings.level, method=METHODS["ece"]),
        ece_floor=metrics.ece_floor(confidence, seed=settings.seed)[0],
    )


def table(judged: list[Judged], title: str, level: float) -> Table:
    """Estimators for people to read."""
    shown = Table(title=title, caption=f"in brackets: {100 * level:g} % intervals over images")
    for heading in ("task", "estimator"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("records", "missing", "accuracy", "auroc", "aurc", "ece", "ece floor"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for k, one in enumerate(judged):
        task = one.task if k == 0 or judged[k - 1].task != one.task else ""
        with_intervals = (_between(getattr(one, m), getattr(one, f"{m}_interval")) for m in ("auroc", "aurc", "ece"))
        counts = str(one.records), str(one.missing), f"{one.accuracy:.3f}"
        shown.add_row(task, one.estimator, *counts, *with_intervals, f"{one.ece_floor:.3f}")
    return shown


def _between(value: float, between: Interval) -> str:
    return f"{value:.3f}" + ("" if math.isnan(between.low) else f" [{max(between.low, 0.0):.3f}, {between.high:.3f}]")
