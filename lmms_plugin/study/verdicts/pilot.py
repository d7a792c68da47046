"""Variances that a study is planned with: those of finished cells in its folder, else stated ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.metrics.power import expected_variance, measured_variance, seed_variance
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.file.task_images import ImageCounts
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.verdicts.arms import read_cells
from lmms_plugin.study.verdicts.decisions import (
    INTERACTION,
    UNDER_SHIFT,
    ArmComparison,
    ComparedCells,
    Groups,
    StageAnswers,
    answers_of,
    differences,
    differences_by_seed,
    right_answers,
)
from lmms_plugin.utils.messages import counted

VARIANCES: Mapping[str, float] = {UNDER_SHIFT: 0.12, INTERACTION: 0.16}
"""Question → variance of a document's difference without a pilot: 12 % of single answers differ; of differences of
differences, more. Means over tasks, methods and seeds vary less: on the demo (docs/zero_shot_vs_ptq.md) those of the
interaction at 4 and 3 bits have 0.02 to 0.11, with what images and seeds add."""
CORRELATION = 0.05
"""Correlation within an image without a pilot: a design effect of 1.3 for the seven expressions of one of RefCOCO+."""
SEED_DEVIATION = 0.002
"""Standard deviation of a difference between calibration seeds, without a pilot of several seeds. Seeds of one arm of
the demo differ by 0.2 to 0.9 points at 4 bits, as much as answers that flip by chance among 488 expressions explain."""
_LEAST = 10


class AssumedVariance(NamedTuple):
    """Variance that a comparison is planned with.

    Attributes:
        images: Variance of one image's contribution, as of `measured_variance`.
        seeds: Variance between calibration seeds; 0 where there are none.
        basis: Where it comes from, in words.
    """

    images: float
    seeds: float
    basis: str


def stated(asked: str, counts: ImageCounts, *, seeded: bool) -> AssumedVariance:
    """Return the variance of a comparison without a pilot.

    Args:
        asked: `UNDER_SHIFT` or `INTERACTION`.
        counts: Images of the data.
        seeded: Whether an arm depends on calibration seeds.
    """
    images = expected_variance(VARIANCES[asked], counts.sizes or counts.mean, CORRELATION)
    return AssumedVariance(images, SEED_DEVIATION**2 if seeded else 0.0, "stated, not measured")


def measured(
    study: Path, question: MethodByShift, comparisons: Mapping[ArmComparison, ComparedCells]
) -> dict[ArmComparison, AssumedVariance]:
    """Return the variances of those comparisons of which some cells of each arm are finished on the same images.

    Args:
        study: Folder of a study.
        question: Question of the study.
        comparisons: Comparison → cells that are planned for it.
    """
    if not study.is_dir():
        return {}
    tasks = (question.clean, *question.shifted)
    wanted = {axes for one in comparisons.values() for axes in one.all()}
    for ids in _on_the_same_images(StudyFolder(study), wanted, tasks):
        # A cell that is damaged or was moved away is no pilot; the run says what is wrong with it.
        with suppress(ValueError, OSError):
            answers = {cell.axes: answers_of(cell, tasks) for cell in read_cells(study, ids)}
            found = {one: _measured(one.asked, question, cells, answers) for one, cells in comparisons.items()}
            if told := {one: variance for one, variance in found.items() if variance is not None}:
                return told
    return {}


def _on_the_same_images(
    folder: StudyFolder, wanted: Collection[CellAxes], tasks: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return the finished cells that answered the same images, the largest set of cells first, one for each place."""
    found: dict[tuple[Any, Any], dict[CellAxes, tuple[str, str]]] = defaultdict(dict)
    for one in folder.finished():
        with suppress(FileNotFoundError):
            about = folder.about(folder.done_path(one))
            axes = CellAxes(**about["axes"])
            newest = str(folder.done(one).get("finished", "")), one
            if axes in wanted and set(tasks) <= set(about["tasks"]):
                cells = found[about.get("images"), about.get("limit")]
                cells[axes] = max(newest, cells.get(axes, newest))
    return sorted((tuple(one for _, one in cells.values()) for cells in found.values()), key=len, reverse=True)


def _measured(
    asked: str, question: MethodByShift, cells: ComparedCells, answers: Mapping[CellAxes, StageAnswers]
) -> AssumedVariance | None:
    first, second = (_there(arm, answers) for arm in (cells.first, cells.second))
    if not first or not second:
        return None
    sizes = answers[first[0][0]].sizes
    if sizes.size < _LEAST or any(answers[axes].sizes.size != sizes.size for arm in (*first, *second) for axes in arm):
        return None
    sums = differences(asked, right_answers(question, first, second, answers))
    between, basis = SEED_DEVIATION**2 if cells.seeds > 1 else 0.0, "seeds as stated"
    by_seed = differences_by_seed(asked, question, first, second, answers)
    if by_seed:
        between = sum(seed_variance(drawn, sizes) for drawn in by_seed)
        basis = counted(max(map(len, by_seed)), "seed")
    variance = measured_variance(sums, sizes)
    if not variance > 0.0:
        # Arms that never differed on so few images say nothing of how much they do.
        return None
    told = f"measured on {counted(int(sizes.sum()), 'document')} of {counted(sizes.size, 'image')}, {basis}"
    return AssumedVariance(variance, between, told)


def _there(arm: Groups, answers: Collection[CellAxes]) -> Groups:
    found = (tuple(axes for axes in group if axes in answers) for group in arm)
    return tuple(group for group in found if group)
