"""Which cells of a study are finished, whatever code made them, and the analysis of no less than all of them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lmms_plugin.analysis.study_files import STUDY, place
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.study.verdicts import judging
from lmms_plugin.study.verdicts.conclusions import Conclusion, Partial
from lmms_plugin.utils.messages import counted

_NAMED = 3


class Coverage(NamedTuple):
    """How much of a study is finished.

    Attributes:
        finished: Ids of the cells that count, one for each place of the study that has any.
        missing: Cells that are not finished.
    """

    finished: tuple[str, ...]
    missing: tuple[Cell, ...]

    @property
    def partial(self) -> Partial | None:
        """How many are finished and which are missing, the first few by name; None where all are finished."""
        if not self.missing:
            return None
        # Their tasks are named where they tell them apart.
        by_tasks = len({cell.tasks for cell in self.missing}) > 1
        first = [f"{one.slug} ({', '.join(one.tasks)})" if by_tasks else one.slug for one in self.missing[:_NAMED]]
        more = f" and {len(self.missing) - _NAMED} more" if len(self.missing) > _NAMED else ""
        done, total = len(self.finished), len(self.finished) + len(self.missing)
        return Partial(
            f"{done} of {counted(total, 'cell')} {'is' if done == 1 else 'are'} finished", f"{', '.join(first)}{more}"
        )


def coverage(folder: StudyFolder, planned: Sequence[Cell]) -> Coverage:
    """Match finished cells to those planned by axes, tasks and limit, the newest where several answer to that.

    Not by key: code, data or versions may be others now than when the study was run.
    """
    there: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in folder.finished():
        # Another runner may put it aside at the same time.
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
        folder: Of the study; which cells there have to be is said by the study file in it.
        file: Study file whose analysis is made; None for the one in the folder.
        partial: Whether cells may be missing; the verdict then begins with that.

    Raises:
        FileNotFoundError: The folder holds no study file.
        ValueError: No analysis is asked for, it cannot be made, or cells are missing.
    """
    study = read(folder / STUDY)
    asked = (study if file is None else read(file)).analysis
    if asked is None:
        raise ValueError(f"expected an analysis in {file or folder / STUDY}, got none")
    found = coverage(StudyFolder(folder), cells(study, runnable=False))
    if found.partial is not None and not partial:
        damaged = "".join(f"; {damage}" for damage in StudyFolder(folder).damaged().values())
        raise ValueError(
            f"expected all cells of {folder / STUDY}, but {found.partial.finished}, missing: {found.partial.missing}"
            f"{damaged} (--partial analyses what is there)"
        )
    return judging.conclude(folder, asked, found.finished, workers=os.cpu_count() or 1, partial=found.partial)
