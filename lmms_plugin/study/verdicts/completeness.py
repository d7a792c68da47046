"""Finished and missing cells of a study, whatever code ran them, and an analysis that requires all of them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis.study_files import STUDY, place
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.verdicts import judging, sequential_verdict
from lmms_plugin.study.verdicts.conclusions import Conclusion, Partial
from lmms_plugin.study.verdicts.stages import ImageStages, follow
from lmms_plugin.utils.messages import counted

_NAMED = 3


class Coverage(NamedTuple):
    """Finished and missing cells of a study.

    Attributes:
        finished: Ids of the cells that count, one for each place of the study that has any.
        missing: Cells that are not finished.
    """

    finished: tuple[str, ...]
    missing: tuple[Cell, ...]

    @property
    def partial(self) -> Partial | None:
        """Return the number of finished cells and the first few missing ones by name; None if all are finished."""
        if not self.missing:
            return None
        # Tasks are named where they distinguish the missing cells.
        by_tasks = len({cell.tasks for cell in self.missing}) > 1
        first = [f"{one.slug} ({', '.join(one.tasks)})" if by_tasks else one.slug for one in self.missing[:_NAMED]]
        more = f" and {len(self.missing) - _NAMED} more" if len(self.missing) > _NAMED else ""
        done, total = len(self.finished), len(self.finished) + len(self.missing)
        return Partial(
            f"{done} of {counted(total, 'cell')} {'is' if done == 1 else 'are'} finished", f"{', '.join(first)}{more}"
        )


def coverage(folder: StudyFolder, planned: Sequence[Cell]) -> Coverage:
    """Match finished cells to planned ones by axes, tasks and limit; the newest counts where several match.

    Keys are not compared: code, data or versions may have changed since the study was run.
    """
    there: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in folder.finished():
        # Another runner may move the cell away at the same time.
        with suppress(FileNotFoundError):
            moment = str(folder.done(one).get("finished", ""))
            there[place(folder.about(folder.done_path(one)))].append((moment, one))
    found = [(cell, there.get(cell.place)) for cell in planned]
    return Coverage(
        tuple(max(answers)[1] for _, answers in found if answers),
        tuple(cell for cell, answers in found if not answers),
    )


def analyse(folder: Path, file: Path | None = None, *, partial: bool = False) -> list[Conclusion]:
    """Make the analysis of a study that was run, and write it into its folder.

    Args:
        folder: Folder of the study; the study file in it says which cells are required.
        file: Study file whose analysis is made; None for the one in the folder.
        partial: Whether cells may be missing; the verdict then states that first.

    Raises:
        FileNotFoundError: The folder holds no study file.
        ValueError: No analysis is asked for, it cannot be made, or cells are missing.
    """
    if not (folder / STUDY).is_file():
        raise FileNotFoundError(
            f"expected the folder of a study, as lmms-plugin study run --output makes it, got {folder} without {STUDY}"
        )
    study = read(folder / STUDY)
    asked = (study if file is None else read(file)).analysis
    if asked is None:
        raise ValueError(
            f"expected an analysis in {file or folder / STUDY}, got none (--file FILE takes that of another study file)"
        )
    schedule = ImageStages.read(folder)
    if schedule is not None:
        return _by_stages(folder, cells(study, runnable=False), asked, schedule, partial=partial)
    found = coverage(StudyFolder(folder), cells(study, runnable=False))
    if found.partial is not None and not partial:
        damaged = "".join(f"; {damage}" for damage in StudyFolder(folder).damaged().values())
        raise ValueError(
            f"expected all cells of {folder / STUDY}, but {found.partial.finished}, missing: {found.partial.missing}"
            f"{damaged} (--partial analyses what is there)"
        )
    return judging.conclude(folder, asked, found.finished, workers=os.cpu_count() or 1, partial=found.partial)


def _by_stages(
    folder: Path, planned: Sequence[Cell], asked: Mapping[str, Any], schedule: ImageStages, *, partial: bool
) -> list[Conclusion]:
    """Make the analysis of a study that was run until its comparisons were decided."""
    if partial:
        raise ValueError(f"--partial: {folder} was run until decided; expected all cells of its stages")
    question = sequential_verdict.asked_of(asked)

    def finished(of_stage: Sequence[Cell]) -> tuple[str, ...]:
        found = coverage(StudyFolder(folder), of_stage)
        if found.partial is not None:
            told = f"but {found.partial.finished}, missing: {found.partial.missing}"
            raise ValueError(f"expected all cells of every stage of {folder}, {told}: run it --until-decided again")
        return found.finished

    decided = follow(folder, question, planned, schedule, finished)
    assert decided is not None
    said = sequential_verdict.conclude(decided)
    judging.write(folder, said)
    return said
