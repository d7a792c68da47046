"""Metrics of one run for the report: per task, and as means over clean and shifted tasks, with resamples.

They equal those of `lmms_plugin.analysis.measure` for fewer metrics: same draws of images, same functions.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin import metrics
from lmms_plugin.analysis.measure import (
    Family,
    MeasurementSettings,
    Together,
    beyond,
    drawn,
    known,
    means,
    together,
)
from lmms_plugin.analysis.records import EvaluationSet, Floats, TaskRecords, Texts
from lmms_plugin.metrics.bins import DEFAULT_BINS
from lmms_plugin.metrics.bootstrap import Clusters, Draws, Interval, Statistic
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.intervals import between
from lmms_plugin.metrics.ranked import Ranked
from lmms_plugin.metrics.selective import COSTS, Gains

SELECTIVE = ("aurc", "coverage@0.01", "coverage@0.05", "auroc")

METRICS = (
    *("accuracy", "mean_iou", "parse_rate", "confidence_rate", "ece", "brier"),
    *SELECTIVE,
    *(f"phi@{cost:g}" for cost in COSTS),
)
"""Metrics of every task; NaN where undefined."""
GRID = np.arange(1, 101) / 100
"""Coverages at which risk-coverage curves are stored."""


@dataclass(frozen=True, eq=False)
class Task:
    """Metrics of one task of one run.

    Attributes:
        task: Name of the task.
        family: Dataset, split and kind that the task belongs to.
        place: Evaluation set of the task.
        documents: Fingerprint of its documents.
        records: Number of reported records.
        images: Number of their images.
        unparsed: Number of answers without a box.
        unsure: Number of answers without a confidence.
        value: Values of the metrics, shape (metrics,).
        low: Lower ends of the intervals, shape (metrics,); NaN where there is none.
        high: Upper ends of the intervals, shape (metrics,).
        bins: Records, mean confidence and mean outcome per equal-width bin, shape (3, bins); mean 0 in empty bins.
        risk: Risk at each coverage of `GRID`; NaN without confidences.
        score: Scores of the reported records, sorted by id, shape (records,).
        outcome: Outcomes of these records, shape (records,).
    """

    task: str
    family: Family
    place: EvaluationSet
    documents: str
    records: int
    images: int
    unparsed: int
    unsure: int
    value: Floats
    low: Floats
    high: Floats
    bins: Floats
    risk: Floats
    score: npt.NDArray[np.float32]
    outcome: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TaskGroup:
    """Mean over tasks.

    Attributes:
        tasks: Names of the tasks.
        drawn: Fingerprint of the images that were drawn; resamples of groups with equal fingerprints are paired.
        records: Number of records of all tasks.
        images: Number of images.
        value: Values of the metrics, shape (metrics,).
        resampled: Values on the resamples, shape (resamples, metrics).
    """

    tasks: tuple[str, ...]
    drawn: str
    records: int
    images: int
    value: Floats
    resampled: Floats

    def interval(self, metric: str, level: float) -> Interval:
        """Return the interval of one metric."""
        return between(metric, float(self.value[METRICS.index(metric)]), self.column(metric), level)

    def column(self, metric: str) -> Floats:
        """Return the resamples of one metric, shape (resamples,)."""
        return self.resampled[:, METRICS.index(metric)]

    def of(self, metric: str) -> float:
        """Return the value of one metric."""
        return float(self.value[METRICS.index(metric)])


class MeasuredRun(NamedTuple):
    """All metrics of a run.

    Attributes:
        tasks: Tasks by name.
        groups: Groups by family and condition: `clean`, what is shifted, or `what is shifted, severity`.
        documents: Fingerprint → sorted ids of the reported records, shape (records,).
    """

    tasks: dict[str, Task]
    groups: dict[tuple[Family, str], TaskGroup]
    documents: dict[str, Texts]


def measure(tasks: Iterable[TaskRecords], settings: MeasurementSettings) -> MeasuredRun:
    """Measure all tasks of a run with right and wrong answers; each must have at least one reported record."""
    found = MeasuredRun({}, {}, {})
    for family in together(tasks, settings):
        _measure(family, settings, found)
    return found


def _measure(whole: Together, settings: MeasurementSettings, found: MeasuredRun) -> None:
    fingerprint = hashlib.blake2b("\n".join(whole.names.tolist()).encode("utf-8", "surrogatepass"), digest_size=16)
    values: dict[str, Floats] = {}
    for one in whole.tasks:
        values[one.task] = _numbers(one, whole, settings)
        found.tasks[one.task] = _task(whole.family, one, values[one.task], settings)
        if one.documents not in found.documents:
            found.documents[one.documents] = one.ids[one.reported]
    # Sorted, so that tasks of different runs correspond, whatever order they were run in.
    for condition, chosen in _conditions(sorted(whole.tasks, key=lambda one: one.task)).items():
        mean = np.stack([values[one.task] for one in chosen]).mean(axis=0)
        tasks = [found.tasks[one.task] for one in chosen]
        found.groups[whole.family, condition] = TaskGroup(
            tuple(one.task for one in chosen),
            fingerprint.hexdigest(),
            sum(task.records for task in tasks),
            max(task.images for task in tasks),
            mean[0],
            mean[1:],
        )


def _conditions(members: Sequence[TaskRecords]) -> dict[str, list[TaskRecords]]:
    """Return the tasks of each mean, by condition."""
    chosen: dict[str, list[TaskRecords]] = {}
    for one in members:
        chosen.setdefault(one.place.condition, []).append(one)
        if one.place.shift is not None:
            chosen.setdefault(f"{one.place.condition}, severity {one.place.severity}", []).append(one)
    return chosen


def _numbers(one: TaskRecords, whole: Together, settings: MeasurementSettings) -> Floats:
    """Return values on the data and on every resample, shape (1 + resamples, metrics)."""
    there = known(one, settings.estimator, whole.names)
    statistics: list[Statistic] = [means(one, one.confidence_by(settings.estimator), whole.names)]
    if there.keep.any():
        arrays = there.confidence, there.outcome, there.clusters
        statistics += [Binned(*arrays), Ranked(*arrays, SELECTIVE)]
    draws = drawn(statistics, whole.names.size, settings)
    if rest := beyond(one, {other.task: other for other in whole.tasks}, whole.judged, settings):
        chosen, other = rest
        thresholds = {float(cost): metrics.threshold_at_cost(*chosen[1:3], cost) for cost in COSTS}
        gains = Gains(other.confidence, other.outcome, other.clusters, {}, thresholds)
        draws += drawn([gains], whole.judged.size, settings)
    return _columns(draws)


def _columns(draws: Sequence[Draws]) -> Floats:
    found = {name: np.append(*one.of(name)) for one in draws for name in one.names}
    missing = np.full(1 + len(draws[0].resampled), np.nan)
    return np.stack([found.get(name, missing) for name in METRICS], axis=1)


def _task(family: Family, one: TaskRecords, numbers: Floats, settings: MeasurementSettings) -> Task:
    keep, confidence, outcome, _ = known(one, settings.estimator, one.names)
    intervals = [between(name, numbers[0, k], numbers[1:, k], settings.level) for k, name in enumerate(METRICS)]
    low, high = np.array(intervals).T
    reported = one.reported
    return Task(
        one.task,
        family,
        one.place,
        one.documents,
        int(reported.sum()),
        int(np.unique(one.image[reported]).size),
        int((~one.parsed[reported]).sum()),
        int(reported.sum() - keep.sum()),
        numbers[0],
        low,
        high,
        _bins(confidence, outcome),
        _risk(confidence, outcome),
        one.score[reported].astype(np.float32),
        one.outcome[reported].astype(np.float32),
    )


def _bins(confidence: Floats, outcome: Floats) -> Floats:
    if not confidence.size:
        return np.zeros((3, DEFAULT_BINS))
    records, *sums, _ = Binned(confidence, outcome, Clusters.one(confidence.size)).sums(np.ones((1, 1)))[:, 0]
    return np.stack([records, *(total / np.maximum(records, 1) for total in sums)])


def _risk(confidence: Floats, outcome: Floats) -> Floats:
    """Return the risk at each coverage of `GRID`, over the fewest most confident records that reach it."""
    if not confidence.size:
        return np.full(GRID.size, np.nan)
    curve = metrics.risk_coverage(confidence, outcome)
    risk: Floats = curve.risk[np.searchsorted(curve.coverage, GRID - 1e-12).clip(max=curve.risk.size - 1)]
    return risk


def mean_bins(tasks: Sequence[Task]) -> Floats:
    """Combine the bins of several tasks or runs, shape (3, bins)."""
    records = np.sum([task.bins[0] for task in tasks], axis=0)
    sums = [np.sum([task.bins[0] * task.bins[k] for task in tasks], axis=0) for k in (1, 2)]
    return np.stack([records, *(total / np.maximum(records, 1) for total in sums)])
