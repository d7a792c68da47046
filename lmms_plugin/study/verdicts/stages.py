"""Stages of a study that stops when it knows: which images are asked about next, and of which cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lmms_plugin.analysis.study_files import STAGES, StagesAccount
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.grid import Cell, CellAxes
from lmms_plugin.study.verdicts.arms import FinishedCell, Placed, read_cells
from lmms_plugin.study.verdicts.boundaries import ANY_TIME, PLANNED, AnyTime, Planned, StoppingRule
from lmms_plugin.study.verdicts.decisions import Decisions, StageAnswers, answers_of
from lmms_plugin.utils import image_slices
from lmms_plugin.utils.files import write_json
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.reading import accounts

FIRST = 30
"""Images of the first stage at least, unless another number is asked for."""


def first_stage(images: int, boundaries: str = PLANNED) -> int:
    """Return the images of the first stage, unless another number is asked for.

    Before a quarter of them planned tests decide hardly anything, and every stage loads every model.

    Args:
        images: Number of all images.
        boundaries: Name of the rule that settles comparisons.
    """
    return FIRST if boundaries == ANY_TIME else max(FIRST, math.ceil(images / 4))


class ImageStages(NamedTuple):
    """Stages of a study.

    Attributes:
        seed: Seed of the order of the images.
        images: Number of images after each stage; all images after the last one.
        documents: Number of their documents after each stage.
        largest: Largest number of documents of an image in the whole dataset.
        boundaries: Name of the rule that settles comparisons, one of `boundaries.RULES`.
    """

    seed: int
    images: tuple[int, ...]
    documents: tuple[int, ...]
    largest: int
    boundaries: str = PLANNED

    @classmethod
    def of(
        cls, documents: Mapping[str, int], seed: int, first: int | None = None, boundaries: str = PLANNED
    ) -> ImageStages:
        """Return the stages of a dataset.

        Args:
            documents: Image → number of documents.
            seed: Seed of the order of the images.
            first: Number of images of the first stage; None for that of `first_stage`.
            boundaries: Name of the rule that settles comparisons.
        """
        ends = image_slices.stages(len(documents), first or first_stage(len(documents), boundaries))
        asked = [sum(documents[image] for image in ImageSlice(seed, 0, end).of(documents)) for end in ends]
        return cls(seed, ends, tuple(asked), max(documents.values()), boundaries)

    @classmethod
    def read(cls, study: Path) -> ImageStages | None:
        """Read the stages of a study's folder; None where a study was run on all images at once.

        Raises:
            ValueError: The file is damaged.
        """
        file = study / STAGES
        if not file.exists():
            return None
        told = accounts.read(file, StagesAccount)
        return cls(told["seed"], tuple(told["images"]), tuple(told["documents"]), told["largest"], told["boundaries"])

    def write(self, study: Path) -> None:
        """Write the stages into a study's folder."""
        write_json(study / STAGES, self._asdict())

    def rule(self, question: MethodByShift, comparisons: int) -> StoppingRule:
        """Return the rule that settles the comparisons of a question."""
        if self.boundaries == ANY_TIME:
            return AnyTime(question.level, question.margin, comparisons, self.largest)
        return Planned(question.level, question.margin, self.images)

    def slices(self) -> list[ImageSlice]:
        """Return the images of each stage."""
        return [ImageSlice(self.seed, start, stop) for start, stop in zip((0, *self.images), self.images, strict=False)]


class Decided(NamedTuple):
    """A study after some stages.

    Attributes:
        decisions: Comparisons and what is known of them.
        schedule: Its stages.
        stages: Number of stages that were needed.
        asked: Number of documents that all cells answered together, each task counted.
    """

    decisions: Decisions
    schedule: ImageStages
    stages: int
    asked: int


def follow(
    study: Path,
    question: MethodByShift,
    cells: Sequence[Cell],
    schedule: ImageStages,
    obtain: Callable[[Sequence[Cell]], Collection[str] | None],
) -> Decided | None:
    """Go through the stages of a study's folder until every comparison is settled or no image is left.

    Args:
        study: Folder of the study.
        question: Question of the study.
        cells: All cells of the study.
        schedule: Its stages.
        obtain: Function of the cells of a stage that returns the ids of the finished ones; None if some are missing.

    Returns:
        What is known at the end; None if `obtain` returned None.

    Raises:
        ValueError: A cell is damaged, or answered other documents than its stage.
    """
    tasks = (question.clean, *question.shifted)

    def answered(part: ImageSlice, documents: int, needed: Collection[CellAxes]) -> dict[CellAxes, StageAnswers] | None:
        ids = obtain([replace(cell, images=str(part), tasks=tasks) for cell in cells if cell.axes in needed])
        return None if ids is None else _answers(read_cells(study, ids), tasks, part, documents)

    return decide(question, cells, schedule, answered)


def decide(
    question: MethodByShift,
    cells: Sequence[Placed],
    schedule: ImageStages,
    answered: Callable[[ImageSlice, int, Collection[CellAxes]], Mapping[CellAxes, StageAnswers] | None],
) -> Decided | None:
    """Go through stages until every comparison is settled or no image is left.

    Which cells a stage needs depends on answers to the stages before alone, not on when or where they were given.

    Args:
        question: Question of the study.
        cells: All of its cells.
        schedule: Its stages.
        answered: Function of the images of a stage, the number of their documents and the needed cells that returns
            the cells' answers; None if some are missing.

    Returns:
        What is known at the end; None if answers were missing.
    """
    decisions = Decisions.of(question, cells, schedule.rule)
    before = asked = stages = 0
    for part, until in zip(schedule.slices(), schedule.documents, strict=True):
        needed = decisions.needed()
        if not needed:
            break
        answers = answered(part, until - before, needed)
        if answers is None:
            return None
        decisions.add(answers)
        asked += len(needed) * (1 + len(question.shifted)) * (until - before)
        before, stages = until, stages + 1
    return Decided(decisions, schedule, stages, asked)


def _answers(
    cells: Sequence[FinishedCell], tasks: Sequence[str], part: ImageSlice, documents: int
) -> dict[CellAxes, StageAnswers]:
    """Return the answers of a stage, checked to be about the same images."""
    found = {cell.axes: answers_of(cell, tasks) for cell in cells}
    first = cells[0].run.tasks[tasks[0]]
    for cell in cells:
        records = cell.run.tasks[tasks[0]]
        sizes = found[cell.axes].sizes
        if sizes.size != part.stop - part.start or int(sizes.sum()) != documents:
            expected = f"{documents} documents of {part.stop - part.start} images"
            raise ValueError(
                f"expected {expected} in {cell.name}, got {int(sizes.sum())} of {sizes.size}: has the dataset changed?"
            )
        if records.documents != first.documents:
            raise ValueError(f"expected the same documents in all cells of a stage, got others in {cell.name}")
    return found
