"""Comparison of two runs on the same documents, with intervals paired by image.

Images are drawn once for both runs and for all shifts of a split, so differences, and differences of differences, are
paired image by image.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.measure import PRINTED, REJECTED, Grid, MeasurementSettings, as_table, families, grids
from lmms_plugin.analysis.records import CLEAN, REJECTION, TaskKind, TaskRecords, match
from lmms_plugin.metrics import robustness
from lmms_plugin.metrics.bootstrap import ClusterParts, Clusters, Draws, Interval, Statistic, bootstrap, interval
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.paired import (
    Difference,
    benjamini_hochberg,
    difference,
    flips,
    holm,
    interaction,
    mcnemar,
)
from lmms_plugin.metrics.ranked import Ranked
from lmms_plugin.metrics.sums import Means

MEANS = ("accuracy", "mean_iou", "parse_rate")
BINNED = ("ece", "brier")
RANKED = ("aurc", "coverage@0.01", "coverage@0.05")
BOXES = "box_rate"
INTERACTIONS = ("accuracy", "ece", "aurc", "coverage@0.01", "coverage@0.05")


class Change(NamedTuple):
    """Change of one metric of one task between two runs.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        first: Value in the first run.
        second: Value in the second run, on the same records.
        difference: Second − first with interval, p-value and equivalence.
        p_holm: p-value adjusted by Holm over all tasks of this metric (family-wise error rate).
        p_bh: p-value adjusted by Benjamini and Hochberg (false discovery rate).
        records: Number of records.
        images: Number of images.
    """

    task: str
    metric: str
    first: float
    second: float
    difference: Difference
    p_holm: float
    p_bh: float
    records: int
    images: int


class Flipped(NamedTuple):
    """Flipped answers of one task; absent for soft outcomes.

    Attributes:
        task: Name of the task.
        lost: Number right in the first run and wrong in the second.
        won: Number wrong in the first run and right in the second.
        p: p-value of the exact McNemar test, which treats records as independent.
        records: Number of records.
    """

    task: str
    lost: int
    won: int
    p: float
    records: int


class Shifted(NamedTuple):
    """Interaction of run and shift: whether the second run loses more under shift than the first.

    Attributes:
        task: Clean task, and what is shifted unless that is the image.
        metric: Name of the metric.
        cells: Number of shifted tasks that the mean is taken over.
        interaction: (shifted − clean) of the second run − (shifted − clean) of the first.
    """

    task: str
    metric: str
    cells: int
    interaction: Difference


class CorruptionErrors(NamedTuple):
    """Errors of the second run under shift ÷ errors of the first, mean over shifts.

    Attributes:
        task: Clean task.
        shifts: Number of shifts that the mean is taken over.
        severities: Severities that the mean is taken over.
        error_ratio: Ratio of errors; 1 where both runs make equally many.
        added_error_ratio: Ratio of the errors beyond those on clean data.
        error_ratio_interval: Interval of `error_ratio` over images, both ends NaN where there is none.
        added_error_ratio_interval: Interval of `added_error_ratio`.
    """

    task: str
    shifts: int
    severities: tuple[int, ...]
    error_ratio: float
    added_error_ratio: float
    error_ratio_interval: Interval
    added_error_ratio_interval: Interval


class GroupChange(NamedTuple):
    """Change of the mean of one metric over a group of tasks: one clean task, or all tasks shifted in the same input.

    Attributes:
        group: Name of the clean task; for shifted tasks that of the clean task on their split, else of the first.
        condition: `clean`, `shifted` (images), `shifted language` or `shifted image and language`.
        tasks: Number of tasks.
        metric: Name of the metric.
        first: Plain mean over the tasks in the first run.
        second: That of the second run, on the same records.
        difference: Second − first with interval, p-value and equivalence.
        p_holm: p-value adjusted by Holm over all groups of this metric.
        records: Number of records of all tasks.
        images: Number of images.
    """

    group: str
    condition: str
    tasks: int
    metric: str
    first: float
    second: float
    difference: Difference
    p_holm: float
    records: int
    images: int


class Comparison(NamedTuple):
    """All results of `compare`."""

    changes: list[Change]
    flips: list[Flipped]
    shifted: list[Shifted]
    corruption_errors: list[CorruptionErrors]
    groups: list[GroupChange]


def expect_margin(margin: float | None) -> None:
    """Refuse an equivalence margin that is not a share, as one in points would be; None stands for no test.

    Raises:
        ValueError: The margin is not between 0 and 1.
    """
    if margin is not None and not 0.0 < margin < 1.0:
        raise ValueError(f"expected a margin between 0 and 1, such as 0.02 for two points, got {margin:g}")


def compare(
    first: LoggedRun, second: LoggedRun, settings: MeasurementSettings, margin: float | None = None
) -> Comparison:
    """Compare two runs, task by task.

    Args:
        first: Reference run, usually the unquantized model.
        second: Run in question.
        settings: Estimator, resamples, seed and level.
        margin: Equivalence margin: largest absolute difference that counts as none; None for no test of equivalence.

    Raises:
        ValueError: The runs differ in tasks or documents, have no task of ours, or a split has fewer than 2 images.
    """
    if set(first.tasks) != set(second.tasks) or not first.tasks:
        only = [", ".join(sorted(set(a.tasks) - set(b.tasks))) or "none" for a, b in ((first, second), (second, first))]
        raise ValueError(f"expected the same tasks in both runs; the first alone has {only[0]}, the second {only[1]}")
    for task, records in first.tasks.items():
        match(records, second.tasks[task])
    expect_margin(margin)
    found = Comparison([], [], [], [], [])
    for tasks in families(first.tasks.values()):
        _family(tasks, second.tasks, settings, margin, found)
    return found._replace(changes=_corrected(found.changes), groups=_corrected_groups(found.groups))


def _family(
    tasks: Sequence[TaskRecords],
    others: Mapping[str, TaskRecords],
    settings: MeasurementSettings,
    margin: float | None,
    found: Comparison,
) -> None:
    """Add the comparison of all tasks on one split, whose images are drawn together."""
    names = np.unique(np.concatenate([records.images[records.reported] for records in tasks]))
    if names.size < 2:
        raise ValueError(f"expected at least 2 images in task {tasks[0].task} to make intervals from, got {names.size}")
    statistics: list[Statistic] = []
    parts: list[tuple[TaskRecords, int, int]] = []
    for records in tasks:
        made, known, images = _both(records, others[records.task], names, settings)
        statistics += made
        parts.append((records, known, images))
    drawn = bootstrap(
        statistics, names.size, resamples=settings.resamples, seed=settings.seed, workers=settings.workers
    )
    halves = {}
    # Per task: means, calibration and selective prediction of the first run, then the same of the second.
    for k, (records, known, images) in enumerate(parts):
        first, second = _joined(drawn[6 * k : 6 * k + 3]), _joined(drawn[6 * k + 3 : 6 * k + 6])
        halves[records.task] = first, second
        _changes(records, first, second, known, images, settings, margin, found)
        _flips(records, others[records.task], found)
    _groups(tasks, halves, settings, margin, found)
    for title, table in grids(_on_the_same_documents(tasks)).items():
        if tasks[0].kind is not REJECTION:
            _interactions(title, table, halves, settings, found)


def _on_the_same_documents(tasks: Sequence[TaskRecords]) -> list[TaskRecords]:
    """Return the clean tasks and those of the shifts that leave no document out, at any severity."""
    clean = [records for records in tasks if records.place.shift is None]
    shifted = [records for records in tasks if records.place.shift is not None]
    fewer = {r.place.shift for r in shifted if not any(np.array_equal(r.ids, one.ids) for one in clean)}
    return clean + [records for records in shifted if records.place.shift not in fewer]


def _both(
    one: TaskRecords, other: TaskRecords, names: np.ndarray, settings: MeasurementSettings
) -> tuple[list[Statistic], int, int]:
    """Return statistics of both runs on the reported records; those of confidence where both runs have one."""
    keep = one.reported
    clusters = Clusters(np.searchsorted(names, one.images[keep]), names.size)
    confidences = [records.confidence_by(settings.estimator)[keep] for records in (one, other)]
    known = ~np.isnan(confidences[0]) & ~np.isnan(confidences[1])
    inside = Clusters(clusters.index[known], clusters.count)
    statistics: list[Statistic] = []
    for records, confidence in zip((one, other), confidences, strict=True):
        outcome, score = records.outcome[keep], records.score[keep]
        means = {"accuracy": outcome, "mean_iou": score, "parse_rate": records.parsed[keep].astype(np.float64)}
        means[BOXES] = score
        wanted, ranked = set(compared(one.kind)), REJECTED if one.kind is REJECTION else RANKED
        statistics.append(Means({name: values for name, values in means.items() if name in wanted}, clusters))
        if known.any():
            arrays = confidence[known], outcome[known], inside
            statistics += [Binned(*arrays), Ranked(*arrays, ranked)]
        else:
            statistics += [_Missing(BINNED), _Missing(ranked)]
    return statistics, int(known.sum()), int(np.unique(inside.index).size)


def compared(kind: TaskKind) -> tuple[str, ...]:
    """Return the metrics that are compared for a kind of task."""
    if kind is REJECTION:
        return (BOXES, *REJECTED)
    return (*(MEANS if kind.right is not None else MEANS[:1]), *BINNED, *RANKED)


class _Missing:
    """Statistic of numbers that cannot be computed: NaN on every resample."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        return np.full((len(counts), len(self.names)), np.nan)


def _joined(parts: Sequence[Draws]) -> Draws:
    names = tuple(name for part in parts for name in part.names)
    values = np.concatenate([part.value for part in parts])
    added = [part.parts for part in parts if part.parts is not None]
    present = [part.present for part in parts if part.present is not None]
    resampled = np.concatenate([part.resampled for part in parts], axis=1)
    if min(len(added), len(present)) < len(parts):
        return Draws(names, values, resampled)
    return Draws(names, values, resampled, np.concatenate(added, axis=1), np.concatenate(present, axis=1))


def _changes(
    records: TaskRecords,
    first: Draws,
    second: Draws,
    known: int,
    images: int,
    settings: MeasurementSettings,
    margin: float | None,
    found: Comparison,
) -> None:
    keep = records.reported
    everything = int(keep.sum()), int(np.unique(records.images[keep]).size)
    for name in compared(records.kind):
        size = everything if name in (*MEANS, BOXES) else (known, images)
        changed = difference(first, second, name, level=settings.level, margin=margin)
        values = first.of(name)[0], second.of(name)[0]
        found.changes.append(
            Change(
                records.task, records.kind.named(PRINTED.get(name, name)), *values, changed, math.nan, math.nan, *size
            )
        )


def _flips(one: TaskRecords, other: TaskRecords, found: Comparison) -> None:
    if one.kind.right is None:
        return
    keep = one.reported
    lost, won = flips(one.outcome[keep], other.outcome[keep])
    found.flips.append(Flipped(one.task, lost, won, mcnemar(lost, won), int(keep.sum())))


def _groups(
    tasks: Sequence[TaskRecords],
    halves: Mapping[str, tuple[Draws, Draws]],
    settings: MeasurementSettings,
    margin: float | None,
    found: Comparison,
) -> None:
    """Add the changes of the means over groups of tasks; every clean task is a group of its own."""
    clean = [one.task for one in tasks if one.place.condition == CLEAN]
    members: dict[tuple[str, str], list[TaskRecords]] = {}
    for one in tasks:
        condition = one.place.condition
        name = one.task if condition == CLEAN else clean[0] if len(clean) == 1 else ""
        members.setdefault((name, condition), []).append(one)
    sizes = {(row.task, row.metric): (row.records, row.images) for row in found.changes}
    for (name, condition), chosen in sorted(members.items(), key=lambda item: item[0][1] != CLEAN):
        kind = chosen[0].kind
        for metric in compared(kind):
            before, after = (_mean([halves[one.task][k] for one in chosen], metric) for k in (0, 1))
            changed = difference(before, after, metric, level=settings.level, margin=margin)
            printed = kind.named(PRINTED.get(metric, metric))
            counts = [sizes[one.task, printed] for one in chosen]
            records, images = sum(count for count, _ in counts), max(count for _, count in counts)
            values = before.of(metric)[0], after.of(metric)[0]
            row = GroupChange(
                name or chosen[0].task, condition, len(chosen), printed, *values, changed, math.nan, records, images
            )
            found.groups.append(row)


def _interactions(
    title: str,
    table: Grid,
    halves: Mapping[str, tuple[Draws, Draws]],
    settings: MeasurementSettings,
    found: Comparison,
) -> None:
    clean, cells = table
    clean_first, clean_second = halves[clean.task]
    shifted = {cell: halves[records.task] for cell, records in cells.items()}
    for name in INTERACTIONS:
        means = [_mean([pair[k] for pair in shifted.values()], name) for k in (0, 1)]
        hurt = interaction(clean_first, means[0], clean_second, means[1], name, level=settings.level)
        found.shifted.append(Shifted(title, clean.kind.named(name), len(cells), hurt))
    found.corruption_errors.append(_corruption_errors(title, (clean_first, clean_second), shifted, settings.level))


def _corruption_errors(
    title: str, clean: tuple[Draws, Draws], shifted: Mapping[tuple[str, int], tuple[Draws, Draws]], level: float
) -> CorruptionErrors:
    at_clean = [_errors(draws) for draws in clean]
    cells = {cell: [_errors(draws) for draws in pair] for cell, pair in shifted.items()}
    both = []
    for k in range(at_clean[0].size):
        first, second = (as_table({cell: pair[run][k] for cell, pair in cells.items()}) for run in (0, 1))
        relative = robustness.relative_mean_corruption_error(second, at_clean[1][k], first, at_clean[0][k])
        both.append((robustness.mean_corruption_error(second, first), relative))
    # The first entry is the data. A resample whose reference has no errors gives no ratio.
    values, resampled = np.array(both[0]), np.where(np.isfinite(both[1:]), both[1:], np.nan)
    intervals = [interval(float(value), draws, level=level) for value, draws in zip(values, resampled.T, strict=True)]
    shifts, severities = {shift for shift, _ in cells}, {severity for _, severity in cells}
    return CorruptionErrors(
        title, len(shifts), tuple(sorted(severities)), float(values[0]), float(values[1]), intervals[0], intervals[1]
    )


def _errors(draws: Draws) -> npt.NDArray[np.float64]:
    """Return the share of wrong answers on the data and on every resample, shape (1 + resamples,)."""
    value, resampled = draws.of("accuracy")
    return 1.0 - np.concatenate(([value], resampled))


def _mean(cells: Sequence[Draws], name: str) -> Draws:
    pairs = [cell.of(name) for cell in cells]
    value = np.array([np.mean([value for value, _ in pairs])])
    resampled = np.mean([resampled for _, resampled in pairs], axis=0)[:, None]
    parts = ClusterParts.mean([cell.parts_of(name) for cell in cells])
    if parts is None:
        return Draws((name,), value, resampled)
    return Draws((name,), value, resampled, parts.added[:, None], parts.present[:, None])


def _corrected_groups(groups: Sequence[GroupChange]) -> list[GroupChange]:
    corrected = list(groups)
    for metric in {one.metric for one in groups}:
        rows = [k for k, one in enumerate(groups) if one.metric == metric]
        for k, p in zip(rows, holm([groups[k].difference.p for k in rows]), strict=True):
            corrected[k] = groups[k]._replace(p_holm=float(p))
    return corrected


def _corrected(changes: Sequence[Change]) -> list[Change]:
    corrected = list(changes)
    for metric in {change.metric for change in changes}:
        rows = [k for k, change in enumerate(changes) if change.metric == metric]
        p = [changes[k].difference.p for k in rows]
        for k, family, discovery in zip(rows, holm(p), benjamini_hochberg(p), strict=True):
            corrected[k] = changes[k]._replace(p_holm=float(family), p_bh=float(discovery))
    return corrected
