"""Accuracy of groups of cells under shift, resampled over images and calibration seeds at once.

An arm is a set of cells that answer a question together, for example AWQ and MBQ with synthetic calibration data. All
cells answer the same documents, so images are drawn once for all of them, and every difference is paired by image. The
result of a calibrated method also depends on the draw of its calibration samples, so seeds are resampled as well, the
same ones for all methods and bits that saw the same samples. Drawing n seeds with replacement shows (n − 1)/n of their
variance; deviations are stretched by √(n/(n − 1)) to correct for it (Rao & Wu 1988, JASA 83).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lmms_plugin.analysis.logs import LoggedRun, read_one
from lmms_plugin.analysis.records import REJECTION, TaskRecords, match
from lmms_plugin.analysis.study_files import CELLS, DONE
from lmms_plugin.metrics.bootstrap import RESAMPLES, ClusterParts, Clusters, Statistic, bootstrap
from lmms_plugin.metrics.calibration import Binned
from lmms_plugin.metrics.intervals import METHODS
from lmms_plugin.metrics.paired import Difference, flips, from_resamples
from lmms_plugin.metrics.sums import Means
from lmms_plugin.study.file.analyses import AXES
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.store.folder import StudyFolder

Floats = npt.NDArray[np.float64]
NUMBERS = ("accuracy", "mean_iou", "ece")
UNTOUCHED = "none"
"""Method of the cell with the unquantized model."""


@dataclass(frozen=True, eq=False)
class FinishedCell:
    """A finished cell.

    Attributes:
        name: Id of the cell.
        axes: Place in the study.
        run: Run as read from lmms-eval's output.
    """

    name: str
    axes: CellAxes
    run: LoggedRun


class _HasAxes(Protocol):
    @property
    def axes(self) -> Any:
        """Place of the cell in the study."""


Placed = TypeVar("Placed", bound=_HasAxes)


@dataclass(frozen=True)
class ResampledNumber:
    """A number and its values on every resample; sums and multiples stay paired.

    Attributes:
        value: Value on the data themselves.
        resampled: Values on the resamples, shape (resamples,).
        parts: What each image adds to it; None if not known.
    """

    value: float
    resampled: Floats = field(repr=False)
    parts: ClusterParts | None = field(default=None, repr=False)

    def __sub__(self, other: ResampledNumber) -> ResampledNumber:
        parts = None if self.parts is None or other.parts is None else self.parts - other.parts
        return ResampledNumber(self.value - other.value, self.resampled - other.resampled, parts)

    def __truediv__(self, other: ResampledNumber) -> ResampledNumber:
        """Return the ratio; NaN where the other number is 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return ResampledNumber(
                self.value / other.value if other.value else float("nan"),
                np.where(other.resampled == 0.0, np.nan, self.resampled / other.resampled),
                None if self.parts is None else self.parts.unlike,
            )

    def judged(self, *, level: float, margin: float | None, number: str = "accuracy") -> Difference:
        """Return the number as a difference from 0, with interval, p-value and, given a margin, equivalence."""
        method = METHODS.get(number, "percentile")
        return from_resamples(self.value, self.resampled, method, level, margin, parts=self.parts)


def mean(parts: Sequence[ResampledNumber]) -> ResampledNumber:
    """Average several numbers, resample by resample."""
    return ResampledNumber(
        float(np.mean([part.value for part in parts])),
        np.mean([part.resampled for part in parts], axis=0),
        ClusterParts.mean([part.parts for part in parts]),
    )


def folders(study: Path, only: Collection[str] | None = None) -> list[Path]:
    """Return the folders of a study's finished cells, sorted by name.

    Args:
        study: Folder of the study.
        only: Ids of the cells that count; None for all. A folder may also hold cells of an earlier version of a study.

    Raises:
        ValueError: There are none, or one that counts is not finished.
    """
    there = {file.parent.name: file.parent for file in (study / CELLS).glob(f"*/{DONE}")}
    wanted = sorted(there if only is None else only)
    if not wanted:
        raise ValueError(f"expected finished cells below {study / CELLS}, got none: run the study first")
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(f"expected the finished cell {missing[0]} below {study / CELLS}, got none")
    return [there[name] for name in wanted]


def read_cells(study: Path, only: Collection[str] | None = None) -> list[FinishedCell]:
    """Read the finished cells of a study, sorted by name; arguments as of `folders`.

    Raises:
        ValueError: There are none, one is unreadable, or two have the same place in the study.
    """
    found: list[FinishedCell] = []
    places: dict[CellAxes, str] = {}
    for folder in folders(study, only):
        given = StudyFolder.about(folder).get("axes", {})
        axes = CellAxes(**{name: given.get(name) for name in AXES})
        if axes in places:
            raise ValueError(
                f"expected one cell for each place of the study, got {places[axes]} and {folder.name}, which differ in"
                " what they ran (see their cell.json): name the study file, or remove one of them"
            )
        places[axes] = folder.name
        found.append(FinishedCell(folder.name, axes, read_one(folder)))
    return found


class ResampledCells:
    """Results of many cells on the same documents, resampled together.

    Args:
        cells: Cells.
        tasks: Tasks that all of them answered.
        estimator: Confidence estimator; None for the default of the kind of task.
        resamples: Number of resamples.
        seed: Seed of the resamples.
        workers: Number of threads.

    Raises:
        ValueError: A cell lacks a task, or answered other documents than the others.
    """

    def __init__(
        self,
        cells: Sequence[FinishedCell],
        tasks: Sequence[str],
        *,
        estimator: str | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
        workers: int = 1,
    ) -> None:
        self._seed, self._resamples = seed, resamples
        self._weights: dict[tuple[str | None, tuple[int | None, ...]], Floats] = {}
        first = {task: _records(cells[0], task) for task in tasks}
        for cell in cells[1:]:
            for task in tasks:
                match(first[task], _records(cell, task))
        names = np.unique(np.concatenate([r.images[r.reported] for r in first.values()]))
        self.images = int(names.size)
        self.documents = {task: int(records.reported.sum()) for task, records in first.items()}
        statistics: list[Statistic] = []
        places: list[tuple[str, str]] = []
        for cell in cells:
            for task in tasks:
                made = _statistics(_records(cell, task), names, estimator)
                statistics += made
                places += [(cell.name, task)] * len(made)
        drawn = bootstrap(statistics, self.images, resamples=resamples, seed=seed, workers=workers)
        self._numbers = {
            (*place, name): ResampledNumber(*draws.of(name), draws.parts_of(name))
            for place, draws in zip(places, drawn, strict=True)
            for name in draws.names
            if name in NUMBERS
        }

    def of(self, cell: FinishedCell, task: str, number: str = "accuracy") -> ResampledNumber:
        """Return a number of one cell on one task; NaN where the cell has no confidence."""
        missing = ResampledNumber(float("nan"), np.full(self._resamples, np.nan))
        return self._numbers.get((cell.name, task, number), missing)

    def over(self, cells: Sequence[FinishedCell], tasks: Sequence[str], number: str = "accuracy") -> ResampledNumber:
        """Average over tasks, then seeds, then all other axes that distinguish the cells."""
        return mean([mean([self._over_seeds(seeds, task, number) for task in tasks]) for seeds in by_seed(cells)])

    def _over_seeds(self, cells: Sequence[FinishedCell], task: str, number: str) -> ResampledNumber:
        drawn = [self.of(cell, task, number) for cell in cells]
        weights = self._seed_weights(cells[0].axes.calibration, tuple(cell.axes.seed for cell in cells))
        resampled = np.einsum("sr,sr->r", weights, np.stack([one.resampled for one in drawn]))
        return ResampledNumber(
            float(np.mean([one.value for one in drawn])), resampled, ClusterParts.mean([one.parts for one in drawn])
        )

    def _seed_weights(self, calibration: str | None, seeds: tuple[int | None, ...]) -> Floats:
        """Return the weight of each seed on each resample, shape (seeds, resamples); sums to 1 over seeds."""
        key = calibration, seeds
        if key not in self._weights:
            n = len(seeds)
            drawn = np.full((n, self._resamples), 1.0)
            if n > 1:
                rng = np.random.default_rng([self._seed, *f"{calibration}".encode()])
                drawn = rng.multinomial(n, np.full(n, 1 / n), size=self._resamples).T.astype(np.float64)
                drawn = 1.0 + np.sqrt(n / (n - 1)) * (drawn - 1.0)
            self._weights[key] = drawn / n
        return self._weights[key]


def by_seed(cells: Sequence[Placed]) -> list[list[Placed]]:
    """Group cells that differ only in their seed."""
    groups: dict[CellAxes, list[Placed]] = defaultdict(list)
    for cell in cells:
        groups[replace(cell.axes, seed=None)].append(cell)
    return [sorted(group, key=lambda cell: cell.axes.seed or 0) for group in groups.values()]


def flipped(cells: Sequence[FinishedCell], reference: FinishedCell, tasks: Sequence[str]) -> tuple[float, float] | None:
    """Return answers lost and won against the reference as shares of all documents, mean over cells and tasks.

    None for tasks without right and wrong answers.
    """
    shares = []
    for task in tasks:
        base = _records(reference, task)
        if base.kind.right is None:
            return None
        keep = base.reported
        for cell in cells:
            shares.append(np.array(flips(base.outcome[keep], _records(cell, task).outcome[keep])) / keep.sum())
    lost, won = np.mean(shares, axis=0)
    return float(lost), float(won)


def parse_rate(cells: Sequence[FinishedCell], tasks: Sequence[str]) -> float:
    """Return the share of answers that hold a box, mean over cells and tasks."""
    records = [_records(cell, task) for cell in cells for task in tasks]
    return float(np.mean([r.parsed[r.reported].mean() for r in records]))


def one_reference(cells: Sequence[Placed]) -> Placed:
    """Return the cell with the unquantized model.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = select(cells, {"method": UNTOUCHED})
    if len(found) != 1:
        raise ValueError(
            f"expected one cell with the unquantized model (method {UNTOUCHED}) for {cells[0].axes.model}, got"
            f" {len(found)}"
        )
    return found[0]


def expect_places(cells: Sequence[Placed]) -> None:
    """Refuse several cells at one place of the study, such as task lists for separate processes.

    Raises:
        ValueError: Two cells have one place; names it.
    """
    (axes, count), *_ = Counter(cell.axes for cell in cells).most_common(1)
    if count > 1:
        raise ValueError(f"analysis: expected one cell that answers all tasks for each place, got {count} of {axes}")


def select(cells: Sequence[Placed], wanted: Mapping[str, Any]) -> list[Placed]:
    """Return the cells that have one of the wanted values on each axis."""
    return [cell for cell in cells if all(_is_in(getattr(cell.axes, axis), values) for axis, values in wanted.items())]


def _is_in(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list | tuple) else value == wanted


def _records(cell: FinishedCell, task: str) -> TaskRecords:
    if task not in cell.run.tasks:
        answered = ", ".join(sorted(cell.run.tasks)) or "none of ours"
        raise ValueError(f"expected task {task} in cell {cell.name}, got {answered}")
    return cell.run.tasks[task]


def _statistics(records: TaskRecords, names: npt.NDArray[np.str_], estimator: str | None) -> list[Statistic]:
    if records.kind is REJECTION:
        raise ValueError(f"expected a task with right and wrong answers, got {records.task}, which is about rejection")
    keep = records.reported
    clusters = Clusters(np.searchsorted(names, records.images[keep]), names.size)
    confidence, outcome = records.confidence_by(estimator)[keep], records.outcome[keep]
    made: list[Statistic] = [Means({"accuracy": outcome, "mean_iou": records.score[keep]}, clusters)]
    known = ~np.isnan(confidence)
    if known.any():
        made.append(Binned(confidence[known], outcome[known], Clusters(clusters.index[known], clusters.count)))
    return made
