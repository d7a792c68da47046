"""Execution of a study in stages of ever more images, until every comparison of its question is decided.

A stage is a barrier: what runs next depends on the answers so far, never on timing. So the result is the same for any
number of cells at a time and on a cluster, and an interrupted study goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.asked import located
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.file.schema import Study
from lmms_plugin.study.file.task_images import documents_by_image
from lmms_plugin.study.run.execution import Finished, Work
from lmms_plugin.study.run.planning import Plan, checked_cells, plan
from lmms_plugin.study.verdicts import judging, sequential_verdict
from lmms_plugin.study.verdicts.boundaries import PLANNED, RULES
from lmms_plugin.study.verdicts.stages import ImageStages, follow
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.suggest import near
from lmms_plugin.utils.variables import IMAGES


def run(file: Path, work: Work, *, first: int | None = None, boundaries: str | None = None) -> Finished:
    """Run the cells of a study on ever more images until its comparisons are decided.

    Args:
        file: Study file; `images` in it are the most that are asked about.
        work: Where and how they are run; its watch makes a watcher for each stage.
        first: Number of images of the first stage; None for that of the stages that the folder has, or the default.
        boundaries: Name of the rule that settles comparisons; None likewise.

    Returns:
        The plan of all stages that were run, and what was decided; no conclusion while cells are missing.

    Raises:
        ValueError: The study cannot be decided in stages, an entry of the file is impossible, or the folder holds
            something else.
    """
    study, output = read(file), work.folder.path
    cells = checked_cells(study)
    question, documents = asked_about(study, cells)
    if boundaries not in (None, *RULES):
        raise ValueError(
            f"--boundaries: expected one of {', '.join(RULES)}, got {boundaries!r}{near(boundaries, RULES)}"
        )
    begun = ImageStages.read(output)
    if begun is not None and boundaries in (None, begun.boundaries):
        first, boundaries = first or begun.images[0], begun.boundaries
    schedule = ImageStages.of(documents, question.seed, first, boundaries or PLANNED)
    work.open(file)
    judging.withdraw(output)
    schedule.write(output)
    return _followed(study, work, question, cells, schedule)


def _followed(
    study: Study, work: Work, question: MethodByShift, cells: Sequence[Cell], schedule: ImageStages
) -> Finished:
    """Run stage after stage; the verdict is made if no cell is missing at the end."""
    output, plans = work.folder.path, list[Plan]()

    def obtain(of_stage: Sequence[Cell]) -> Collection[str] | None:
        work.run(plan(study, output, work.gpus, of_stage))
        plans.append(plan(study, output, work.gpus, of_stage))
        return [one.keyed.id for one in plans[-1].cells] if Finished(plans[-1], {}).complete else None

    decided = follow(output, question, cells, schedule, obtain)
    planned = tuple(one for stage in plans for one in stage.cells)
    ids = {one.keyed.id for one in planned}
    after = Plan(study, planned, tuple(one for one in plans[-1].others if one not in ids))
    finished = Finished(after, work.problems(after))
    if decided is None:
        return finished
    said = sequential_verdict.conclude(decided)
    judging.write(output, said)
    return finished._replace(conclusions=said)


def asked_about(study: Study, cells: Sequence[Cell]) -> tuple[MethodByShift, Mapping[str, int]]:
    """Return the question of a study, and the images with their documents that its stages may ask about.

    Raises:
        ValueError: The study cannot be decided in stages.
    """
    if os.environ.get(IMAGES):
        raise ValueError(f"--until-decided: expected {IMAGES} to be unset, got {os.environ[IMAGES]!r}")
    if study.asked is None:
        raise ValueError(f"{study.file}: expected an analysis for --until-decided, got none")
    if limited := [cell.limit for cell in cells if cell.limit is not None]:
        raise ValueError(f"{study.file}: expected no limit with --until-decided, got {limited[0]}: stages limit images")
    try:
        question = sequential_verdict.asked_of(study.asked.plain())
        documents = documents_by_image((question.clean, *question.shifted))
    except ValueError as error:
        raise located(error, study.asked) from error
    most = {ImageSlice.parse(cell.images).stop if cell.images else len(documents) for cell in cells}
    if len(most) > 1:
        raise ValueError(f"{study.file}: expected the same images in all cells, got {sorted(most)}")
    asked = ImageSlice(question.seed, 0, most.pop()).of(documents)
    return question, {image: count for image, count in documents.items() if image in asked}
