"""Design of a study that compares every cell with the unquantized model: what its images will show, task by task.

Means of documents, such as accuracy, have a stated variance. What a change of any other metric varies by is told by
finished cells alone: the width of its bootstrap interval, times images. Every test is planned at the level that Holm's
first step asks for, as in `lmms_plugin.study.run.design`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import norm

from lmms_plugin.analysis import comparison
from lmms_plugin.metrics.power import POWER, expected_variance, power_of_equivalence, smallest_difference
from lmms_plugin.study.file import analyses
from lmms_plugin.study.file.analyses import AgainstReference
from lmms_plugin.study.file.task_images import image_counts
from lmms_plugin.study.file.tasks import known
from lmms_plugin.study.run.planning import Plan, PlannedCell
from lmms_plugin.study.verdicts import pilot
from lmms_plugin.study.verdicts.arms import UNTOUCHED, FinishedCell, read_cells, select
from lmms_plugin.study.verdicts.decisions import UNDER_SHIFT
from lmms_plugin.study.verdicts.pilot import AssumedVariance
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.messages import counted

MEANS = ("acc@0.5", "acc@0.75", "acc@0.9", "accuracy")
"""Metrics that are means of documents' zeros and ones."""


class PlannedChange(NamedTuple):
    """What a study shows of one metric of one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        images: Number of images; None if they were not counted.
        documents: Number of documents; None if they were not counted.
        variance: Variance that it is planned with; None without a pilot, where none is stated.
        smallest: Smallest change that is found with a probability of `POWER`; None if unknown.
        equivalent: Probability that no change is shown to lie within the margin; None if unknown, or without margin.
    """

    task: str
    metric: str
    images: int | None
    documents: int | None
    variance: AssumedVariance | None
    smallest: float | None
    equivalent: float | None


@dataclass(frozen=True)
class ReferenceDesign:
    """What a study of kind `against_reference` shows.

    Attributes:
        question: Question of the study.
        tests: Largest number of tests of a metric, among which the error is divided.
        shown: What every metric of every task shows.
    """

    question: AgainstReference
    tests: int
    shown: tuple[PlannedChange, ...]

    @property
    def level(self) -> float:
        """Level of one test, so that all of a metric together have that of the study."""
        return _level(self.question, self.tests)

    def largest(self, metric: str) -> float | None:
        """Return the smallest change of a metric that is found on every task whose own is known."""
        return max((one.smallest for one in self.shown if one.metric == metric and one.smallest), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the design as `study plan --json` prints it."""
        return {
            "power": POWER,
            "level_of_a_test": self.level,
            "changes": [
                {
                    "task": one.task,
                    "metric": one.metric,
                    "images": one.images,
                    "documents": one.documents,
                    "smallest_difference": one.smallest,
                    "power_of_equivalence": one.equivalent,
                    "variance_of_an_image": one.variance and one.variance.images,
                    "variances": one.variance and one.variance.basis,
                }
                for one in self.shown
            ],
        }


class AskedImages(NamedTuple):
    """Images of a task that a study asks about.

    Attributes:
        images: Number of images.
        documents: Number of their documents.
        sizes: Documents of each image, or their mean, as `expected_variance` takes them; empty where they are measured.
    """

    images: int
    documents: int
    sizes: Sequence[int] | float


def designed(found: Plan, folder: Path | None = None) -> ReferenceDesign:
    """Return the design of a planned study whose analysis is of kind `against_reference`.

    Args:
        found: Plan of all of its cells.
        folder: Folder whose finished cells tell variances; None to take the stated one.

    Raises:
        ValueError: The analysis is of another kind, or no cell is compared with the unquantized model.
    """
    question = None if found.study.analysis is None else analyses.question(found.study.analysis)
    if not isinstance(question, AgainstReference):
        raise ValueError(f"{found.study.file}: expected an analysis of kind against_reference")
    metrics = _metrics(found.cells, question)
    tests = max(
        _compared(found.cells, model) * max(sum(name in own for own in metrics.values()) for name in question.metrics)
        for model in {one.keyed.cell.axes.model for one in found.cells}
    )
    if not tests:
        raise ValueError(f"{found.study.file}: expected cells beside the unquantized model, got none")
    level = _level(question, tests)
    done = [one.keyed.id for one in found.cells if one.state == "done"]
    pilots = measured(folder, done, question) if folder is not None and len(done) > 1 else {}
    shown = []
    for task, own in metrics.items():
        images = _images(task, found.cells)
        for name in own:
            known_images, variance = pilots.get((task, name), (images, _stated(name, images)))
            shown.append(_change(task, name, known_images, variance, question, level))
    return ReferenceDesign(question, tests, tuple(shown))


def _level(question: AgainstReference, tests: int) -> float:
    return 1.0 - (1.0 - question.level) / tests


def _metrics(cells: Sequence[PlannedCell], question: AgainstReference) -> dict[str, tuple[str, ...]]:
    """Return the metrics of every task that are asked about."""
    names = sorted({name for one in cells for name in one.keyed.cell.tasks})
    described = {task: own for one in known(names).values() for task, own in one.metrics.items()}
    asked = {task: own for task, own in described.items() if not question.tasks or task in question.tasks}
    found = {task: tuple(name for name in question.metrics if name in own) for task, own in asked.items()}
    return {task: own for task, own in found.items() if own}


def _compared(cells: Sequence[PlannedCell], model: str) -> int:
    own = [one.keyed.cell for one in cells if one.keyed.cell.axes.model == model]
    return len(own) - 1


def _images(task: str, cells: Sequence[PlannedCell]) -> AskedImages | None:
    """Return the images that cells ask about; None where a task's cannot be counted.

    A limit takes the first documents, which are sorted by image.
    """
    limit, part = next((one.keyed.cell.limit, one.keyed.cell.images) for one in cells)
    try:
        counts = image_counts([task])
    except ValueError:
        return None
    images = counts.images if part is None else min(ImageSlice.parse(part).stop, counts.images)
    documents = counts.documents_of(images)
    if limit is not None and limit < documents:
        images, documents = math.ceil(limit / counts.mean), limit
    return AskedImages(images, documents, counts.sizes or counts.mean)


def _stated(metric: str, images: AskedImages | None) -> AssumedVariance | None:
    if images is None or metric not in MEANS:
        return None
    variance = expected_variance(pilot.VARIANCES[UNDER_SHIFT], images.sizes, pilot.CORRELATION)
    return AssumedVariance(variance, 0.0, "stated, not measured")


def _change(
    task: str,
    metric: str,
    images: AskedImages | None,
    variance: AssumedVariance | None,
    question: AgainstReference,
    level: float,
) -> PlannedChange:
    if images is None or variance is None or images.images < 2:
        counted_images, documents = (None, None) if images is None else (images.images, images.documents)
        return PlannedChange(task, metric, counted_images, documents, variance, None, None)
    error = math.sqrt(variance.images / images.images)
    smallest = smallest_difference(error, level=level, images=images.images)
    equal = None
    if question.margin is not None:
        # As in the analysis, tests of equality are not adjusted.
        equal = power_of_equivalence(question.margin, error, level=question.level, images=images.images)
    return PlannedChange(task, metric, images.images, images.documents, variance, smallest, equal)


def measured(
    study: Path, ids: Collection[str], question: AgainstReference
) -> dict[tuple[str, str], tuple[AskedImages, AssumedVariance]]:
    """Return images and the largest variance of every task and metric of which finished cells tell one.

    Args:
        study: Folder of a study.
        ids: Ids of finished cells.
        question: Question of the study.
    """
    found: dict[tuple[str, str], tuple[AskedImages, AssumedVariance]] = {}
    for change in _changes(read_cells(study, ids), question):
        # An interval without ends, or without width, says nothing of how much a change varies.
        width = change.difference.high - change.difference.low
        if change.metric not in question.metrics or not width > 0.0:
            continue
        error = width / 2.0 / float(norm.ppf((1.0 + question.level) / 2.0))
        variance, size = error**2 * change.images, AskedImages(change.images, change.records, ())
        before = found.get((change.task, change.metric))
        if before is None or before[1].images < variance:
            told = f"measured on {counted(change.records, 'document')} of {counted(change.images, 'image')}"
            found[change.task, change.metric] = size, AssumedVariance(variance, 0.0, told)
    return found


def _changes(cells: Sequence[FinishedCell], question: AgainstReference) -> Iterator[comparison.Change]:
    for model in {cell.axes.model for cell in cells}:
        own = select(cells, {"model": model})
        for reference in select(own, {"method": UNTOUCHED}):
            for cell in own:
                # Cells that cannot be compared are no pilot; the analysis says what is wrong with them.
                with suppress(ValueError):
                    if cell is not reference:
                        yield from comparison.compare(reference.run, cell.run, question.settings(1)).changes
