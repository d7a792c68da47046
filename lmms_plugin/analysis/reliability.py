"""Every metric of a finished run, from its log of samples: with the number of records, and intervals over images.

Thresholds and calibrators need records that nothing else is measured on. A task that brings its own split has a part
for that. For the others a share of the images is held out by a hash of their id, the same for clean and shifted data:
what is chosen on clean held-out images is then applied to the other images, clean and shifted.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

from lmms_plugin import metrics
from lmms_plugin.analysis.results import HELD_OUT, REJECTION, SHIFTED, Place, Run, TaskRecords, match, reported
from lmms_plugin.metrics import robustness
from lmms_plugin.metrics.bootstrap import RESAMPLES, Clusters, Statistic, affordable, bootstrap, interval
from lmms_plugin.metrics.calibration import Binned, Smooth
from lmms_plugin.metrics.intervals import METHODS
from lmms_plugin.metrics.localisation import Localised
from lmms_plugin.metrics.posthoc import CALIBRATORS
from lmms_plugin.metrics.ranked import RISKS, Ranked
from lmms_plugin.metrics.selective import COSTS, Gains
from lmms_plugin.metrics.sums import Means
from lmms_plugin.utils.chance import uniform

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Cells = dict[tuple[str, int], TaskRecords]
Grid = tuple[TaskRecords, Cells]
STRICTER = (0.75, 0.9)
ADDED = ("ece", "aurc")
REJECTED = ("auroc", "fpr_at_tpr")
CALIBRATED = ("ece", "brier", "nll")
PRINTED = MappingProxyType({"adaptive_ece": "ace", "fpr_at_tpr": "fpr@0.95"})
"""Metrics that lmms-eval's table calls by another name."""


@dataclass(frozen=True)
class Settings:
    """How intervals are made and records held out.

    Attributes:
        estimator: Confidence estimator; None for that of the kind of task.
        resamples: Resamples of an interval.
        seed: Seed of the resamples and of the choice of held-out images.
        level: Confidence level of the intervals.
        held_out: Share of the images on which thresholds are chosen and calibrators fitted, in (0, 1).
        calibrator: Which post-hoc calibrator is fitted, of `lmms_plugin.metrics.posthoc.CALIBRATORS`.
        workers: Threads.
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
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"expected the share of held-out images in (0, 1), got {self.held_out}")
        if not 0.5 < self.level < 1.0:
            raise ValueError(f"expected a confidence level in (0.5, 1), got {self.level}")
        if self.calibrator not in CALIBRATORS:
            raise ValueError(f"expected a calibrator of {', '.join(CALIBRATORS)}, got {self.calibrator!r}")


class Number(NamedTuple):
    """One metric of one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        value: Its value; NaN where it is undefined.
        low: Lower end of its interval; NaN where there is none.
        high: Upper end.
        records: On how many records.
        images: Of how many images.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    records: int
    images: int


class Robustness(NamedTuple):
    """What shifts cost a run on one split of a dataset.

    Attributes:
        metric: Name of the metric.
        clean: Its value on clean data.
        mean: Mean over severities, then shifts.
        retained: That ÷ clean; NaN for what should be low.
        per_severity: Severity → share of the clean value lost there or, for what should be low, what is added.
    """

    metric: str
    clean: float
    mean: float
    retained: float
    per_severity: dict[int, float]


def measure(run: Run, settings: Settings, chosen_on: Run | None = None) -> list[Number]:
    """All metrics of all tasks of a run.

    Without confidences (a model of another package) calibration is absent, not zero. So is what needs held-out records
    where there are none, and what needs a calibrator where they are all right or all wrong.

    Args:
        run: The run.
        settings: Estimator, intervals and what is held out.
        chosen_on: Run on whose held-out images thresholds are chosen and calibrators fitted, e.g. that of the
            unquantized model; None for the run itself. Results are of the other images all the same.

    Raises:
        ValueError: If the run has no task of ours, a task has fewer than 2 images, or `chosen_on` lacks one of the
            tasks or has other documents in it.
    """
    _of_ours(run)
    numbers: list[Number] = []
    for records in run.tasks.values():
        if records.kind is REJECTION:
            numbers += rejection(records, settings)
            continue
        numbers += _measured(records, _everything(records, settings), reported(records), settings)
        numbers += _floor(records, settings)
        numbers += _beyond_held_out(run if chosen_on is None else chosen_on, records, settings)
    return numbers


def held_out(records: TaskRecords, settings: Settings) -> Mask:
    """Which records thresholds are chosen on, shape (n,): of held-out images, whichever others there are."""
    if np.any(records.parts != ""):
        return np.equal(records.parts, HELD_OUT)
    names, index = np.unique(records.images, return_inverse=True)
    return np.array([uniform(f"{settings.seed}:{name}") < settings.held_out for name in names])[index]


def robust(run: Run, settings: Settings) -> dict[str, list[Robustness]]:
    """Robustness by clean task, where a run has one and a full table of shifts × severities beside it.

    Language shifts leave out what they cannot change: everything here is of the documents that all tasks of the table
    have.
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
    """Tasks grouped by dataset, split and kind: the same documents under different shifts."""
    groups: dict[tuple[str, str, str], list[TaskRecords]] = {}
    for records in tasks:
        groups.setdefault((records.place.dataset, records.place.split, records.kind.record), []).append(records)
    return list(groups.values())


def grids(tasks: Sequence[TaskRecords]) -> dict[str, Grid]:
    """The clean task and the shifted ones by (shift, severity), for shifts of images, of language, and of both apart.

    Returns:
        By the clean task's name, and what is shifted unless that is the image; none without a clean task or a full
        table.
    """
    found = {}
    for which, clean, cells in _by_shift(tasks):
        if not _lacking(clean, cells):
            title = clean[0].task if which == SHIFTED[0] else f"{clean[0].task}, {which}"
            found[title] = clean[0], dict(sorted(cells.items()))
    return found


def without_grid(run: Run) -> list[str]:
    """Shifted tasks of which no robustness can be told, and why not, one line for each dataset and kind of shift."""
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
    """What keeps tasks from being a table of shifts × severities beside a clean task; "" if nothing does."""
    if len(clean) != 1:
        return f"expected one clean task on the same split, got {', '.join(r.task for r in clean) or 'none'}"
    shifts, severities = ({cell[k] for cell in cells} for k in (0, 1))
    missing = [f"{shift} {severity}" for shift, severity in sorted(set(product(shifts, severities)) - set(cells))]
    return f"a mean over shifts and severities lacks {', '.join(missing[:4])} (of {len(missing)})" if missing else ""


def shared(tasks: Sequence[TaskRecords]) -> list[TaskRecords]:
    """The same tasks restricted to the documents that all of them have.

    Raises:
        ValueError: If there are none.
    """
    ids = reduce(np.intersect1d, (records.ids for records in tasks))
    if not ids.size:
        raise ValueError(f"expected documents that {', '.join(records.task for records in tasks)} share, got none")
    return [records.only(np.isin(records.ids, ids)) for records in tasks]


def as_table(values: Mapping[tuple[str, int], float]) -> Floats:
    """Values by (shift, severity) as an array of shape (shifts, severities), both sorted."""
    severities = {severity for _, severity in values}
    return np.array([values[cell] for cell in sorted(values)]).reshape(-1, len(severities))


def key_numbers(records: TaskRecords, settings: Settings) -> dict[str, float]:
    """Accuracy, ECE, AURC and coverage at risk of the reported records; NaN without confidences."""
    keep = reported(records)
    confidence, outcome = records.confidence_by(settings.estimator)[keep], records.outcome[keep]
    known = ~np.isnan(confidence)
    c, y = confidence[known], outcome[known]
    numbers = {"accuracy": float(outcome.mean())}
    numbers["ece"] = metrics.ece(c, y) if c.size else math.nan
    numbers["aurc"] = metrics.aurc(c, y) if c.size else math.nan
    for risk in (0.01, 0.05):
        numbers[f"coverage@{risk:g}"] = metrics.coverage_at_risk(c, y, risk) if c.size else math.nan
    return numbers


def table(numbers: Sequence[Number], title: str, level: float) -> Table:
    """Numbers for people to read."""
    shown = Table(title=title)
    for heading in ("task", "metric"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("value", f"{100 * level:g} % interval", "records", "images"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for k, number in enumerate(numbers):
        task = number.task if k == 0 or numbers[k - 1].task != number.task else ""
        between = "" if math.isnan(number.low) else f"{number.low:z.4f} … {number.high:z.4f}"
        value = "undefined" if math.isnan(number.value) else f"{number.value:z.4f}"
        row = (task, number.metric, value, between, str(number.records), str(number.images))
        shown.add_row(*row)
    return shown


def robustness_table(rows: Sequence[Robustness], title: str) -> Table:
    """Robustness for people to read."""
    severities = list(rows[0].per_severity)
    caption = (
        "shifted: plain mean over the shifts at these severities; retained: that ÷ clean;"
        " per severity: share lost (accuracy, coverage) or what is added (ece, aurc)"
    )
    shown = Table(title=f"{title} under shift", caption=caption)
    shown.add_column("metric", no_wrap=True)
    for heading in ("clean", "shifted", "retained", *(f"severity {severity}" for severity in severities)):
        shown.add_column(heading, justify="right")
    for row in rows:
        values = (row.clean, row.mean, row.retained, *row.per_severity.values())
        shown.add_row(row.metric, *("" if math.isnan(value) else f"{value:z.4f}" for value in values))
    return shown


def plain(value: Any) -> Any:
    """The same as JSON can write it: named tuples and dataclasses as objects, NaN and infinities as null."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _of_ours(run: Run) -> None:
    if not run.tasks:
        raise ValueError(f"expected tasks of this package in {run.file}, got {', '.join(run.others) or 'none'}")


def _everything(records: TaskRecords, settings: Settings) -> list[Statistic]:
    keep = reported(records)
    clusters = Clusters.of(records.images[keep])
    confidence = records.confidence_by(settings.estimator)[keep]
    known = ~np.isnan(confidence)
    score, outcome = records.score[keep], records.outcome[keep]
    means: dict[str, npt.ArrayLike] = {records.kind.named("accuracy"): outcome}
    if records.kind.right is not None:
        means |= {f"acc@{t:g}": (score >= t).astype(np.float64) for t in STRICTER}
        means |= {"mean_iou": score, "parse_rate": records.parsed[keep].astype(np.float64)}
    statistics: list[Statistic] = [Means(means | {"confidence_rate": known.astype(np.float64)}, clusters)]
    if known.any():
        arrays = confidence[known], outcome[known], Clusters(clusters.index[known], clusters.count)
        statistics += [Binned(*arrays), Smooth(*arrays), Ranked(*arrays)]
        if records.kind.right is not None:
            statistics.append(Localised(arrays[0], score[known], arrays[2]))
    return statistics


def rejection(records: TaskRecords, settings: Settings) -> list[Number]:
    """How well confidence tells expressions that match something from others, and how often it falls within a pair.

    Args:
        records: Of a task of rejection.
        settings: Estimator and intervals.

    Raises:
        ValueError: If there are fewer than 2 images.
    """
    confidence, matches = records.confidence_by(settings.estimator), records.outcome
    known = ~np.isnan(confidence)
    true, changed = _pairs(records, known)
    numbers = []
    for name, side in (("true", matches == 1.0), ("changed" if true.size else "no_target", matches == 0.0)):
        if side.any():
            boxes = Means({f"box_rate_{name}": records.score[side]}, Clusters.of(records.images[side]))
            numbers += _measured(records, [boxes], side, settings)
    if known.any():
        ranked = Ranked(confidence[known], matches[known], Clusters.of(records.images[known]), REJECTED)
        numbers += _measured(records, [ranked], known, settings)
    if true.size:
        falls = (confidence[true] > confidence[changed]) + 0.5 * (confidence[true] == confidence[changed])
        fallen = Means({"confidence_falls": falls}, Clusters.of(records.images[true]))
        numbers += _measured(records, [fallen], np.isin(np.arange(known.size), true), settings)
    return numbers


def _pairs(records: TaskRecords, known: Mask) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Of each pair with both confidences the places of its true and of its changed expression, shape (pairs,)."""
    sides = [np.flatnonzero(known & (records.outcome == side)) for side in (1.0, 0.0)]
    pairs = [records.pairs[side] if records.pairs is not None else side for side in sides]
    _, true, changed = np.intersect1d(pairs[0], pairs[1], return_indices=True)
    return sides[0][true], sides[1][changed]


def _measured(
    records: TaskRecords, statistics: Sequence[Statistic], keep: Mask, settings: Settings, suffix: str = ""
) -> list[Number]:
    confidence = records.confidence_by(settings.estimator)[keep]
    images = records.images[keep]
    count = np.unique(images).size
    if count < 2:
        raise ValueError(f"expected at least 2 images in task {records.task} to make intervals from, got {count}")
    known = ~np.isnan(confidence)
    sizes = (images.size, count), (int(known.sum()), np.unique(images[known]).size)
    drawn = bootstrap(statistics, count, resamples=settings.resamples, seed=settings.seed, workers=settings.workers)
    numbers = []
    for statistic, draws in zip(statistics, drawn, strict=True):
        n, m = sizes[0] if isinstance(statistic, Means) else sizes[1]
        for name in draws.names:
            value, resampled = draws.of(name)
            method = METHODS.get(name, "percentile")
            low, high = interval(value, resampled, level=settings.level, method=method)
            if method == "basic":  # calibration errors, which are never outside
                low, high = np.clip((low, high), 0.0, 1.0).tolist()
            printed = records.kind.named(PRINTED.get(name, name)) + suffix
            numbers.append(Number(records.task, printed, value, low, high, n, m))
    return numbers


def _floor(records: TaskRecords, settings: Settings) -> list[Number]:
    keep = reported(records)
    confidence = records.confidence_by(settings.estimator)
    known = keep & ~np.isnan(confidence)
    if not known.any():
        return []
    size = int(known.sum()), int(np.unique(records.images[known]).size)
    numbers = []
    for name, equal_mass in (("ece", False), ("ace", True)):
        floor = metrics.ece_floor(confidence[known], equal_mass=equal_mass, seed=settings.seed)
        for part, value in zip(("floor", "floor_p95"), floor, strict=True):
            numbers.append(Number(records.task, f"{name}_{part}", value, math.nan, math.nan, *size))
    return numbers


def _beyond_held_out(run: Run, records: TaskRecords, settings: Settings) -> list[Number]:
    """What thresholds and calibrators from a run's held-out images do on the other images of some records."""
    source = _clean_twin(run, records)
    choosing = held_out(source, settings) & ~np.isnan(source.confidence_by(settings.estimator))
    keep = reported(records) & ~held_out(records, settings) & ~np.isnan(records.confidence_by(settings.estimator))
    # Of a single image there is no interval.
    if np.unique(records.images[keep]).size < 2 or not choosing.any():
        return []
    c, y = source.confidence_by(settings.estimator)[choosing], source.outcome[choosing]
    confidence, outcome = records.confidence_by(settings.estimator)[keep], records.outcome[keep]
    clusters = Clusters.of(records.images[keep])
    at_risk = {risk: metrics.threshold_at_risk(c, y, risk) for risk in RISKS}
    at_cost = {cost: metrics.threshold_at_cost(c, y, cost) for cost in COSTS}
    gains = _measured(records, [Gains(confidence, outcome, clusters, at_risk, at_cost)], keep, settings)
    if not 0.0 < y.mean() < 1.0:
        return gains
    fit = CALIBRATORS[settings.calibrator].fit
    fitted = fit(c, y, source.images[choosing].tolist(), split=f"{source.task}, held out")
    after = [Binned(fitted.apply(confidence, records.images[keep].tolist()), outcome, clusters)]
    suffix = f"_after_{settings.calibrator}"
    wanted = {name + suffix for name in CALIBRATED}
    return gains + [n for n in _measured(records, after, keep, settings, suffix) if n.metric in wanted]


def _clean_twin(run: Run, records: TaskRecords) -> TaskRecords:
    """A run's task on the same documents without shift; else that of the same name.

    Raises:
        ValueError: If the run has neither, or other documents under that name.
    """
    clean = records.place._replace(shift=None, severity=None, shifts=SHIFTED[0])
    same = run.tasks.get(records.task)
    if same is not None and same.place == clean:
        return _same_documents(records, same)
    twin = next((other for other in run.tasks.values() if other.place == clean), same)
    if twin is None:
        raise ValueError(f"expected task {records.task} or the same on clean images in {run.file}, got neither")
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


def _cell(place: Place) -> tuple[str, int]:
    return str(place.shift), int(place.severity or 0)
