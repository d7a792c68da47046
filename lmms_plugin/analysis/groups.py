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
from lmms_plugin.metrics.bootstrap import Draws, Interval, Statistic
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.intervals import between
from lmms_plugin.metrics.ranked import Ranked
from lmms_plugin.metrics.selective import COSTS, Gains

SELECTIVE = ("aurc", "coverage@0.01", "coverage@0.05", "auroc")

BINNED = ("ece", "brier")
METRICS = (
    *("accuracy", "mean_iou", "parse_rate", "confidence_rate"),
    *BINNED,
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
        low: Lower ends of the intervals, shape (metrics,); NaN where there is none.
        high: Upper ends of the intervals, shape (metrics,).
    """

    tasks: tuple[str, ...]
    drawn: str
    records: int
    images: int
    value: Floats
    low: Floats
    high: Floats

    def interval(self, metric: str) -> Interval:
        """Return the interval of one metric."""
        place = METRICS.index(metric)
        return Interval(float(self.low[place]), float(self.high[place]))

    def of(self, metric: str) -> float:
        """Return the value of one metric."""
        return float(self.value[METRICS.index(metric)])


class MeasuredRun(NamedTuple):
    """All metrics of a run.

    Attributes:
        tasks: Tasks by name.
        groups: Groups by family and condition: `clean`, what is shifted, or `what is shifted, severity`.
        resampled: Values of the groups' metrics on the resamples, shape (resamples, metrics) each.
        documents: Fingerprint → sorted ids of the reported records, shape (records,).
    """

    tasks: dict[str, Task]
    groups: dict[tuple[Family, str], TaskGroup]
    resampled: dict[tuple[Family, str], Floats]
    documents: dict[str, Texts]


def measure(tasks: Iterable[TaskRecords], settings: MeasurementSettings) -> MeasuredRun:
    """Measure all tasks of a run with right and wrong answers; each must have at least one reported record."""
    found = MeasuredRun({}, {}, {}, {})
    for family in together(tasks, settings):
        _measure(family, settings, found)
    return found


def _measure(whole: Together, settings: MeasurementSettings, found: MeasuredRun) -> None:
    drawn_from = hashlib.blake2b("\n".join(whole.names.tolist()).encode("utf-8", "surrogatepass"), digest_size=16)
    values: dict[str, Floats] = {}
    for one in whole.tasks:
        found.tasks[one.task], values[one.task] = _task(one, whole, settings)
        if one.documents not in found.documents:
            found.documents[one.documents] = one.ids[one.reported]
    # Sorted, so that tasks of different runs correspond, whatever order they were run in.
    for condition, chosen in _conditions(sorted(whole.tasks, key=lambda one: one.task)).items():
        names = tuple(one.task for one in chosen)
        tasks = [found.tasks[name] for name in names]
        mean = values[names[0]] if len(names) == 1 else np.stack([values[name] for name in names]).mean(axis=0)
        within = (tasks[0].low, tasks[0].high) if len(names) == 1 else ends(mean[0], mean[1:], settings.level)
        counts = sum(task.records for task in tasks), max(task.images for task in tasks)
        found.groups[whole.family, condition] = TaskGroup(names, drawn_from.hexdigest(), *counts, mean[0], *within)
        found.resampled[whole.family, condition] = mean[1:]


def _conditions(members: Sequence[TaskRecords]) -> dict[str, list[TaskRecords]]:
    """Return the tasks of each mean, by condition."""
    chosen: dict[str, list[TaskRecords]] = {}
    for one in members:
        chosen.setdefault(one.place.condition, []).append(one)
        if one.place.shift is not None:
            chosen.setdefault(f"{one.place.condition}, severity {one.place.severity}", []).append(one)
    return chosen


def _task(one: TaskRecords, whole: Together, settings: MeasurementSettings) -> tuple[Task, Floats]:
    """Return a task, and its values on the data and on every resample, shape (1 + resamples, metrics)."""
    there = known(one, settings.estimator, whole.names)
    statistics: list[Statistic] = [means(one, one.confidence_by(settings.estimator), whole.names)]
    bins, risk = np.zeros((3, DEFAULT_BINS)), np.full(GRID.size, np.nan)
    if there.keep.any():
        arrays = there.confidence, there.outcome, there.clusters
        binned, ordered = Binned(*arrays, names=BINNED), Ranked(*arrays, SELECTIVE)
        statistics += [binned, ordered]
        bins, risk = _bins(binned, whole.names.size), _risk(ordered)
    draws = drawn(statistics, whole.names.size, settings)
    if rest := beyond(one, {other.task: other for other in whole.tasks}, whole.judged, settings):
        chosen, other = rest
        thresholds = {float(cost): metrics.threshold_at_cost(*chosen[1:3], cost) for cost in COSTS}
        gains = Gains(other.confidence, other.outcome, other.clusters, {}, thresholds)
        draws += drawn([gains], whole.judged.size, settings)
    numbers, reported = _columns(draws), one.reported
    records = int(reported.sum())
    task = Task(
        one.task,
        whole.family,
        one.place,
        one.documents,
        records,
        int(np.unique(one.image[reported]).size),
        int((~one.parsed[reported]).sum()),
        records - int(there.keep.sum()),
        numbers[0],
        *ends(numbers[0], numbers[1:], settings.level),
        bins,
        risk,
        one.score[reported].astype(np.float32),
        one.outcome[reported].astype(np.float32),
    )
    return task, numbers


def ends(value: Floats, resampled: Floats, level: float) -> tuple[Floats, Floats]:
    """Return the lower and upper ends of the intervals of `METRICS`, shape (metrics,) each; NaN where there is none.

    Args:
        value: Values, shape (metrics,).
        resampled: Values on the resamples, shape (resamples, metrics).
        level: Confidence level.
    """
    found = [between(name, float(value[k]), resampled[:, k], level) for k, name in enumerate(METRICS)]
    low, high = np.array(found).T
    return low, high


def _columns(draws: Sequence[Draws]) -> Floats:
    found = {name: np.append(*one.of(name)) for one in draws for name in one.names}
    missing = np.full(1 + len(draws[0].resampled), np.nan)
    return np.stack([found.get(name, missing) for name in METRICS], axis=1)


def _bins(binned: Binned, clusters: int) -> Floats:
    """Return records, mean confidence and mean outcome per bin, shape (3, bins)."""
    records, *sums, _ = binned.sums(np.ones((1, clusters)))[:, 0]
    return np.stack([records, *(total / np.maximum(records, 1) for total in sums)])


def _risk(ordered: Ranked) -> Floats:
    """Return the risk at each coverage of `GRID`, over the fewest most confident records that reach it."""
    _, coverage, risk = ordered.everywhere()
    found: Floats = risk[np.searchsorted(coverage, GRID - 1e-12).clip(max=risk.size - 1)]
    return found


def mean_bins(tasks: Sequence[Task]) -> Floats:
    """Combine the bins of several tasks or runs, shape (3, bins)."""
    records = np.sum([task.bins[0] for task in tasks], axis=0)
    sums = [np.sum([task.bins[0] * task.bins[k] for task in tasks], axis=0) for k in (1, 2)]
    return np.stack([records, *(total / np.maximum(records, 1) for total in sums)])
