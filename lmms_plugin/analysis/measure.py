"""All metrics of a finished run, from its logs of samples, with numbers of records and intervals over images.

Images are drawn once for all tasks on the same documents, shifted or not, and identically for all runs on them, so that
means over tasks and differences between runs have paired intervals.

Thresholds and calibrators need records that nothing else is measured on. A task with a split of its own has a part for
that. For other tasks a share of the images is held out by a hash of their id, the same for clean and shifted data: what
is chosen on clean held-out images is then applied to the other images, clean and shifted.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin import metrics
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import (
    REJECTION,
    SHIFTED,
    STRICTER,
    Bools,
    EvaluationSet,
    Floats,
    TaskKind,
    TaskRecords,
    Texts,
    match,
)
from lmms_plugin.confidence.estimators import ALL_ESTIMATORS
from lmms_plugin.metrics import robustness
from lmms_plugin.metrics.bootstrap import RESAMPLES, Clusters, Draws, Statistic, affordable, bootstrap
from lmms_plugin.metrics.calibration import Binned, Smooth
from lmms_plugin.metrics.intervals import between
from lmms_plugin.metrics.localisation import Localised
from lmms_plugin.metrics.posthoc import CALIBRATORS
from lmms_plugin.metrics.ranked import RISKS, Ranked
from lmms_plugin.metrics.selective import COSTS, HELD_OUT, Gains
from lmms_plugin.metrics.sums import Means
from lmms_plugin.utils import suggest
from lmms_plugin.utils.chance import uniform

Cells = dict[tuple[str, int], TaskRecords]
Grid = tuple[TaskRecords, Cells]
ADDED = ("ece", "aurc")
REJECTED = ("auroc", "fpr_at_tpr")
CALIBRATED = ("ece", "brier", "nll")
IN_STRATUM = ("accuracy", "ece")
PRINTED = MappingProxyType({"adaptive_ece": "ace", "fpr_at_tpr": "fpr@0.95"})
"""Metrics that have another name in lmms-eval's table."""


@dataclass(frozen=True)
class MeasurementSettings:
    """Settings of intervals and of held-out records.

    Attributes:
        estimator: Confidence estimator; None for the default of the kind of task.
        resamples: Number of resamples of an interval.
        seed: Seed of the resamples and of the choice of held-out images.
        level: Confidence level of the intervals.
        held_out: Share of the images on which thresholds are chosen and calibrators fitted, in (0, 1).
        calibrator: Post-hoc calibrator, one of `lmms_plugin.metrics.posthoc.CALIBRATORS`.
        workers: Number of threads.
    """

    estimator: str | None = None
    resamples: int = RESAMPLES
    seed: int = 0
    level: float = 0.95
    held_out: float = 0.2
    calibrator: str = "platt"
    workers: int = 1

    def __post_init__(self) -> None:
        affordable(self.resamples)
        if self.estimator is not None and self.estimator not in ALL_ESTIMATORS:
            raise suggest.unknown("confidence estimator", self.estimator, ALL_ESTIMATORS)
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"expected the share of held-out images in (0, 1), got {self.held_out}")
        if not 0.5 < self.level < 1.0:
            raise ValueError(f"expected a confidence level in (0.5, 1), got {self.level}")
        if self.calibrator not in CALIBRATORS:
            raise ValueError(f"expected a calibrator of {', '.join(CALIBRATORS)}, got {self.calibrator!r}")

    def estimators(self, kind: TaskKind) -> frozenset[str]:
        """Return the estimators to read from a log: the requested one, and that of the table of results."""
        return frozenset((self.estimator or kind.estimator, kind.estimator))


class MetricValue(NamedTuple):
    """One metric of one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        value: Value; NaN where undefined.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end of its interval.
        records: Number of records.
        images: Number of images.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    records: int
    images: int


class Robustness(NamedTuple):
    """Cost of shifts for a run on one split of a dataset.

    Attributes:
        metric: Name of the metric.
        clean: Value on clean data.
        mean: Mean over severities, then shifts.
        retained: `mean` ÷ `clean`; NaN for metrics that should be low.
        per_severity: Severity → share of the clean value that is lost or, for metrics that should be low, the increase.
    """

    metric: str
    clean: float
    mean: float
    retained: float
    per_severity: dict[int, float]


class Family(NamedTuple):
    """Tasks on the same documents, shifted or not.

    Attributes:
        dataset: Name of the dataset.
        split: Split of the dataset.
        record: Kind of record.
        clean: Name of the task without shift, where the split has several on different documents; else "".
    """

    dataset: str
    split: str
    record: str
    clean: str = ""


@dataclass(frozen=True, eq=False)
class Together:
    """Tasks whose images are drawn together.

    Attributes:
        family: Family of the tasks.
        tasks: Records of the tasks.
        names: Images that results are reported on, sorted, shape (images,).
        judged: Images of `names` that are not held out, sorted: thresholds and calibrators are evaluated on them.
    """

    family: Family
    tasks: tuple[TaskRecords, ...]
    names: Texts
    judged: Texts


def together(tasks: Iterable[TaskRecords], settings: MeasurementSettings) -> list[Together]:
    """Group tasks by the documents they ask about; rejection tasks are left out."""
    found: dict[Family, list[TaskRecords]] = {}
    for one in tasks:
        if one.kind is not REJECTION:
            found.setdefault(_family(one), []).append(one)
    return [
        _together(family._replace(clean=clean), same, settings)
        for family, members in found.items()
        for clean, same in _on_the_same_documents(members).items()
    ]


def _family(records: TaskRecords) -> Family:
    """Return the family of a task; local copies of a dataset are named by their last folder."""
    path, place = records.place.dataset.replace("\\", "/"), records.place
    dataset = path.rstrip("/").rsplit("/", 1)[-1] if path.startswith(("/", ".")) else place.dataset
    return Family(dataset, place.split, records.kind.record)


def _on_the_same_documents(members: Sequence[TaskRecords]) -> dict[str, list[TaskRecords]]:
    """Group tasks by the name of the task without shift that they belong to, "" if there is only one."""
    clean = {one.documents: one for one in members if one.place.shift is None}
    if len(clean) < 2:
        return {"": list(members)}
    parted: dict[str, list[TaskRecords]] = {one.task: [] for one in clean.values()}
    for one in members:
        # Language shifts leave documents out: they belong to the task that shares most of their images.
        shared = {other.task: np.intersect1d(one.names, other.names).size for other in clean.values()}
        own = clean[one.documents].task if one.documents in clean else max(shared, key=lambda task: shared[task])
        parted[own].append(one)
    return parted


def _together(family: Family, tasks: Sequence[TaskRecords], settings: MeasurementSettings) -> Together:
    return Together(
        family,
        tuple(tasks),
        _names([(one, one.reported) for one in tasks]),
        _names([(one, one.reported & ~held_out(one, settings)) for one in tasks]),
    )


def _names(kept: Sequence[tuple[TaskRecords, Bools]]) -> Texts:
    first = kept[0][0].names
    masks = [np.bincount(one.image[keep], minlength=one.names.size) > 0 for one, keep in kept]
    if all(np.array_equal(one.names, first) for one, _ in kept):
        return first[np.logical_or.reduce(masks)]
    return np.unique(np.concatenate([one.names[mask] for (one, _), mask in zip(kept, masks, strict=True)]))


def clusters(records: TaskRecords, names: Texts) -> Clusters:
    """Return the image index of each record among the drawn images; invalid for records without such an image."""
    return Clusters(np.searchsorted(names, records.names)[records.image].astype(np.intp), names.size)


def part(whole: Clusters, keep: Bools) -> Clusters:
    """Restrict clusters to some records."""
    return Clusters(whole.index[keep], whole.count)


def drawn(statistics: Sequence[Statistic], images: int, settings: MeasurementSettings) -> list[Draws]:
    """Evaluate statistics on the data and on every resample; without resamples if there is only one image."""
    if images < 2:
        once = np.ones((1, max(images, 1)))
        return [Draws(one.names, one(once)[0], np.empty((0, len(one.names)))) for one in statistics]
    return bootstrap(statistics, images, resamples=settings.resamples, seed=settings.seed, workers=settings.workers)


class Known(NamedTuple):
    """Reported records with a confidence. Arrays have shape (n,).

    Attributes:
        keep: Mask of these records among all records.
        confidence: Confidences by the estimator.
        outcome: Outcomes that confidence is to predict.
        clusters: Images of the records among those that are drawn.
    """

    keep: Bools
    confidence: Floats
    outcome: Floats
    clusters: Clusters


def known(records: TaskRecords, estimator: str | None, names: Texts) -> Known:
    """Return the reported records that an estimator has a value for."""
    confidence = records.confidence_by(estimator)
    keep = records.reported & ~np.isnan(confidence)
    return Known(keep, confidence[keep], records.outcome[keep], part(clusters(records, names), keep))


def means(records: TaskRecords, confidence: Floats, names: Texts, stricter: Sequence[float] = ()) -> Means:
    """Compute accuracy, share with a confidence and, for boxes, mean IoU and parse rate of the reported records."""
    keep = records.reported
    score = records.score[keep]
    columns: dict[str, npt.ArrayLike] = {"accuracy": records.outcome[keep]}
    if records.kind.right is not None:
        columns |= {f"acc@{t:g}": (score >= t).astype(np.float64) for t in stricter}
        columns |= {"mean_iou": score, "parse_rate": records.parsed[keep].astype(np.float64)}
    columns["confidence_rate"] = (~np.isnan(confidence[keep])).astype(np.float64)
    return Means(columns, part(clusters(records, names), keep))


class Chosen(NamedTuple):
    """Held-out records on which thresholds are chosen and calibrators fitted. Arrays have shape (n,).

    Attributes:
        task: Task of the records.
        confidence: Confidences by the estimator.
        outcome: Outcomes that confidence is to predict.
        images: Names of the images.
    """

    task: str
    confidence: Floats
    outcome: Floats
    images: Texts


def beyond(
    records: TaskRecords, tasks: Mapping[str, TaskRecords], names: Texts, settings: MeasurementSettings
) -> tuple[Chosen, Known] | None:
    """Return held-out records, and the other records of a task, on which choices made on them are evaluated.

    None where nothing is held out, or where the others have a single image and therefore no interval.

    Args:
        records: Records of the task.
        tasks: Tasks of the run that the held-out images belong to.
        names: Images that are drawn.
        settings: Estimator and held-out share.

    Raises:
        ValueError: The run has neither the task nor its clean one, or other documents under that name.
    """
    source = _clean_twin(tasks, records)
    told = source.confidence_by(settings.estimator)
    choosing = held_out(source, settings) & ~np.isnan(told)
    confidence = records.confidence_by(settings.estimator)
    keep = records.reported & ~held_out(records, settings) & ~np.isnan(confidence)
    if np.unique(records.image[keep]).size < 2 or not choosing.any():
        return None
    return (
        Chosen(source.task, told[choosing], source.outcome[choosing], source.images[choosing]),
        Known(keep, confidence[keep], records.outcome[keep], part(clusters(records, names), keep)),
    )


def measure(run: LoggedRun, settings: MeasurementSettings, chosen_on: LoggedRun | None = None) -> list[MetricValue]:
    """Measure all metrics of all tasks of a run.

    Without confidences (a model of another package) calibration is absent, not zero. Metrics that need held-out records
    are absent where there are none, and those that need a calibrator where all held-out records are right or all wrong.

    Args:
        run: Run to measure.
        settings: Estimator, intervals and held-out share.
        chosen_on: Run on whose held-out images thresholds are chosen and calibrators fitted, e.g. that of the
            unquantized model; None for the run itself. Results are always on the other images.

    Raises:
        ValueError: The run has no task of ours, a task has fewer than 2 images, or `chosen_on` lacks one of the tasks
            or has other documents in it.
    """
    expect_images(run)
    of = {one.task: family for family in together(run.tasks.values(), settings) for one in family.tasks}
    numbers: list[MetricValue] = []
    for records in run.tasks.values():
        if records.kind is REJECTION:
            numbers += rejection(records, settings)
            continue
        family = of[records.task]
        tasks = {one.task: one for one in family.tasks} if chosen_on is None else chosen_on.tasks
        numbers += _everything(records, family.names, settings)
        numbers += calibration_floor(records, settings)
        numbers += by_stratum(records, settings)
        numbers += _beyond_held_out(records, tasks, family.judged, settings)
    return numbers


def held_out(records: TaskRecords, settings: MeasurementSettings) -> Bools:
    """Return the mask of records of held-out images, shape (n,); it does not depend on the other images."""
    if np.any(records.parts != ""):
        return np.equal(records.parts, HELD_OUT)
    aside = _held_out_images(tuple(records.names.tolist()), settings.seed, settings.held_out)
    return aside[records.image]


@lru_cache(maxsize=8)
def _held_out_images(names: tuple[str, ...], seed: int, share: float) -> Bools:
    return np.array([uniform(f"{seed}:{name}") < share for name in names])


def robust(run: LoggedRun, settings: MeasurementSettings) -> dict[str, list[Robustness]]:
    """Measure robustness by clean task, where a run has one and a full table of shifts × severities beside it.

    Language shifts leave out documents that they cannot change; only documents that all tasks of the table share are
    used.
    """
    found = {}
    for tasks in families(records for records in run.tasks.values() if records.kind is not REJECTION):
        for title, (clean, cells) in grids(tasks).items():
            clean, *shifted = shared((clean, *cells.values()))
            at_clean = key_numbers(clean, settings)
            values = {place: key_numbers(r, settings) for place, r in zip(cells, shifted, strict=True)}
            found[title] = [
                _robustness(name, at_clean[name], values)._replace(metric=clean.kind.named(name)) for name in at_clean
            ]
    return found


def families(tasks: Iterable[TaskRecords]) -> list[list[TaskRecords]]:
    """Group tasks by dataset, split and kind: the same documents under different shifts."""
    groups: dict[tuple[str, str, str], list[TaskRecords]] = {}
    for records in tasks:
        groups.setdefault((records.place.dataset, records.place.split, records.kind.record), []).append(records)
    return list(groups.values())


def grids(tasks: Sequence[TaskRecords]) -> dict[str, Grid]:
    """Return the clean task and the shifted ones by (shift, severity), for image shifts, language shifts and both.

    Returns:
        Grids by the clean task's name and, unless the image is shifted, what is shifted; none without a clean task or
        a full table.
    """
    found = {}
    for which, clean, cells in _by_shift(tasks):
        if not _lacking(clean, cells):
            title = clean[0].task if which == SHIFTED[0] else f"{clean[0].task}, {which}"
            found[title] = clean[0], dict(sorted(cells.items()))
    return found


def without_grid(run: LoggedRun) -> list[str]:
    """Return one line for each dataset and kind of shift whose robustness cannot be measured, with the reason."""
    lines = []
    for tasks in families(records for records in run.tasks.values() if records.kind is not REJECTION):
        for which, clean, cells in _by_shift(tasks):
            if why := _lacking(clean, cells):
                first = next(iter(cells.values())).task
                lines.append(f"{run.file}: no robustness to shifts of {which} from {first} (of {len(cells)}): {why}")
    return lines


def _by_shift(tasks: Sequence[TaskRecords]) -> Iterator[tuple[str, list[TaskRecords], Cells]]:
    clean = [records for records in tasks if records.place.shift is None]
    for which in SHIFTED:
        chosen = [r for r in tasks if r.place.shift is not None and r.place.shifts == which]
        if chosen:
            yield which, clean, {_cell(records.place): records for records in chosen}


def _lacking(clean: Sequence[TaskRecords], cells: Cells) -> str:
    """Return what keeps tasks from being a table of shifts × severities beside a clean task; "" if nothing does."""
    if len(clean) != 1:
        return f"expected one clean task on the same split, got {', '.join(r.task for r in clean) or 'none'}"
    shifts, severities = ({cell[k] for cell in cells} for k in (0, 1))
    missing = [f"{shift} {severity}" for shift, severity in sorted(set(product(shifts, severities)) - set(cells))]
    return f"a mean over shifts and severities lacks {', '.join(missing[:4])} (of {len(missing)})" if missing else ""


def shared(tasks: Sequence[TaskRecords]) -> list[TaskRecords]:
    """Restrict tasks to the documents that all of them have.

    Raises:
        ValueError: There are none.
    """
    ids = reduce(np.intersect1d, (records.ids for records in tasks))
    if not ids.size:
        raise ValueError(f"expected documents that {', '.join(records.task for records in tasks)} share, got none")
    return [records.only(np.isin(records.ids, ids)) for records in tasks]


def as_table(values: Mapping[tuple[str, int], float]) -> Floats:
    """Return values by (shift, severity) as an array of shape (shifts, severities), both sorted."""
    severities = {severity for _, severity in values}
    return np.array([values[cell] for cell in sorted(values)]).reshape(-1, len(severities))


def key_numbers(records: TaskRecords, settings: MeasurementSettings) -> dict[str, float]:
    """Compute accuracy, ECE, AURC and coverage at risk of the reported records; NaN without confidences."""
    keep = records.reported
    confidence, outcome = records.confidence_by(settings.estimator)[keep], records.outcome[keep]
    known = ~np.isnan(confidence)
    c, y = confidence[known], outcome[known]
    numbers = {"accuracy": float(outcome.mean())}
    numbers["ece"] = metrics.ece(c, y) if c.size else math.nan
    numbers["aurc"] = metrics.aurc(c, y) if c.size else math.nan
    for risk in (0.01, 0.05):
        numbers[f"coverage@{risk:g}"] = metrics.coverage_at_risk(c, y, risk) if c.size else math.nan
    return numbers


def expect_images(run: LoggedRun) -> None:
    """Refuse a run of which nothing can be measured with an interval.

    Raises:
        ValueError: It has no task of ours, or a task has fewer than 2 images.
    """
    if not run.tasks:
        raise ValueError(f"expected tasks of this package in {run.file}, got {', '.join(run.others) or 'none'}")
    for records in run.tasks.values():
        if records.kind is not REJECTION:
            _count_images(records, records.reported)


def _everything(records: TaskRecords, names: Texts, settings: MeasurementSettings) -> list[MetricValue]:
    confidence, there = records.confidence_by(settings.estimator), known(records, settings.estimator, names)
    statistics: list[Statistic] = [means(records, confidence, names, STRICTER)]
    if there.keep.any():
        arrays = there.confidence, there.outcome, there.clusters
        statistics += [Binned(*arrays), Smooth(*arrays), Ranked(*arrays)]
        if records.kind.right is not None:
            statistics.append(Localised(there.confidence, records.score[there.keep], there.clusters))
    return _measured(records, statistics, records.reported, names.size, settings)


def rejection(records: TaskRecords, settings: MeasurementSettings) -> list[MetricValue]:
    """Measure how well confidence separates expressions with and without a match, and how often it falls within a pair.

    Args:
        records: Records of a rejection task.
        settings: Estimator and intervals.

    Raises:
        ValueError: There are fewer than 2 images.
    """
    confidence, matches = records.confidence_by(settings.estimator), records.outcome
    there = ~np.isnan(confidence)
    true, changed = _pairs(records, there)
    numbers = []
    for name, side in (("true", matches == 1.0), ("changed" if true.size else "no_target", matches == 0.0)):
        if side.any():
            boxes = Means({f"box_rate_{name}": records.score[side]}, Clusters.of(records.images[side]))
            numbers += _measured(records, [boxes], side, _images(records, side), settings)
    if there.any():
        ranked = Ranked(confidence[there], matches[there], Clusters.of(records.images[there]), REJECTED)
        numbers += _measured(records, [ranked], there, _images(records, there), settings)
    if true.size:
        falls = (confidence[true] > confidence[changed]) + 0.5 * (confidence[true] == confidence[changed])
        fallen = Means({"confidence_falls": falls}, Clusters.of(records.images[true]))
        paired = np.isin(np.arange(there.size), true)
        numbers += _measured(records, [fallen], paired, _images(records, paired), settings)
    return numbers


def _pairs(records: TaskRecords, there: Bools) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the indices of true and changed expression of each pair with both confidences, shape (pairs,)."""
    sides = [np.flatnonzero(there & (records.outcome == side)) for side in (1.0, 0.0)]
    pairs = [records.pairs[side] if records.pairs is not None else side for side in sides]
    _, true, changed = np.intersect1d(pairs[0], pairs[1], return_indices=True)
    return sides[0][true], sides[1][changed]


def _images(records: TaskRecords, keep: Bools) -> int:
    return int(np.unique(records.image[keep]).size)


def _count_images(records: TaskRecords, keep: Bools) -> int:
    if (count := _images(records, keep)) < 2:
        raise ValueError(f"expected at least 2 images in task {records.task} to make intervals from, got {count}")
    return count


def _measured(
    records: TaskRecords,
    statistics: Sequence[Statistic],
    keep: Bools,
    images: int,
    settings: MeasurementSettings,
    suffix: str = "",
) -> list[MetricValue]:
    """Evaluate statistics on some records, with intervals over the `images` images."""
    count = _count_images(records, keep)
    there = keep & ~np.isnan(records.confidence_by(settings.estimator))
    sizes = (int(keep.sum()), count), (int(there.sum()), _images(records, there))
    numbers = []
    for statistic, draws in zip(statistics, drawn(statistics, images, settings), strict=True):
        size = sizes[0] if isinstance(statistic, Means) else sizes[1]
        for name in draws.names:
            low, high = between(name, *draws.of(name), settings.level)
            printed = records.kind.named(PRINTED.get(name, name)) + suffix
            numbers.append(MetricValue(records.task, printed, draws.of(name)[0], low, high, *size))
    return numbers


def calibration_floor(records: TaskRecords, settings: MeasurementSettings) -> list[MetricValue]:
    """Measure what ECE and ACE would be for a perfectly calibrated model; empty without confidences."""
    confidence = records.confidence_by(settings.estimator)
    keep = records.reported & ~np.isnan(confidence)
    if not keep.any():
        return []
    size = int(keep.sum()), _images(records, keep)
    numbers = []
    for name, equal_mass in (("ece", False), ("ace", True)):
        floor = metrics.ece_floor(confidence[keep], equal_mass=equal_mass, seed=settings.seed)
        for end, value in zip(("floor", "floor_p95"), floor, strict=True):
            numbers.append(MetricValue(records.task, f"{name}_{end}", value, math.nan, math.nan, *size))
    return numbers


def by_stratum(records: TaskRecords, settings: MeasurementSettings) -> list[MetricValue]:
    """Measure accuracy, ECE and its floor in every stratum of a task, as `acc@0.5_distractors_2-3`.

    Images are drawn among those of the stratum. Strata of a single image, of which there is no interval, are left out,
    and documents whose stratum is unknown are in none.
    """
    if records.strata is None:
        return []
    numbers = []
    for stratum in sorted(set(records.strata[records.reported].tolist()) - {""}):
        part = records.only(records.reported & np.equal(records.strata, stratum))
        everywhere = np.ones(part.ids.size, np.bool_)
        if _images(part, everywhere) < 2:
            continue
        suffix, names = f"_{stratum}", _names([(part, everywhere)])
        there = known(part, settings.estimator, names)
        statistics: list[Statistic] = [means(part, part.confidence_by(settings.estimator), names)]
        if there.keep.any():
            statistics.append(Binned(there.confidence, there.outcome, there.clusters))
        wanted = {part.kind.named(name) + suffix for name in IN_STRATUM}
        measured = _measured(part, statistics, everywhere, names.size, settings, suffix)
        numbers += [number for number in measured if number.metric in wanted]
        floors = [one for one in calibration_floor(part, settings) if one.metric == "ece_floor"]
        numbers += [one._replace(metric=one.metric + suffix) for one in floors]
    return numbers


def _beyond_held_out(
    records: TaskRecords, tasks: Mapping[str, TaskRecords], names: Texts, settings: MeasurementSettings
) -> list[MetricValue]:
    """Evaluate thresholds and calibrators from held-out images on the other images of some records."""
    found = beyond(records, tasks, names, settings)
    if found is None:
        return []
    chosen, rest = found
    c, y = chosen.confidence, chosen.outcome
    at_risk = {risk: metrics.threshold_at_risk(c, y, risk) for risk in RISKS}
    at_cost = {cost: metrics.threshold_at_cost(c, y, cost) for cost in COSTS}
    gains = [Gains(rest.confidence, rest.outcome, rest.clusters, at_risk, at_cost)]
    numbers = _measured(records, gains, rest.keep, names.size, settings)
    if not 0.0 < y.mean() < 1.0:
        return numbers
    fit = CALIBRATORS[settings.calibrator].fit
    fitted = fit(c, y, chosen.images.tolist(), split=f"{chosen.task}, held out")
    applied = fitted.apply(rest.confidence, records.images[rest.keep].tolist())
    after = [Binned(applied, rest.outcome, rest.clusters)]
    suffix = f"_after_{settings.calibrator}"
    wanted = {name + suffix for name in CALIBRATED}
    measured = _measured(records, after, rest.keep, names.size, settings, suffix)
    return numbers + [number for number in measured if number.metric in wanted]


def _clean_twin(tasks: Mapping[str, TaskRecords], records: TaskRecords) -> TaskRecords:
    """Return a run's task on the same documents without shift, else that of the same name.

    Raises:
        ValueError: The run has neither, or other documents under that name.
    """
    clean = records.place._replace(shift=None, severity=None, shifts=SHIFTED[0])
    same = tasks.get(records.task)
    if same is not None and same.place == clean:
        return _same_documents(records, same)
    twin = next((other for other in tasks.values() if other.place == clean), same)
    if twin is None:
        raise ValueError(
            f"expected task {records.task} or the same on clean images in the run to choose on, got neither"
        )
    return twin if twin is not same else _same_documents(records, twin)


def _same_documents(records: TaskRecords, other: TaskRecords) -> TaskRecords:
    if other is not records:
        match(records, other)
    return other


def _robustness(name: str, clean: float, cells: Mapping[tuple[str, int], Mapping[str, float]]) -> Robustness:
    values = as_table({cell: numbers[name] for cell, numbers in cells.items()})
    severities = sorted({severity for _, severity in cells})
    worse_is_more = name in ADDED
    per_severity = (robustness.added_per_severity if worse_is_more else robustness.lost_per_severity)(values, clean)
    kept = math.nan if worse_is_more else robustness.retained(values, clean)
    changes = dict(zip(severities, per_severity.tolist(), strict=True))
    return Robustness(name, clean, robustness.mean_under_corruption(values), kept, changes)


def _cell(place: EvaluationSet) -> tuple[str, int]:
    return str(place.shift), int(place.severity or 0)
