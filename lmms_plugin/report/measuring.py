"""The numbers of one run: per task, and as means over clean and shifted tasks, with resamples over images.

Images are drawn once for all tasks of a dataset, and alike for all runs on it, so that a mean over shifts and the
difference of two runs have paired intervals (as in `lmms_plugin.analysis.comparison`).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lmms_plugin import metrics
from lmms_plugin.analysis.reliability import Settings
from lmms_plugin.analysis.results import HELD_OUT, SHIFTED, Place
from lmms_plugin.metrics.bins import DEFAULT_BINS, equal_width_index
from lmms_plugin.metrics.bootstrap import Clusters, Interval, Statistic, interval
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.intervals import METHODS
from lmms_plugin.metrics.selective import Gains
from lmms_plugin.metrics.sums import Means
from lmms_plugin.report.columns import Answers, Bools, Floats
from lmms_plugin.report.resampling import COSTS, SELECTIVE, Counts, Selective, draws, evaluate
from lmms_plugin.utils.chance import uniform

METRICS = (
    *("accuracy", "mean_iou", "parse_rate", "confidence_rate", "ece", "brier"),
    *SELECTIVE,
    *(f"phi@{cost:g}" for cost in COSTS),
)
"""What is measured of every task; NaN where it is undefined."""
CLEAN = "clean"
GRID = np.arange(1, 101) / 100
"""Coverages at which curves of risk by coverage are kept."""


class Family(NamedTuple):
    """Tasks on the same documents, shifted or not.

    Attributes:
        dataset: As the tasks name it.
        split: Its split.
        record: Kind of record.
        clean: Name of the task without shift, where the split has several on different documents; else "".
    """

    dataset: str
    split: str
    record: str
    clean: str = ""


@dataclass(frozen=True, eq=False)
class Task:
    """One task of one run.

    Attributes:
        task: Name of the task.
        family: What it belongs to.
        place: What it asks about.
        documents: Fingerprint of its documents.
        records: How many records results are of.
        images: Of how many images.
        unparsed: Answers without a box.
        unsure: Answers without a confidence.
        value: Shape (metrics,).
        low: Lower ends of the intervals, shape (metrics,); NaN where there is none.
        high: Upper ends.
        bins: Records, mean confidence and mean outcome per equal-width bin, shape (3, bins); mean 0 in empty bins.
        risk: Risk at each coverage of `GRID`; NaN without confidences.
        score: Of every reported record, in the order of their ids, shape (records,).
        outcome: Their outcomes.
    """

    task: str
    family: Family
    place: Place
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
class Group:
    """A mean over tasks.

    Attributes:
        tasks: Their names.
        drawn: Fingerprint of the images that were drawn: resamples of groups with the same are paired.
        records: Records of all tasks.
        images: How many images.
        value: Shape (metrics,).
        resampled: Shape (resamples, metrics).
    """

    tasks: tuple[str, ...]
    drawn: str
    records: int
    images: int
    value: Floats
    resampled: npt.NDArray[np.float32]

    def interval(self, metric: str, level: float) -> Interval:
        """Interval of one metric."""
        return between(metric, float(self.value[METRICS.index(metric)]), self.column(metric), level)

    def column(self, metric: str) -> Floats:
        """Resamples of one metric, shape (resamples,)."""
        return self.resampled[:, METRICS.index(metric)].astype(np.float64)

    def of(self, metric: str) -> float:
        """One metric."""
        return float(self.value[METRICS.index(metric)])


class Measured(NamedTuple):
    """All numbers of a run.

    Attributes:
        tasks: By name.
        groups: By family and condition: `clean`, what is shifted, or `what is shifted, severity`.
        documents: Fingerprint → ids of the reported records, in their order.
    """

    tasks: dict[str, Task]
    groups: dict[tuple[Family, str], Group]
    documents: dict[str, pa.Array]


def family(place: Place, record: str) -> Family:
    """What a task belongs to; local copies of a dataset go by their last folder."""
    path = place.dataset.replace("\\", "/")
    return Family(path.rstrip("/").rsplit("/", 1)[-1] if path.startswith(("/", ".")) else path, place.split, record)


def between(metric: str, value: float, resampled: Floats, level: float) -> Interval:
    """An interval as `lmms-plugin metrics` makes it."""
    method = METHODS.get(metric, "percentile")
    low, high = interval(value, resampled, level=level, method=method)
    if method == "basic":
        # Calibration errors are never outside.
        low, high = np.clip((low, high), 0.0, 1.0).tolist()
    return Interval(low, high)


def measure(answers: Iterable[Answers], settings: Settings) -> Measured:
    """Measure all tasks of a run."""
    found = Measured({}, {}, {})
    families: dict[Family, list[Answers]] = {}
    for one in answers:
        families.setdefault(family(one.place, one.kind.record), []).append(one)
    for key, members in families.items():
        for clean, same in _on_the_same_documents(members).items():
            _family(key._replace(clean=clean), same, settings, found)
    return found


def _on_the_same_documents(members: Sequence[Answers]) -> dict[str, list[Answers]]:
    """Tasks by the name of the task without shift that they belong to, "" if there is but one."""
    clean = {one.documents: one for one in members if one.place.shift is None}
    if len(clean) < 2:
        return {"": list(members)}
    parted: dict[str, list[Answers]] = {one.task: [] for one in clean.values()}
    for one in members:
        # Language shifts leave documents out: theirs is the task with the most of their images.
        shared = {other.task: pc.sum(pc.is_in(one.names, other.names)).as_py() for other in clean.values()}
        own = clean[one.documents].task if one.documents in clean else max(shared, key=lambda task: shared[task])
        parted[own].append(one)
    return parted


def _family(key: Family, members: Sequence[Answers], settings: Settings, found: Measured) -> None:
    names, places = _universe(members)
    counts = draws(len(names), settings.resamples, settings.seed) if len(names) > 1 else None
    drawn = hashlib.blake2b("\n".join(names.to_pylist()).encode(), digest_size=16).hexdigest()
    clean = next((one for one in members if one.place.shift is None), None)
    values: dict[str, Floats] = {}
    for one in members:
        keep = one.reported
        numbers = _numbers(one, keep, places[one.task], clean or one, counts, settings, len(names))
        values[one.task] = numbers
        found.tasks[one.task] = _task(key, one, keep, numbers, settings)
        if one.documents not in found.documents:
            found.documents[one.documents] = one.ids.filter(pa.array(keep))
    # In one order, whatever order they were run in: runs are compared by their tasks.
    for condition, chosen in _conditions(sorted(members, key=lambda one: one.task)).items():
        several = np.stack([values[one.task] for one in chosen])
        mean = several.mean(axis=0)
        tasks = [found.tasks[one.task] for one in chosen]
        found.groups[key, condition] = Group(
            tuple(one.task for one in chosen),
            drawn,
            sum(task.records for task in tasks),
            max(task.images for task in tasks),
            mean[0],
            mean[1:].astype(np.float32),
        )


def _conditions(members: Sequence[Answers]) -> dict[str, list[Answers]]:
    """Which tasks a mean is taken over, by condition."""
    chosen: dict[str, list[Answers]] = {}
    for one in members:
        if one.place.shift is None:
            chosen.setdefault(CLEAN, []).append(one)
            continue
        which = "shifted" if one.place.shifts == SHIFTED[0] else f"shifted {one.place.shifts}"
        chosen.setdefault(which, []).append(one)
        chosen.setdefault(f"{which}, severity {one.place.severity}", []).append(one)
    return chosen


def _universe(members: Sequence[Answers]) -> tuple[pa.Array, dict[str, npt.NDArray[np.int32]]]:
    """Names of all images that count, sorted, and the place of each record's image among them."""
    first = members[0].names
    if all(one.names.equals(first) for one in members):
        return first, {one.task: one.images for one in members}
    names = pc.unique(pa.concat_arrays([one.names for one in members]))
    names = names.take(pc.sort_indices(names))
    places = {one.task: pc.index_in(one.names, names).to_numpy()[one.images] for one in members}
    return names, places


def _numbers(
    one: Answers,
    keep: Bools,
    places: npt.NDArray[np.int32],
    clean: Answers,
    counts: Counts | None,
    settings: Settings,
    images: int,
) -> Floats:
    """Values on the data and on every resample, shape (1 + resamples, metrics)."""
    rows = np.ones((1, images), np.uint16) if counts is None else counts
    found = {name: np.full(len(rows), np.nan) for name in METRICS}
    known = ~np.isnan(one.confidence)
    outcome, score = one.outcome, one.score
    columns = {"accuracy": outcome[keep], "confidence_rate": known[keep].astype(np.float64)}
    if one.kind.right is not None:
        columns |= {"mean_iou": score[keep], "parse_rate": one.parsed[keep].astype(np.float64)}
    statistics: list[Statistic] = [Means(columns, Clusters(places[keep].astype(np.intp), images))]
    inside = keep & known
    if inside.any():
        arrays = one.confidence[inside], outcome[inside], Clusters(places[inside].astype(np.intp), images)
        statistics += [Binned(*arrays), Selective(*arrays), *_gains(one, inside, places, clean, settings, images)]
    for statistic, values in zip(statistics, evaluate(statistics, rows), strict=True):
        found |= {name: values[:, k] for k, name in enumerate(statistic.names) if name in found}
    return np.stack([found[name] for name in METRICS], axis=1)


def _gains(
    one: Answers, inside: Bools, places: npt.NDArray[np.int32], clean: Answers, settings: Settings, images: int
) -> list[Statistic]:
    """Effective reliability on the other images, at thresholds chosen on held-out clean ones."""
    choosing = _held_out(clean, settings) & ~np.isnan(clean.confidence)
    rest = inside & ~_held_out(one, settings)
    if not choosing.any() or np.unique(one.images[rest]).size < 2:
        return []
    c, y = clean.confidence[choosing], clean.outcome[choosing]
    thresholds = {float(cost): metrics.threshold_at_cost(c, y, cost) for cost in COSTS}
    clusters = Clusters(places[rest].astype(np.intp), images)
    return [Gains(one.confidence[rest], one.outcome[rest], clusters, {}, thresholds)]


def _held_out(one: Answers, settings: Settings) -> Bools:
    """As `lmms_plugin.analysis.reliability.held_out`."""
    if np.any(one.parts != ""):
        return np.equal(one.parts, HELD_OUT)
    return _held_out_images(tuple(one.names.to_pylist()), settings.seed, settings.held_out)[one.images]


@lru_cache(maxsize=8)
def _held_out_images(names: tuple[str, ...], seed: int, share: float) -> Bools:
    return np.array([uniform(f"{seed}:{name}") < share for name in names])


def _task(key: Family, one: Answers, keep: Bools, numbers: Floats, settings: Settings) -> Task:
    confidence, outcome = one.confidence[keep], one.outcome[keep]
    known = ~np.isnan(confidence)
    c, y = confidence[known], outcome[known]
    intervals = [between(name, numbers[0, k], numbers[1:, k], settings.level) for k, name in enumerate(METRICS)]
    low, high = np.array(intervals).T
    return Task(
        one.task,
        key,
        one.place,
        one.documents,
        int(keep.sum()),
        int(np.unique(one.images[keep]).size),
        int((~one.parsed[keep]).sum()),
        int((~known).sum()),
        numbers[0],
        low,
        high,
        _bins(c, y),
        _risk(c, y),
        one.score[keep].astype(np.float32),
        outcome.astype(np.float32),
    )


def _bins(confidence: Floats, outcome: Floats) -> Floats:
    index = equal_width_index(confidence, DEFAULT_BINS)
    records = np.bincount(index, minlength=DEFAULT_BINS).astype(np.float64)
    sums = [np.bincount(index, weights=values, minlength=DEFAULT_BINS) for values in (confidence, outcome)]
    return np.stack([records, *(total / np.maximum(records, 1) for total in sums)])


def _risk(confidence: Floats, outcome: Floats) -> Floats:
    """Risk at each coverage of `GRID`: of the fewest most confident records that reach it."""
    if not confidence.size:
        return np.full(GRID.size, np.nan)
    curve = metrics.risk_coverage(confidence, outcome)
    risk: Floats = curve.risk[np.searchsorted(curve.coverage, GRID - 1e-12).clip(max=curve.risk.size - 1)]
    return risk


def mean_bins(tasks: Sequence[Task]) -> Floats:
    """Bins of several tasks or runs together, shape (3, bins)."""
    records = np.sum([task.bins[0] for task in tasks], axis=0)
    sums = [np.sum([task.bins[0] * task.bins[k] for task in tasks], axis=0) for k in (1, 2)]
    return np.stack([records, *(total / np.maximum(records, 1) for total in sums)])
