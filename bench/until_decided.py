"""How many answers would `study run --until-decided` have asked for in a study that was run on all images?

    python -m bench.until_decided studies/zero_shot_vs_ptq.yaml FOLDER [--first-images N] [--boundaries any-time]

FOLDER holds the study, run whole. An answer to a question is the same whenever it is given, so the stages are followed
on the answers that are there: each stage takes those of its images, of the cells that comparisons still need. Nothing
is run. Printed are each comparison's finding on all images beside the sequential one, and the documents it rests on.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.reporting import markdown
from lmms_plugin.analysis.findings import finding
from lmms_plugin.study.file.analyses import MethodByShift
from lmms_plugin.study.file.grid import CellAxes
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.run.planning import checked_cells
from lmms_plugin.study.run.until_decided import asked_about
from lmms_plugin.study.verdicts import contrasts
from lmms_plugin.study.verdicts.arms import FinishedCell, read_cells
from lmms_plugin.study.verdicts.boundaries import PLANNED, RULES
from lmms_plugin.study.verdicts.decisions import (
    INTERACTION,
    UNDER_SHIFT,
    ArmComparison,
    StageAnswers,
    answers_of,
)
from lmms_plugin.study.verdicts.sequential_verdict import conclude
from lmms_plugin.study.verdicts.stages import Decided, ImageStages, decide
from lmms_plugin.study.verdicts.verdict import NOT_JUDGED
from lmms_plugin.utils.image_slices import ImageSlice


def decided(file: Path, folder: Path, first: int | None, boundaries: str) -> Decided:
    """Follow the stages of a study on the answers of a finished run.

    Args:
        file: Study file.
        folder: Folder of the study, run on all images.
        first: Number of images of the first stage; None for the default.
        boundaries: Name of the rule that settles comparisons.
    """
    study = read(file)
    question, documents = asked_about(study, checked_cells(study))
    return followed(read_cells(folder), question, documents, first, boundaries)


def followed(
    cells: Sequence[FinishedCell],
    question: MethodByShift,
    documents: Mapping[str, int],
    first: int | None,
    boundaries: str,
) -> Decided:
    """Follow the stages on the answers of finished cells.

    Args:
        cells: Cells that answered all images.
        question: Question of the study.
        documents: Image → number of documents.
        first: Number of images of the first stage; None for the default.
        boundaries: Name of the rule that settles comparisons.
    """
    tasks = (question.clean, *question.shifted)
    names = np.unique(cells[0].run.tasks[question.clean].images)
    answers = {cell.axes: answers_of(cell, tasks) for cell in cells}

    def answered(part: ImageSlice, count: int, needed: Collection[CellAxes]) -> dict[CellAxes, StageAnswers]:
        chosen = np.isin(names, list(part.of(documents)))
        return {axes: _of_images(answers[axes], chosen) for axes in needed}

    found = decide(question, cells, ImageStages.of(documents, question.seed, first, boundaries), answered)
    assert found is not None
    return found


def _of_images(answers: StageAnswers, chosen: np.ndarray) -> StageAnswers:
    return StageAnswers(answers.sizes[chosen], {task: right[chosen] for task, right in answers.right.items()})


def rows(found: Decided, whole: Mapping[ArmComparison, str]) -> Iterator[tuple[str, ...]]:
    """One row for every comparison: findings of both, and what the sequential one rests on."""
    for one, state in found.decisions.found.items():
        low, high = state.interval
        points = f"{100 * state.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        sequential = NOT_JUDGED if one.asked == INTERACTION and state.broken else state.finding
        saved = 1.0 - state.documents / found.schedule.documents[-1]
        pair = f"{one.first} against {one.second}"
        yield str(one.bits), pair, one.asked, whole[one], sequential, points, str(state.images), f"{100 * saved:.0f} %"


def on_all_images(folder: Path, question: MethodByShift) -> dict[ArmComparison, str]:
    """Findings of the analysis of all images: tests by Holm at a fixed number of images."""
    found: dict[ArmComparison, str] = {}
    for one in contrasts.analyse(folder, question):
        for pair in one.contrasts:
            place = one.model, pair.first, pair.second, pair.bits
            found[ArmComparison(*place, UNDER_SHIFT)] = finding(pair.under_shift, pair.p_under_shift, question.level)
            judged = finding(pair.interaction, pair.p_interaction, question.level)
            found[ArmComparison(*place, INTERACTION)] = NOT_JUDGED if pair.broken else judged
    return found


def main() -> None:
    """Print the table of a finished study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first-images", type=int)
    parser.add_argument("--boundaries", choices=RULES, default=PLANNED)
    options = parser.parse_args()
    found = decided(options.file, options.folder, options.first_images, options.boundaries)
    for sentence in conclude(found)[0].sentences:
        print(sentence)
    heads = ("bits", "arms", "asked", "on all images", "until decided", "points", "images", "documents saved")
    whole = on_all_images(options.folder, found.decisions.question)
    print(*markdown(heads, list(rows(found, whole))), sep="\n")


if __name__ == "__main__":
    main()
